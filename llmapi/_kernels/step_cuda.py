"""Launches of ``csrc/step.cu``: the ids that the last step sampled, and the copy of whole KV blocks."""

from __future__ import annotations

import torch

from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit

_UNIT = Unit.of("step.cu")


def units(dtype: str) -> list[Unit]:
    """The one specialization there is, whatever the element type."""
    return [_UNIT]


def resolve_ids(gpu: Gpu, source: torch.Tensor, sampled: torch.Tensor | None, ids: torch.Tensor) -> None:
    """``ids[t] = source[t]``, or ``sampled[~source[t]]`` where that is negative.

    Args:
        source: ``[T]`` int32.
        sampled: ``[rows]`` int32; None where no source is negative. A failed row's -1 becomes 0.
        ids: ``[T]`` int32, written.
    """
    count = len(ids)
    gpu.kernel(_UNIT, "resolve_ids", "pppi")((-(-count // 256), 1, 1), 256, source, sampled, ids, count)


def copy_blocks(gpu: Gpu, caches: torch.Tensor, pairs: torch.Tensor, block_bytes: int) -> None:
    """Copy whole blocks, at once and in every cache.

    Args:
        caches: ``[C]`` int64 addresses of the caches.
        pairs: ``[N, 2]`` int32, source and target block; no block is both.
        block_bytes: bytes of a block, a multiple of 16.
    """
    gpu.kernel(_UNIT, "copy_blocks", "ppl")((len(pairs), len(caches), 1), 256, caches, pairs, block_bytes)
