"""Candidates: the best continuations of each search of a step, all searches at once, on the logits' device.

The scores are those of transformers' beam search: a log-softmax in float32, changed by the request's edits without
normalizing again, plus the score of the beam. Only the short lists of candidates come to the host.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llmapi._runtime.beam import num_candidates
from llmapi._runtime.beam_ask import BeamAsk, Chooser, Chosen, Select, Spans
from llmapi._runtime.beam_found import PendingCandidates
from llmapi._runtime.draw import largest
from llmapi._runtime.logit_edits import LogitEdits
from llmapi._runtime.request import Request
from llmapi._runtime.transfer import indices


def select(logits: Tensor, spans: Spans, normalized: bool) -> Tensor:
    """:data:`Select` in torch operators: searches of the same shape at once."""
    x = logits if normalized else logits.float().log_softmax(1)
    device, vocab = x.device, x.shape[1]
    x = x + spans.cumulative.to(device, non_blocking=True)[:, None]
    width = max(spans.counts)
    out = torch.zeros(3, len(spans.first), width, dtype=torch.int32, device=device)
    out[0] = torch.full((), -torch.inf).view(torch.int32)
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(zip(spans.rows, spans.counts, strict=True)):
        shapes.setdefault(shape, []).append(i)
    for (rows, count), members in shapes.items():
        starts = indices([spans.first[i] for i in members], device)
        own = x[starts[:, None] + torch.arange(rows, device=device)]  # [members, rows, V]
        keys = _keys(own.flatten(1))
        count = min(count, rows * vocab)
        _, at = largest(keys, count)
        scores = own.flatten(1).gather(1, at)
        found = torch.stack([scores.view(torch.int32), (at % vocab).int(), (at // vocab).int()])
        out[:, indices(members, device), :count] = found
    return out


def _keys(x: Tensor) -> Tensor:
    """Int64 keys that sort as the values do, NaN as largest, equal ones by place: ``[R, M]`` float32 to ``[R, M]``."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ordered = torch.where(x.isnan(), 0x7FFFFFFF, ordered)
    return (ordered << 32) - torch.arange(x.shape[1], device=x.device)


