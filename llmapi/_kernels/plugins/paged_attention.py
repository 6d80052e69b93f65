"""Plugins for attention of a ragged step over the paged cache: decoding and prompts in one kernel, no workspace."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmapi._device import HEAD_SIZES
from llmapi._kernels.context_attention_cuda import Tiles, portable_tiles
from llmapi._kernels.decode_attention_cuda import BLOCK_SIZES, check, sizes
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit
from llmapi._kernels.plugins.plugin import (
    MOST_SHARED,
    Dim,
    Launch,
    Plugin,
    Shape,
    compute_capability,
    float_bits,
)
from llmapi.errors import BuildError

_MOST_STAGES = 4
_SPARE = 64  # bytes of shared memory that are not given away


def add_paged_attention(
    network: Any,
    q: Any,
    pools: Any,
    block_tables: Any,
    seq_lens: Any,
    query_start: Any,
    *,
    layer: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    sinks: Any | None = None,
    arch: str,
    name: str,
) -> Any:
    """Add :func:`llmapi._kernels.paged_attention.paged_attention` to a network of full TensorRT.

    Args:
        network: an ``INetworkDefinition``.
        q: ``[T, H, D]``, in the model's type, which the caches have, too; the output of the layer that writes this
            layer's keys and values, so that the write comes first.
        pools: int64, see :func:`llmapi._kernels.plugins.pools.pool_addresses`.
        block_tables, seq_lens, query_start: ``[B, M]``, ``[B]`` and ``[B + 1]`` int32.
        layer: whose caches are read.
        heads, kv_heads, head_dim, block_size: the attention's shape.
        scale, window, softcap: see the operator.
        alibi_slopes, sinks: ``[H]`` float32, or None.
        arch: what the kernel is compiled for, such as ``"sm_89"``; newer GPUs run it, too.
        name: of the layer.

    Returns:
        ``[T, H, D]``. Rows of no sequence are zero.

    Raises:
        BuildError: TensorRT is missing or too old, an input is not what it must be, or there is no such kernel.
    """
    check(torch.float16, torch.float16, heads, kv_heads, head_dim, block_size)
    if tuple(q.shape[1:]) != (heads, head_dim):
        raise BuildError(f"q at {name} has the shape {tuple(q.shape)}, must be [tokens, {heads}, {head_dim}]")
    tensors = [q, pools, block_tables, seq_lens, query_start]
    attributes: dict[str, int | float] = {
        "layer": layer,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "scale": float(scale),
        "window": window,
        "softcap": float(softcap),
        "arch": compute_capability(arch),
    }
    plugin, vectors = PAGED_ATTENTION, [v for v in (alibi_slopes, sinks) if v is not None]
    if vectors:
        plugin = PAGED_ATTENTION_BIASED
        tensors += [vectors[0], vectors[-1]]  # the kernel reads only what the model has
        attributes |= {"alibi": int(alibi_slopes is not None), "sinks": int(sinks is not None)}
    return plugin.add(network, tensors, name, **attributes)[0]


@dataclass(frozen=True)
class _Layout:
    """How the kernel is laid out: tiles of prompts, and for decoding the tiles that a warp keeps in flight."""

    tiles: Tiles
    stages: int
    shared: int


@functools.cache
def _layout(dtype: str, heads: int, kv_heads: int, head_dim: int) -> _Layout:
    """The one with most warps that fits into a plugin's shared memory."""
    of: torch.dtype = getattr(torch, dtype)
    stage, region = sizes(of, heads, kv_heads, head_dim)
    for warps in (4, 2, 1):
        try:
            tiles = portable_tiles(of, head_dim, MOST_SHARED, warps)
        except BuildError:
            continue
        stages, merge = min(_MOST_STAGES, (MOST_SHARED - _SPARE) // (warps * stage)), warps // 2 * region
        if stages and merge <= MOST_SHARED - _SPARE:
            return _Layout(tiles, stages, max(tiles.shared, warps * stages * stage, merge))
    raise BuildError(f"no attention kernel for heads of {head_dim} in {dtype} fits into {MOST_SHARED} bytes")


def _unit(dtype: str, attributes: Mapping[str, Any]) -> Unit:
    heads, kv_heads, head_dim = (attributes[key] for key in ("heads", "kv_heads", "head_dim"))
    layout = _layout(dtype, heads, kv_heads, head_dim)
    return Unit.of(
        "plugin_paged_attention.cu",
        LLM_DTYPE=DTYPE_MACRO[dtype],
        LLM_HEAD_DIM=head_dim,
        GROUP=heads // kv_heads,
        KV_HEADS=kv_heads,
        BLOCK_SHIFT=attributes["block_size"].bit_length() - 1,
        STAGES=layout.stages,
        SHARED=layout.shared,
        ALIBI=attributes.get("alibi", 0),
        SINKS=attributes.get("sinks", 0),
        **layout.tiles.defines,
    )


def units(dtype: str) -> list[Unit]:
    """Specializations that together exercise every path of the source: all head sizes, groups, blocks, biases."""
    found = []
    shapes = ((8, 2), (3, 3), (48, 1), (20, 1))
    for i, head_dim in enumerate(HEAD_SIZES):
        heads, kv_heads = shapes[i % len(shapes)]
        attributes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        attributes |= {"block_size": BLOCK_SIZES[i % len(BLOCK_SIZES)], "alibi": i & 1, "sinks": i >> 1 & 1}
        found.append(_unit(dtype, attributes))
    return found


def _launch(dtype: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    heads, kv_heads, head_dim = (attributes[key] for key in ("heads", "kv_heads", "head_dim"))
    layout = _layout(dtype, heads, kv_heads, head_dim)
    (tokens, _, _), (batch, width), rows = shapes[0], shapes[2], layout.tiles.rows
    return Launch(
        unit=_unit(dtype, attributes),
        entry="plugin_paged_attention",
        grid=((tokens + batch * (rows - 1)) // rows, heads, 1),  # each sequence's last tile may lack all rows but one
        block=layout.tiles.threads,
        shared=layout.shared,
        extras=(
            attributes["layer"],
            float_bits(attributes["scale"]),
            attributes["window"],
            float_bits(attributes["softcap"]),
            tokens,
            batch,
            width,
        ),
    )


def _outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[tuple[Dim, ...], ...]:
    return ((shapes[0][0], attributes["heads"], attributes["head_dim"]),)


_INPUTS: dict[str, tuple[str, int | None]] = {
    "q": ("model", 3),
    "pools": ("int64", 1),
    "block_tables": ("int32", 2),
    "seq_lens": ("int32", 1),
    "query_start": ("int32", 1),
}
_ATTRIBUTES: dict[str, type] = {
    **dict.fromkeys(("layer", "heads", "kv_heads", "head_dim", "block_size"), int),
    "scale": float,
    "window": int,
    "softcap": float,
}
PAGED_ATTENTION = Plugin(
    name="paged_attention",
    inputs=_INPUTS,
    attributes={**_ATTRIBUTES, "arch": int},
    outputs=_outputs,
    launch=_launch,
)
PAGED_ATTENTION_BIASED = Plugin(
    name="paged_attention_biased",
    inputs={**_INPUTS, "alibi_slopes": ("float32", 1), "sink_logits": ("float32", 1)},
    attributes={**_ATTRIBUTES, "alibi": int, "sinks": int, "arch": int},
    outputs=_outputs,
    launch=_launch,
)
