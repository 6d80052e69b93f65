"""Plugins that rotate queries and keys, write keys and values into the paged cache, and return the queries.

What reads the cache takes these queries, and so runs after the write: TensorRT orders layers by their tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit
from llmapi._kernels.plugins.plugin import Dim, Launch, Plugin, Shape, compute_capability
from llmapi.errors import BuildError

_ATTRIBUTES = {"layer": int, "heads": int, "kv_heads": int, "head_dim": int}
_SOURCE = "plugin_rotary_kv_write.cu"


def add_rotary_kv_write(
    network: Any,
    qkv: Any,
    cos_sin: Any | None,
    slot_mapping: Any,
    pools: Any,
    *,
    layer: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
    arch: str,
    name: str,
) -> Any:
    """Add :func:`llmapi._kernels.rotary.rotary_kv_write` to a network of full TensorRT.

    Args:
        network: an ``INetworkDefinition``.
        qkv: ``[T, (H + 2 K) D]``, in the model's type.
        cos_sin: ``[T, R]`` float32; None for no rotation.
        slot_mapping: ``[T]`` int32.
        pools: int64, see :func:`llmapi._kernels.plugins.pools.pool_addresses`.
        layer: which layer's caches are written.
        heads, kv_heads, head_dim: H, K and D.
        interleaved: pairing of the rotation.
        arch: what the kernel is compiled for, such as ``"sm_89"``; newer GPUs run it, too.
        name: of the layer.

    Returns:
        ``[T, H, D]`` queries.

    Raises:
        BuildError: TensorRT is missing or too old, or an input is not what it must be.
    """
    shape = {"layer": layer, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    capability = compute_capability(arch)
    width = (heads + 2 * kv_heads) * head_dim
    if len(qkv.shape) == 2 and qkv.shape[1] not in (-1, width):
        raise BuildError(
            f"qkv at {name} is {qkv.shape[1]} wide; {heads} query and {kv_heads} key heads of {head_dim} take {width}"
        )
    if cos_sin is None:
        return KV_WRITE.add(network, (qkv, slot_mapping, pools), name, **shape, arch=capability)[0]
    rotary_dim = cos_sin.shape[1] if len(cos_sin.shape) == 2 else -1
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise BuildError(
            f"cos_sin at {name} has the shape {tuple(cos_sin.shape)}; must be [tokens, R] with a constant, even R of at"
            f" most {head_dim}"
        )
    rotation = {"rotary_dim": rotary_dim, "interleaved": int(interleaved)}
    tensors = (qkv, cos_sin, slot_mapping, pools)
    return ROTARY_KV_WRITE.add(network, tensors, name, **shape, **rotation, arch=capability)[0]


def units(dtype: str) -> list[Unit]:
    """Specializations that together exercise every path of the source."""
    shapes = ((9, 3, 64, 64, 0), (4, 4, 80, 80, 1), (8, 1, 64, 32, 0), (2, 2, 64, 0, 0))
    return [_unit(dtype, *shape) for shape in shapes]


def _unit(dtype: str, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, interleaved: int) -> Unit:
    return Unit.of(
        _SOURCE,
        LLM_DTYPE=DTYPE_MACRO[dtype],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        NEIGHBOURS=interleaved,
    )


def _launch(dtype: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    heads, kv_heads, head_dim = (attributes[key] for key in ("heads", "kv_heads", "head_dim"))
    rotary_dim, interleaved = attributes.get("rotary_dim", 0), attributes.get("interleaved", 0)
    pairs = (heads + 2 * kv_heads) * head_dim // 2
    return Launch(
        unit=_unit(dtype, heads, kv_heads, head_dim, rotary_dim, interleaved),
        entry="plugin_rotary_kv_write",
        grid=(shapes[0][0], 1, 1),
        block=min(256, pairs + 31 & ~31),
        shared=0,
        extras=(attributes["layer"],),
    )


def _outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[tuple[Dim, ...], ...]:
    return ((shapes[0][0], attributes["heads"], attributes["head_dim"]),)


ROTARY_KV_WRITE = Plugin(
    name="rotary_kv_write",
    inputs={"qkv": ("model", 2), "cos_sin": ("float32", 2), "slot_mapping": ("int32", 1), "pools": ("int64", 1)},
    attributes={**_ATTRIBUTES, "rotary_dim": int, "interleaved": int, "arch": int},
    outputs=_outputs,
    launch=_launch,
)
KV_WRITE = Plugin(
    name="kv_write",
    inputs={"qkv": ("model", 2), "slot_mapping": ("int32", 1), "pools": ("int64", 1)},
    attributes={**_ATTRIBUTES, "arch": int},
    outputs=_outputs,
    launch=_launch,
)