class Candidates:
    """Finds the candidates of a step.

    Args:
        vocab_size: width of the logits.
        edits: of the requests.
        select: how they are found.
        chooser: chooses who goes on; None where the device cannot.
    """

    def __init__(
        self, vocab_size: int, edits: LogitEdits, select: Select = select, chooser: Chooser | None = None
    ) -> None:
        self._vocab = vocab_size
        self._edits = edits
        self._select = select
        self._chooser = chooser

    def chooses(self, request: Request) -> bool:
        """Whether the device can choose who goes on in a search of one group."""
        width = request.params.num_beams
        ends = len(request.stop_token_ids)
        return self._chooser is not None and self._chooser.fits(width, num_candidates(width, ends))

    def waits(self, request: Request) -> bool:
        """Whether the host must know all tokens of a search when it asks for more candidates."""
        if self._chooser is None or not self._edits.foreseeable(request.params):
            return True
        # a search of one beam is greedy decoding: logits are edited, not log probabilities
        return request.params.num_beams == 1 and self._edits.wanted(request.sequences[0])

    @torch.no_grad()
    def start(self, logits: Tensor, asks: list[BeamAsk], before: Chosen | None = None) -> PendingCandidates:
        """Begin to find candidates.

        Args:
            logits: ``[N, V]`` of the step, of any float dtype; kept until :meth:`PendingCandidates.result`.
            asks: what is wanted.
            before: what the step before chose; needed where an ask's scores are carried.
        """
        pending = PendingCandidates(logits, asks)
        plain: list[int] = []
        there: list[int] = []
        greedy: list[int] = []
        scored: list[int] = []
        for i, ask in enumerate(asks):
            edited = ask.carried is None and any(map(self._edits.wanted, ask.sequences))
            if self._edits_there(ask) if edited else ask.carried is not None or ask.ends is not None:
                there.append(i)
            elif not edited:
                plain.append(i)
            else:
                (greedy if ask.greedy else scored).append(i)
        if there:
            self._start_there(pending, there, before)
        if plain:
            x, own = _own_rows(logits, [asks[i] for i in plain])
            pending.add(plain, self._select(x, _spans(own, len(x)), False))
        if greedy:
            self._start_edited(pending, greedy, True)
        if scored:
            self._start_edited(pending, scored, False)
        if self._chooser is not None:
            pending.choose(self._chooser, before)
        pending.send()
        return pending

    def _edits_there(self, ask: BeamAsk) -> bool:
        """Whether an ask's edits are made where its candidates are found.

        Penalties are not, where the host knows the beams in every step: their tokens would have to be counted anew.
        """
        params = ask.sequences[0].request.params
        if self._chooser is None or ask.greedy or params.num_beam_groups > 1:
            return False
        if not self._chooser.fits(len(ask.sequences), ask.count) or not self._edits.foreseeable(params):
            return False
        edit = self._edits.foreseen(ask.sequences[0])
        return edit is not None and (edit.penalties is None or ask.ends is not None)

    def _start_there(self, pending: PendingCandidates, members: list[int], before: Chosen | None) -> None:
        """Find candidates of searches that the device edits, or that the host has not caught up with, or need not."""
        assert self._chooser is not None
        x, own = _own_rows(pending.logits, [pending.asks[i] for i in members], self._chooser.max_rows)
        spans = _spans(own, len(x))
        spans.carried, spans.before = [ask.carried for ask in own], before
        edits = [self._edits.foreseen(ask.sequences[0]) for ask in own]
        if any(edits):
            spans.edits, spans.beams = edits, [ask.sequences for ask in own]
            pending.foreseen = {i for i, edit in zip(members, edits, strict=True) if edit is not None}
        pending.add(members, self._select(x, spans, False))

    def _start_edited(self, pending: PendingCandidates, members: list[int], on_logits: bool) -> None:
        asks = [pending.asks[i] for i in members]
        rows = [ask.first_row + row for ask in asks for row in range(len(ask.sequences))]
        raw = pending.logits[indices(rows, pending.logits.device)].float()
        x = raw.clone() if on_logits else raw.log_softmax(1)
        sequences = [seq for ask in asks for seq in ask.sequences]
        errors = self._edits.apply(x, sequences)
        certain = [i for i, seq in enumerate(sequences) if seq.request.params.logits_processors]
        if certain:  # +inf stands for certainty
            at = indices(certain, x.device)
            own = x[at]
            sure = (own == torch.inf).any(1, keepdim=True)
            x[at] = torch.where(sure, torch.where(own == torch.inf, 0.0, -torch.inf), own)
        packed, begin = [], 0
        for i, ask in zip(members, asks, strict=True):
            packed.append(BeamAsk(ask.sequences, ask.scores, begin, ask.count))
            end = begin + len(ask.sequences)
            pending.edited[i] = raw[begin:end], x[begin:end]
            failed = next((e for e in errors[begin:end] if e is not None), None)
            if failed is not None:
                pending.errors[i] = failed
            begin = end
        pending.add(members, self._select(x, _spans(packed, len(x)), not on_logits))


def _own_rows(logits: Tensor, asks: list[BeamAsk], most: int | None = None) -> tuple[Tensor, list[BeamAsk]]:
    """The logits without rows that nobody asks for, where those are most, as in a step that computes prompts; or where
    there are more than ``most``."""
    rows = sorted({ask.first_row + row for ask in asks for row in range(len(ask.sequences))})
    if 2 * len(rows) >= len(logits) and (most is None or len(logits) <= most or len(rows) == len(logits)):
        return logits, asks
    place = {row: i for i, row in enumerate(rows)}
    moved = [replace(ask, first_row=place[ask.first_row]) for ask in asks]
    return logits[indices(rows, logits.device)], moved


def _spans(asks: list[BeamAsk], total: int) -> Spans:
    cumulative = np.zeros(total, dtype=np.float32)
    for ask in asks:
        cumulative[ask.first_row : ask.first_row + len(ask.scores)] = ask.scores
    first = [ask.first_row for ask in asks]
    rows = [len(ask.sequences) for ask in asks]
    return Spans(first, rows, [ask.count for ask in asks], torch.from_numpy(cumulative))
