"""KernelSelect: the candidates of beam searches by the project's kernels, on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmapi._kernels.beam_cuda import BEAM_REQUEST, BEAM_ROW, MAX_BEAMS, MAX_CANDIDATES, BeamKernels, Candidates
from llmapi._kernels.beam_reorder_cuda import BEAM_CHOICE, BEAM_FINISH, choose_beams, finish_beams
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.sample_cuda import EDIT
from llmapi._runtime.beam_ask import BeamAsk, Chosen, Spans
from llmapi._runtime.beam_counts import BeamCounts
from llmapi._runtime.beam_moves import upload
from llmapi._runtime.candidates import select
from llmapi._runtime.scratch import Scratch
from llmapi._runtime.transfer import to_device


class KernelSelect:
    """Finds candidates as :func:`llmapi._runtime.candidates.select` does, in two launches for all searches of a step;
    and chooses who goes on, and keeps the books of who has ended, in two more.

    What the kernels do not serve is done by torch's operators: groups that still share the row of their prompt, edited
    logits of a search of one beam, more than 1024 candidates of a search, more rows than sequences. None of that is
    asked for where scores are carried, or edits are to be made here.

    Args:
        gpu: where.
        vocab_size: width of the logits.
        max_rows: most rows of a step.
        logits_dtype: float32, bfloat16 or float16.
    """

    def __init__(self, gpu: Gpu, *, vocab_size: int, max_rows: int, logits_dtype: torch.dtype) -> None:
        self._gpu, self._vocab, self._dtype = gpu, vocab_size, logits_dtype
        self.max_rows = max_rows
        self._kernels: BeamKernels | None = None  # compiled, and given memory, with the first search
        self._counts = BeamCounts(gpu, vocab_size)
        self._scratch = Scratch(vocab_size, gpu.device)  # edited log probabilities
        self._shape: tuple[Any, ...] | None = None
        self._tables: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._choices: list[tuple[int, int, int, frozenset[int] | None]] = []
        self._chooser: tuple[Tensor, Tensor] | None = None
        self.launches = 0

    def __call__(self, logits: Tensor, spans: Spans, normalized: bool) -> Tensor:
        """See :data:`llmapi._runtime.candidates.Select`."""
        if not self._serves(logits, spans, normalized):
            assert spans.before is None and not spans.edits, "these have no other way"
            return select(logits, spans, normalized)
        if self._kernels is None:
            self._kernels = BeamKernels(
                self._gpu, vocab_size=self._vocab, max_rows=self.max_rows, max_candidates=MAX_CANDIDATES,
                logits_dtype=self._dtype,
            )  # fmt: skip
        counts = self._bring_counts(spans)
        rows, requests, edits = self._settings(spans, len(logits), logits.data_ptr() if normalized else 0, counts)
        if normalized:  # the kernels read the log probabilities where the settings say; these logits fail nobody
            flat = torch.zeros(1, self._vocab, dtype=self._dtype, device=logits.device)
            logits = flat.expand(len(logits), -1)
        device, count, width = self._gpu.device, len(spans.first), max(spans.counts)
        if spans.carried and None not in spans.carried:
            scores = torch.empty(len(logits), dtype=torch.float32, device=device)  # nobody reads them
        else:
            staging = torch.empty(len(logits), dtype=torch.float32, pin_memory=device.type == "cuda")
            scores = staging.copy_(spans.cumulative).to(device, non_blocking=True)
        planes = torch.empty(3, count, width, dtype=torch.int32, device=device)
        values = planes[0].view(torch.float32)
        logprobs = torch.empty(count, width, dtype=torch.float32, device=device)
        reasons = torch.empty(count, dtype=torch.int32, device=device)
        out = Candidates(values, planes[1], planes[2], logprobs, reasons)
        carried = None if spans.before is None else spans.before.scores
        self._kernels(logits, scores, rows, requests, out, carried=carried, edits=edits)
        self.launches += 1
        return planes

    def fits(self, rows: int, count: int) -> bool:
        """See :class:`llmapi._runtime.candidates.Chooser`."""
        return rows <= min(MAX_BEAMS, self.max_rows) and count <= MAX_CANDIDATES

    def choose(
        self, found: Tensor, asks: list[tuple[int, BeamAsk]], before: Chosen | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`llmapi._runtime.beam_ask.Chooser`."""
        device = self._gpu.device
        wanted = [(place, len(ask.sequences), ask.count, ask.ends) for place, ask in asks]
        if self._chooser is None or self._choices != wanted:
            choices = np.zeros(len(wanted), dtype=BEAM_CHOICE)
            ends: list[int] = []
            slot = 0
            for own, (place, rows, count, tokens) in zip(choices, wanted, strict=True):
                start = len(ends)
                ends += sorted(tokens or ())
                own["list"], own["rows"], own["k"], own["slot"] = place, rows, count, slot
                own["ends"], own["ends_stop"] = start, len(ends)
                slot += rows
            listed = to_device(torch.tensor([*ends, -1], dtype=torch.int32), device)
            self._chooser, self._choices = (upload(choices, device), listed), wanted
        sizes = [rows for _, rows, _, _ in wanted]
        chosen = torch.empty(3, sum(sizes), dtype=torch.int32, device=device)
        worths = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        records = torch.empty(len(asks), 2 + max(sizes), dtype=torch.int32, device=device)
        choose_beams(self._gpu, found, *self._chooser, chosen)
        if any(ask.finishing is not None for _, ask in asks):
            finishes, given = _finishes([ask for _, ask in asks])
            finish_beams(
                self._gpu, found, *self._chooser, upload(finishes, device), worths=worths, records=records,
                before=None if before is None else before.worths,
                given=to_device(given, device) if len(given) else None,
            )  # fmt: skip
        return chosen, worths, records

    def _serves(self, logits: Tensor, spans: Spans, normalized: bool) -> bool:
        shared = len(set(spans.first)) < len(spans.first)
        large = max(spans.counts) > MAX_CANDIDATES or max(spans.rows) > MAX_BEAMS or len(logits) > self.max_rows
        fits = logits.dtype == (torch.float32 if normalized else self._dtype) and logits.is_contiguous()
        return fits and not (shared or large)

    @property
    def workspace_bytes(self) -> int:
        """GPU memory held for edits: 8 bytes per vocabulary entry of a beam with penalties, 4 of another edited one."""
        return self._counts.nbytes + self._scratch.nbytes

    def _bring_counts(self, spans: Spans) -> list[int]:
        """The address of each search's counts, brought up to date; 0 where it has no penalties."""
        addresses = [0] * len(spans.first)
        penalized = [i for i, edit in enumerate(spans.edits) if edit is not None and edit.penalties is not None]
        wanted = [(spans.beams[i], spans.carried[i]) for i in penalized]
        for i, address in zip(penalized, self._counts.bring(wanted, spans.before), strict=True):
            addresses[i] = address
        return addresses

    def _settings(
        self, spans: Spans, total: int, given: int, counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The kernels' tables on the device, kept while the searches stay the same.

        Args:
            spans: the searches.
            total: rows of logits.
            given: address of log probabilities to be taken instead; 0: of the logits.
            counts: address of each search's counts of tokens.

        Returns:
            rows, requests, and the list of edits, if there are any.
        """
        shape = spans.first, spans.rows, spans.counts, spans.carried, total, given, spans.edits, counts
        if self._tables is None or self._shape != shape:
            table = np.zeros(total, dtype=BEAM_ROW)
            table["repetition"] = 1.0
            owners = np.repeat(np.arange(len(spans.first)), spans.rows)
            first, wanted = np.array(spans.first), np.array(spans.counts)
            beam = np.arange(len(owners)) - np.repeat(np.cumsum([0, *spans.rows[:-1]]), spans.rows)
            at = first[owners] + beam
            table["k"][at], table["beam"][at], table["used"][at] = wanted[owners], beam, 1
            for start, rows, place in zip(spans.first, spans.rows, spans.carried, strict=False):
                if place is not None:
                    table["carried"][start : start + rows] = place + 1 + np.arange(rows)
            if given:
                table["edited"], table["given"] = given + 4 * self._vocab * np.arange(total, dtype=np.uint64), 1
            listed = self._edit(table, spans, counts)
            requests = np.zeros(len(spans.first), dtype=BEAM_REQUEST)
            requests["first"], requests["rows"], requests["k"] = spans.first, spans.rows, spans.counts
            device = self._gpu.device
            edits = upload(listed, device) if len(listed) else None
            self._tables, self._shape = (upload(table, device), upload(requests, device), edits), shape
        return self._tables

    def _edit(self, table: npt.NDArray[np.void], spans: Spans, counts: list[int]) -> npt.NDArray[np.void]:
        """Write the edits of searches into the table of rows; the list of ``EDIT`` that it refers to."""
        listed: list[tuple[int, float]] = []
        edited = [(i, edit) for i, edit in enumerate(spans.edits) if edit is not None]
        addresses = self._scratch.rows(sum(spans.rows[i] for i, _ in edited)) if edited else np.zeros(0, np.uint64)
        for i, edit in edited:
            beams = np.arange(spans.rows[i], dtype=np.uint64)
            own = table[spans.first[i] : spans.first[i] + spans.rows[i]]
            own["edited"], addresses = addresses[: len(own)], addresses[len(own) :]
            if edit.penalties is not None:
                own["repetition"], own["presence"], own["frequency"] = edit.penalties
                own["counts"], own["penalized"] = counts[i] + 4 * self._vocab * beams, 1
            own["edits"] = len(listed)
            if edit.bias is not None:
                listed += zip(edit.bias[0].tolist(), edit.bias[1].tolist(), strict=True)
            own["bans"] = len(listed)
            listed += [(token, 0.0) for token in edit.banned]
            own["edits_end"] = len(listed)
        return np.array(listed, dtype=EDIT)


def _finishes(asks: list[BeamAsk]) -> tuple[npt.NDArray[np.void], Tensor]:
    """How searches end, and what has ended before, by slot, empty where the device knows it of all of them."""
    finishes = np.zeros(len(asks), dtype=BEAM_FINISH)
    given: list[float] = []
    for place, ask in enumerate(asks):
        worths: list[float] = []
        if (how := ask.finishing) is not None:
            finishes[place] = (
                how.norm,
                how.settle,
                how.last,
                how.always,
                0 if ask.carried is None else ask.carried + 1,
                0,
            )
            worths = how.worths
        given += [*worths, *[-np.inf] * (len(ask.sequences) - len(worths))]
    known = all(ask.carried is not None for ask in asks)
    return finishes, torch.tensor([] if known else given, dtype=torch.float64)
