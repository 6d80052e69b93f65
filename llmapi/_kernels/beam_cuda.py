"""Launches of ``csrc/beam.cu``: the best continuations of beams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llmapi._kernels.gpu import Gpu, Kernel, dtype_macro
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit
from llmapi._kernels.sample_cuda import MAX_VOCAB, blocks_of_row, splits

BEAM_ROW = np.dtype(
    [
        ("counts", "<u8"),
        ("edited", "<u8"),
        ("repetition", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("penalized", "<i4"),
        ("edits", "<i4"),
        ("bans", "<i4"),
        ("edits_end", "<i4"),
        ("k", "<i4"),
        ("beam", "<i4"),
        ("used", "<i4"),
        ("given", "<i4"),
        ("carried", "<i4"),
    ]
)
"""One row's settings, as ``struct Row`` of ``csrc/beam.cu``; :func:`settings` fills all but the edits.

===================== =========================================================================================
counts                address of int32 ``[V]`` or 0: how often the output has each token, bit 31 set if the prompt
                      has it; only read
edited                address of float32 ``[V]`` scratch for edited log probabilities; 0: nothing is edited
repetition, presence, penalties by ``counts``, in effect where ``penalized`` is not 0
frequency
edits, bans,          bounds in the list of edits (:data:`~llmapi._kernels.sample_cuda.EDIT`): values at [edits,
edits_end             bans) are added to their ids' log probabilities, then ids at [bans, edits_end) become -inf
k                     candidates wanted of the row: those of its request
beam                  the row's place in its request, from 0
used                  0: the row is skipped and nothing of it is read or written
given                 not 0: ``edited`` already holds the edited log probabilities, and the other edits are ignored
carried               0: the row's score is that of ``scores``; above: that of place ``carried - 1`` in ``carried``
===================== =========================================================================================
"""

BEAM_REQUEST = np.dtype([("first", "<i4"), ("rows", "<i4"), ("k", "<i4"), ("unused", "<i4")])
"""One request, as ``struct Request``: its first row, how many rows it has, how many candidates it wants. A request of
no rows or no candidates is passed over."""

MAX_BEAMS = 256
"""The most rows of a request."""

MAX_CANDIDATES = 1024
"""The most candidates of a request."""

_THREADS = 512


def units(dtype: str) -> list[Unit]:
    """Every specialization for an element type of the logits."""
    return [_unit(DTYPE_MACRO[dtype], split) for split in (1, 2, 4, 8)]


def units_for(gpu: Gpu, rows: int, vocab_size: int, dtype: torch.dtype) -> list[Unit]:
    """What searches in steps of up to so many rows need compiled."""
    return [_unit(dtype_macro(dtype), split) for split in splits(gpu, rows, vocab_size, dtype)]


def settings(requests: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """Tables for requests whose rows lie one after the other, without edits.

    Args:
        requests: rows and candidates of each.

    Returns:
        ``[N]`` of :data:`BEAM_ROW` and ``[Q]`` of :data:`BEAM_REQUEST`.

    Raises:
        ValueError: a request is too large.
    """
    table = np.zeros(len(requests), dtype=BEAM_REQUEST)
    rows = np.zeros(sum(n for n, _ in requests), dtype=BEAM_ROW)
    first = 0
    for q, (n, k) in enumerate(requests):
        if not 0 < n <= MAX_BEAMS or not 0 < k <= MAX_CANDIDATES:
            raise ValueError(
                f"request {q} has {n} beams and wants {k} candidates: 1 to {MAX_BEAMS} beams and 1 to "
                f"{MAX_CANDIDATES} candidates are possible"
            )
        own = rows[first : first + n]
        own["k"], own["beam"], own["used"], own["repetition"] = k, np.arange(n), 1, 1.0
        table[q] = (first, n, k, 0)
        first += n
    return rows, table


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best continuations of each request, best first.

    Equal scores stand in the order of beams, then of tokens. Candidates of -inf come last, in that order. Where a
    request has fewer than it wants, because all its beams have fewer tokens, the rest have token and beam -1 and -inf;
    so has all of a request that failed, but for the first: its score is NaN and its token the reason.

    Attributes:
        scores: ``[Q, C]`` float32: the beam's score plus the token's edited log probability.
        tokens: ``[Q, C]`` int32.
        beams: ``[Q, C]`` int32: the row within the request.
        logprobs: ``[Q, C]`` float32: the token's log probability under the raw logits.
        reasons: ``[Q]`` int32: 0, or why the request failed: how many of a row's logits are NaN; -1: all are -inf; -2:
            one is +inf; -3: the row's score is NaN or +inf, or an edited log probability is NaN. Of several failed rows
            the first one's.
    """

    scores: torch.Tensor
    tokens: torch.Tensor
    beams: torch.Tensor
    logprobs: torch.Tensor
    reasons: torch.Tensor

    @classmethod
    def empty(cls, requests: int, width: int, device: torch.device) -> Candidates:
        """For so many requests and candidates of each."""
        floats, ints = (
            torch.empty(2, requests, width, device=device).unbind(),
            torch.empty(2, requests, width, dtype=torch.int32, device=device),
        )
        return cls(floats[0], ints[0], ints[1], floats[1], torch.zeros(requests, dtype=torch.int32, device=device))


