"""Launches of ``csrc/sample.cu`` and ``sample_logprobs.cu``: tokens from rows of logits, and log probabilities."""

from __future__ import annotations

import math

import numpy as np
import torch

from llmapi._kernels.gpu import Gpu, Kernel, dtype_macro
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit

ROW = np.dtype(
    [
        ("seed", "<u8"),
        ("stream", "<u8"),
        ("counter", "<u8"),
        ("top_p", "<u8"),
        ("least", "<u8"),
        ("counts", "<u8"),
        ("edited", "<u8"),
        ("temperature", "<f4"),
        ("range", "<f4"),
        ("top_k", "<i4"),
        ("used", "<i4"),
        ("repetition", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("edits", "<i4"),
        ("bans", "<i4"),
        ("edits_end", "<i4"),
        ("logprobs", "<i4"),
        ("penalized", "<i4"),
        ("mask", "<u8"),
    ]
)
"""One row's settings, as ``struct Row`` of ``csrc/sample.cuh``.

===================== =========================================================================================
seed, stream, counter Philox, as :func:`llmapi._runtime.philox.uniforms`
top_p                 times 2**53; 2**53 is off
least                 ``min_p`` times 2**44, rounded up; 0 is off
counts                address of int32 ``[V]`` or 0: how often the output has each token, bit 31 set if the prompt
                      has it; the token that is chosen is added
edited                address of float32 ``[V]`` scratch for edited logits; 0: nothing is edited
temperature           0 is greedy
range                 see :func:`nucleus_range`
top_k                 0 is off
used                  0: the row is skipped and nothing of it is read or written
repetition, presence, penalties by ``counts``, in effect where ``penalized`` is not 0
frequency
mask                  address of uint32 words, a bit for each token, or 0: where a bit is 0 the logit becomes -inf,
                      before all other edits; needs ``edited``
edits, bans,          bounds in the list of edits: values at [edits, bans) are added to their ids' logits, then ids at
edits_end             [bans, edits_end) become -inf
logprobs              how many of the best tokens are wanted with log probabilities; -1: none, nor the chosen one's
===================== =========================================================================================
"""

EDIT = np.dtype([("id", "<i4"), ("value", "<f4")])
"""One entry of the list of edits."""

MAX_LOGPROBS = 512
"""The largest ``logprobs`` of a row."""

MAX_VOCAB = 1 << 19
"""The widest row: sums of weights stay below 2**63."""

_SUPPORT = 32.0  # exp(-32) is below the smallest weight
_L1_SHARE = 128 << 10  # bytes of a row that are worth a block, however many rows there are
_WORTH_A_BLOCK = 8000  # logits that are worth a block where blocks are left
_THREADS = 512


def units(dtype: str) -> list[Unit]:
    """Every specialization for an element type of the logits."""
    macro = DTYPE_MACRO[dtype]
    choices = [_choosing(macro, split, edited) for split in (1, 2, 4, 8) for edited in (False, True)]
    return choices + [_logprobs(macro, split) for split in (1, 2, 4, 8)]


def splits(gpu: Gpu, rows: int, vocab_size: int, dtype: torch.dtype) -> list[int]:
    """Every number of blocks that :func:`blocks_of_row` gives for up to so many rows, that for the most rows first."""
    return list(dict.fromkeys(blocks_of_row(gpu, n, vocab_size, dtype) for n in range(rows, 0, -1)))


def units_for(gpu: Gpu, rows: int, vocab_size: int, dtype: torch.dtype) -> list[Unit]:
    """What sampling from up to so many rows needs compiled while none is edited."""
    return [_choosing(dtype_macro(dtype), split, False) for split in splits(gpu, rows, vocab_size, dtype)]


def later_units_for(gpu: Gpu, rows: int, vocab_size: int, dtype: torch.dtype) -> list[Unit]:
    """What log probabilities and edits of up to so many rows need compiled besides, the quickest first."""
    macro, each = dtype_macro(dtype), splits(gpu, rows, vocab_size, dtype)
    return [_logprobs(macro, split) for split in each] + [_choosing(macro, split, True) for split in each]


def blocks_of_row(gpu: Gpu, rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Blocks for a row: as many as give each multiprocessor one, or as keep their parts near L1.

    Args:
        gpu: where; without clusters it is one.
        rows: in the launch.
        vocab_size, dtype: of a row.
    """
    split = 1
    while (
        gpu.overlap
        and split < 8
        and (
            (2 * split * rows <= gpu.sms and vocab_size >= 2 * split * _WORTH_A_BLOCK)
            or vocab_size * dtype.itemsize > split * _L1_SHARE
        )
    ):
        split *= 2
    return split


def nucleus_range(top_p: float, vocab_size: int) -> float:
    """Nats below the maximum within which the nucleus ends.

    Tokens of less than ``(1 - top_p) / V`` times the largest weight have, together, less than what is left out.
    """
    return min(_SUPPORT, math.log(vocab_size / max(1 - top_p, 1e-16)) + 0.5)


class SampleKernels:
    """Chooses a token for each row of logits.

    Args:
        gpu: where.
        vocab_size: width of the logits, at most :data:`MAX_VOCAB`.
        max_rows: most rows in a call.
        logits_dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: the vocabulary is too wide.
    """

    def __init__(self, gpu: Gpu, *, vocab_size: int, max_rows: int, logits_dtype: torch.dtype) -> None:
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"vocab_size={vocab_size} is too wide for sampling on the GPU: at most {MAX_VOCAB}")
        self._gpu = gpu
        self._vocab = vocab_size
        self._dtype = logits_dtype
        self._macro = dtype_macro(logits_dtype)
        for split in splits(gpu, max_rows, vocab_size, logits_dtype):  # compiled before the first step
            self._chooser(split, edited=False)

    def __call__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        out_ids: torch.Tensor,
        *,
        edited: bool,
        edits: torch.Tensor | None = None,
        reasons: torch.Tensor | None = None,
    ) -> None:
        """Choose.

        Args:
            logits: ``[N, V]``, unit stride within a row; never changed.
            rows: on the device, ``N`` of :data:`ROW` as bytes, aligned to 16.
            out_ids: ``[N]`` int32; -1 where no token can be chosen (NaN, or -inf everywhere).
            edited: whether any row has ``edited``. Where not, a kernel is launched that is sooner compiled and edits
                nothing. The other is compiled when it is first needed.
            edits: on the device, entries of :data:`EDIT` as bytes; needed where a row has any.
            reasons: ``[N]`` int32, written where no token can be chosen: how many raw logits are NaN; else -1 if all
                are -inf, else 0.
        """
        n = self._check(logits)
        if n:
            split = self._split(n)
            launch = self._chooser(split, edited)
            grid = (n * split, 1, 1)
            launch(grid, _THREADS, logits, logits.stride(0), self._vocab, rows, edits, out_ids, reasons)

    def logprobs(
        self, logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Log probabilities under the raw logits, as :func:`llmapi._runtime.logprobs.token_logprobs`.

        Args:
            logits, rows: as of a call.
            ids: ``[N]`` int32 chosen tokens; rows with -1 are skipped.
            values: ``[N, 1 + K]`` float32, contiguous; ``K`` at least the largest ``logprobs`` of a row. First the
                chosen token's log probability, then those of the most probable tokens in falling order.
            tokens: ``[N, 1 + K]`` int32, contiguous: first the chosen token's rank, then the ids.
        """
        n = self._check(logits)
        if n:
            split = self._split(n)
            launch = self._gpu.kernel(_logprobs(self._macro, split), "sample_logprobs", "plippipp", overlap=True)
            width = values.shape[1] - 1
            grid = (n * split, 1, 1)
            launch(grid, _THREADS, logits, logits.stride(0), self._vocab, rows, ids, width, values, tokens)

    def _check(self, logits: torch.Tensor) -> int:
        if logits.dtype != self._dtype or logits.shape[1] != self._vocab or logits.stride(1) != 1:
            raise ValueError(
                f"logits are {logits.dtype} of shape {list(logits.shape)} and strides {logits.stride()}: "
                f"give {self._dtype}, width {self._vocab}, stride 1 within a row"
            )
        return logits.shape[0]

    def _split(self, rows: int) -> int:
        return blocks_of_row(self._gpu, rows, self._vocab, self._dtype)

    def _chooser(self, split: int, edited: bool) -> Kernel:
        return self._gpu.kernel(_choosing(self._macro, split, edited), "sample_rows", "plipppp", overlap=True)


def _choosing(macro: str, split: int, edited: bool) -> Unit:
    return Unit.of("sample.cu", LLM_DTYPE=macro, SPLIT=split, EDITED=int(edited))


def _logprobs(macro: str, split: int) -> Unit:
    return Unit.of("sample_logprobs.cu", LLM_DTYPE=macro, SPLIT=split)
