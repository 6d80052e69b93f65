"""Launches of ``csrc/rotary.cu``: angles of a step, and rotation with the write of keys and values."""

from __future__ import annotations

import torch

from llmapi._kernels.gpu import Gpu, dtype_macro
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit


def units(dtype: str) -> list[Unit]:
    """Every specialization for an element type."""
    return [Unit.of("rotary.cu", LLM_DTYPE=DTYPE_MACRO[dtype])]


def rotary_cos_sin(gpu: Gpu, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float) -> torch.Tensor:
    """See :func:`llmapi._kernels.rotary.rotary_cos_sin`; int32 positions on the GPU."""
    rows, pairs = positions.shape[0], inv_freq.shape[0]
    out = inv_freq.new_empty(rows, 2 * pairs)
    if rows:
        kernel = gpu.kernel(Unit.of("rotary.cu", LLM_DTYPE=0), "rotary_cos_sin", "pppif", overlap=True)
        kernel((rows, 1, 1), min(256, max(32, pairs)), positions, inv_freq, out, pairs, scale)
    return out


def rotary_kv_write(
    gpu: Gpu,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    """See :func:`llmapi._kernels.rotary.rotary_kv_write`; int32 slots on the GPU.

    Args:
        in_place: leave the rotated queries where they are in ``qkv``, which nobody else may read, and return a view.
    """
    rows = qkv.shape[0]
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = qkv.view(rows, -1, head_dim)[:, :heads] if in_place else qkv.new_empty(rows, heads, head_dim)
    if not rows:
        return q
    rotary_dim = 0 if cos_sin is None else cos_sin.shape[-1]
    per_access = 16 // qkv.element_size()
    wide = not interleaved and rotary_dim == head_dim and head_dim % (2 * per_access) == 0
    entry = "rotary_kv_write" + ("_wide" if wide else "_interleaved" if interleaved else "")
    unit = Unit.of("rotary.cu", LLM_DTYPE=dtype_macro(qkv.dtype))
    kernel = gpu.kernel(unit, entry, "ppppppiiiil", overlap=True)
    work = (heads + 2 * kv_heads) * head_dim // (2 * per_access if wide else 2)
    threads = min(256, work + 31 & ~31)
    splits = max(1, min(-(-work // threads), 2 * gpu.sms // rows)) if wide else 1
    kernel(
        (rows, splits, 1), threads, qkv, cos_sin, slot_mapping, q, k_cache, v_cache,
        heads, kv_heads, head_dim, rotary_dim, q.stride(0),
    )  # fmt: skip
    return q