class BeamKernels:
    """Chooses the best continuations for the beams of each request.

    Args:
        gpu: where.
        vocab_size: width of the logits, at most :data:`~llmapi._kernels.sample_cuda.MAX_VOCAB`.
        max_rows: most rows in a call.
        max_candidates: most candidates of a request, at most :data:`MAX_CANDIDATES`.
        logits_dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: the vocabulary is too wide, or there are too many candidates.
    """

    def __init__(
        self, gpu: Gpu, *, vocab_size: int, max_rows: int, max_candidates: int, logits_dtype: torch.dtype
    ) -> None:
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"vocab_size={vocab_size} is too wide for beam search on the GPU: at most {MAX_VOCAB}")
        if not 0 < max_candidates <= MAX_CANDIDATES:
            raise ValueError(f"max_candidates={max_candidates} is out of range: give 1 to {MAX_CANDIDATES}")
        self._gpu = gpu
        self._vocab = vocab_size
        self._dtype = logits_dtype
        self._macro = dtype_macro(logits_dtype)
        self._width = max_candidates
        splits = {rows: self._split(rows) for rows in range(1, max_rows + 1)}
        for split in set(splits.values()):  # compiled before the first step
            self._kernels(split)
        lists = max(rows * split for rows, split in splits.items())
        self._best = torch.empty(lists, max_candidates, dtype=torch.int64, device=gpu.device)
        self._found = torch.empty(lists, 4, dtype=torch.int32, device=gpu.device)

    @property
    def workspace_bytes(self) -> int:
        """GPU memory held between calls."""
        return self._best.nbytes + self._found.nbytes

    def __call__(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        rows: torch.Tensor,
        requests: torch.Tensor,
        out: Candidates,
        *,
        carried: torch.Tensor | None = None,
        edits: torch.Tensor | None = None,
    ) -> None:
        """Choose. Two launches, no wait; may be captured into a CUDA graph.

        Args:
            logits: ``[N, V]``, unit stride within a row; never changed.
            scores: ``[N]`` float32: what each beam has so far.
            rows: on the device, ``N`` of :data:`BEAM_ROW` as bytes, aligned to 16.
            requests: on the device, ``Q`` of :data:`BEAM_REQUEST` as bytes, aligned to 16; all their rows are used.
            out: written; ``C`` at least the most candidates that a request wants.
            carried: float32: scores that rows of a positive ``carried`` have; needed where there is one.
            edits: on the device, entries of :data:`~llmapi._kernels.sample_cuda.EDIT` as bytes; needed where a row has
                any.
        """
        n, count, columns = self._check(logits, scores), len(out.reasons), out.scores.shape[1]
        if not n or not count:
            return
        split = self._split(n)
        choose, merge = self._kernels(split)
        stride, best, found = logits.stride(0), self._best, self._found
        choose(
            (n * split, 1, 1), _THREADS, logits, stride, self._vocab, rows, scores, carried, edits, best, self._width,
            found,
        )  # fmt: skip
        results = (out.scores, out.tokens, out.beams, out.logprobs)
        threads = 128 if columns <= 16 else 256 if columns <= 64 else 1024
        merge(
            (count, 1, 1), threads, logits, stride, requests, best, self._width, found, *results, columns, out.reasons
        )

    def row_constants(self, rows: int) -> torch.Tensor:
        """What the last call, of so many rows, found of each: ``[rows, 2]`` float32, such that the row's log_softmax is
        ``(x - constants[0]) - constants[1]``. For tests."""
        return self._found[: rows * self._split(rows) : self._split(rows), 2:].view(torch.float32)

    def _check(self, logits: torch.Tensor, scores: torch.Tensor) -> int:
        if logits.dtype != self._dtype or logits.shape[1] != self._vocab or logits.stride(1) != 1:
            raise ValueError(
                f"logits are {logits.dtype} of shape {list(logits.shape)} and strides {logits.stride()}: "
                f"give {self._dtype}, width {self._vocab}, stride 1 within a row"
            )
        if scores.dtype != torch.float32 or len(scores) < len(logits):
            raise ValueError(f"scores are {len(scores)} of {scores.dtype}: give float32, one for each of {len(logits)}")
        if len(logits) * self._split(len(logits)) > len(self._best):
            raise ValueError(f"{len(logits)} rows are more than max_rows allows: make BeamKernels for more")
        return len(logits)

    def _split(self, rows: int) -> int:
        return blocks_of_row(self._gpu, rows, self._vocab, self._dtype)

    def _kernels(self, split: int) -> tuple[Kernel, Kernel]:
        unit = _unit(self._macro, split)
        return (
            self._gpu.kernel(unit, "beam_rows", "plipppppip", overlap=True),
            self._gpu.kernel(unit, "beam_merge", "plppipppppip", overlap=True),
        )


def _unit(macro: str, split: int) -> Unit:
    return Unit.of("beam.cu", LLM_DTYPE=macro, SPLIT=split)
