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
_MOST_PARTS = 1024
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
    parts: int = 1,
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
        parts: into how many the keys of a lone decoding sequence are divided, so that they are read by as many blocks
            for each key head; with more tokens in a step into so much fewer. 1: not divided, and one kernel; more cost
            a second kernel and ``max(parts, T) * H * D`` floats of memory.
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
    if not 1 <= parts <= _MOST_PARTS:
        raise BuildError(f"the keys of a sequence are divided into 1 to {_MOST_PARTS} parts, not {parts}")
    vectors = [v for v in (alibi_slopes, sinks) if v is not None]
    if vectors:
        tensors += [vectors[0], vectors[-1]]  # the kernel reads only what the model has
        attributes |= {"alibi": int(alibi_slopes is not None), "sinks": int(sinks is not None)}
    if parts == 1:
        plugin = PAGED_ATTENTION_BIASED if vectors else PAGED_ATTENTION
        return plugin.add(network, tensors, name, **attributes)[0]
    plugin = PAGED_PARTS_BIASED if vectors else PAGED_PARTS
    left = plugin.add(network, tensors, f"{name}.parts", **attributes, parts=parts)
    joined = {key: attributes[key] for key in ("heads", "head_dim", "arch")}
    if sinks is None:
        return JOIN_PARTS.add(network, left, name, **joined)[0]
    return JOIN_PARTS_SINKS.add(network, (*left, sinks), name, **joined)[0]


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
        PARTS=int("parts" in attributes),
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
        if head_dim in (80, 128):
            found.append(_unit(dtype, {**attributes, "parts": 8}))
    return [*found, *(_join_unit(dtype, 128, sinks) for sinks in (0, 1))]


def _join_unit(dtype: str, head_dim: int, sinks: int) -> Unit:
    return Unit.of("plugin_join_parts.cu", LLM_DTYPE=DTYPE_MACRO[dtype], HEAD_DIM=head_dim, SINKS=sinks)


def _launch(dtype: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    heads, kv_heads, head_dim = (attributes[key] for key in ("heads", "kv_heads", "head_dim"))
    layout = _layout(dtype, heads, kv_heads, head_dim)
    (tokens, _, _), (batch, width), rows = shapes[0], shapes[2], layout.tiles.rows
    return Launch(
        unit=_unit(dtype, attributes),
        entry="plugin_paged_attention",
        # Each sequence's last tile may lack all rows but one.
        grid=((tokens + batch * (rows - 1)) // rows, heads, _part_count(tokens, attributes)),
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


def _part_count(tokens: Dim, attributes: Mapping[str, Any]) -> Dim:
    """Parts that the keys of a decoding sequence are divided into, in a step of so many tokens."""
    parts = attributes.get("parts", 1)
    return 1 if parts == 1 else (tokens + (parts - 1)) // tokens


def _outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[tuple[Dim, ...], ...]:
    return ((shapes[0][0], attributes["heads"], attributes["head_dim"]),)


def _parts_outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[tuple[Dim, ...], ...]:
    (whole,) = _outputs(shapes, attributes)
    count = _part_count(whole[0], attributes)
    return whole, (count, *whole), (count, *whole[:2], 2)


def _join_launch(dtype: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    head_dim = attributes["head_dim"]
    return Launch(
        unit=_join_unit(dtype, head_dim, int(len(shapes) == 4)),
        entry="plugin_join_parts",
        grid=(shapes[0][0], attributes["heads"], 1),
        block=head_dim + 31 & ~31,
        shared=0,
        extras=(shapes[1][0],),
    )


_INPUTS: dict[str, tuple[str, int | None]] = {
    "q": ("model", 3),
    "pools": ("int64", 1),
    "block_tables": ("int32", 2),
    "seq_lens": ("int32", 1),
    "query_start": ("int32", 1),
}
_BIASES: dict[str, tuple[str, int | None]] = {"alibi_slopes": ("float32", 1), "sink_logits": ("float32", 1)}
_PARTS: dict[str, tuple[str, int | None]] = {"whole": ("model", 3), "parts": ("float32", 4), "sums": ("float32", 4)}
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
    inputs={**_INPUTS, **_BIASES},
    attributes={**_ATTRIBUTES, "alibi": int, "sinks": int, "arch": int},
    outputs=_outputs,
    launch=_launch,
)
PAGED_PARTS = Plugin(
    name="paged_attention_parts",
    inputs=_INPUTS,
    attributes={**_ATTRIBUTES, "parts": int, "arch": int},
    outputs=_parts_outputs,
    launch=_launch,
    output_types=("model", "float32", "float32"),
)
PAGED_PARTS_BIASED = Plugin(
    name="paged_attention_parts_biased",
    inputs={**_INPUTS, **_BIASES},
    attributes={**_ATTRIBUTES, "alibi": int, "sinks": int, "parts": int, "arch": int},
    outputs=_parts_outputs,
    launch=_launch,
    output_types=("model", "float32", "float32"),
)
JOIN_PARTS = Plugin(
    name="join_parts",
    inputs=_PARTS,
    attributes={"heads": int, "head_dim": int, "arch": int},
    outputs=_outputs,
    launch=_join_launch,
)
JOIN_PARTS_SINKS = Plugin(
    name="join_parts_sinks",
    inputs={**_PARTS, "sink_logits": ("float32", 1)},
    attributes={"heads": int, "head_dim": int, "arch": int},
    outputs=_outputs,
    launch=_join_launch,
)
