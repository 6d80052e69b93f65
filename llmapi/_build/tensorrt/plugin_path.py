"""The plugin path: ragged steps over the paged cache, for full TensorRT.

The network takes the graph's step inputs as they are, and ``pools``, the addresses of the caches. Attention, the write
of keys and values with the rotation before it, and the residual add with its norm are plugins
(:mod:`llmapi._kernels.plugins`); the rest is the layers that the native path has, too. No cache is a tensor of the
network, so nothing of it can be copied, and there is no output beside the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmapi import _device
from llmapi._tensorrt import BLOCK_SIZE
from llmapi._build.graph import STEP_INPUTS, Graph
from llmapi._build.tensorrt.buckets import buckets_of, table_width
from llmapi._build.tensorrt.path import AttentionPath, ProfileShapes
from llmapi._kernels import plugins
from llmapi._kernels.nvrtc import architecture
from llmapi._kernels.plugins.plugin import compute_capability
from llmapi._kernels.tensorrt_network import Lower, Network, Tensor, data_type
from llmapi.config import EngineConfig
from llmapi.errors import BuildError
from llmapi.models.spec import TransformerSpec

POOLS = "pools"
"""Name of the input with the caches' addresses, see :func:`llmapi._kernels.plugins.pool_addresses`."""


@dataclass(frozen=True)
class Cache:
    """What stands for a cache among a node's arguments: no tensor, but where plugins find it.

    Attributes:
        kind: keys or values.
        layer: whose.
        kv_heads, head_dim: its shape.
        pools: the network's input.
        arch: what plugins are compiled for.
    """

    kind: Literal["k_cache", "v_cache"]
    layer: int
    kv_heads: int
    head_dim: int
    pools: Tensor
    arch: str


def arch_at_hand() -> str | None:
    """The GPU's architecture, such as ``"sm_89"``; None without a GPU."""
    return architecture(*_device.cuda_capability()) if _device.cuda_visible() else None


def key_parts() -> Mapping[str, str]:
    """What a plan depends on by its plugins: their kernels, and the GPU that they are compiled for.

    Raises:
        BuildError: there is no NVRTC.
    """
    return {**plugins.key_parts(), "attention": "plugin", "gpu": arch_at_hand() or "none"}


def _inputs(net: Network, graph: Graph, max_seq_len: int) -> Mapping[str, Any]:
    arch = arch_at_hand()
    if arch is None:
        raise BuildError(
            "the full tensorrt builds on the GPU that runs the plan, and torch sees none here: build there, or install "
            "tensorrt-rtx-cu13, which builds without one"
        )
    sizes = {"M": table_width(max_seq_len)}
    values: dict[str, Any] = {
        name: net.input(name, data_type(net.trt, "int32"), [sizes.get(size, -1) for size in shape])
        for name, shape in STEP_INPUTS.items()
    }
    caches = [item for item in graph.inputs if item.kind in ("k_cache", "v_cache")]
    layers = {kind: [item.name for item in caches if item.kind == kind] for kind in ("k_cache", "v_cache")}
    pools = net.input(POOLS, data_type(net.trt, "int64"), (1 + len(caches),))
    for item in caches:
        assert item.kind in ("k_cache", "v_cache")
        kv_heads, head_dim = (int(size) for size in item.shape[2:])
        values[item.name] = Cache(item.kind, layers[item.kind].index(item.name), kv_heads, head_dim, pools, arch)
    return values


def _of_one_layer(k_cache: Cache, v_cache: Cache) -> None:
    if (k_cache.kind, v_cache.kind) != ("k_cache", "v_cache") or k_cache.layer != v_cache.layer:
        raise NotImplementedError(
            f"keys from {k_cache.kind}.{k_cache.layer} and values from {v_cache.kind}.{v_cache.layer}"
        )


def rotary_cos_sin(net: Network, positions: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    """:func:`llmapi._kernels.rotary.rotary_cos_sin`, ``[T, R]`` in float32, in layers of TensorRT."""
    column = net.reshape(net.wide(positions), (-1, 1))
    angles = net.binary("PROD", column, net.vector(inv_freq, 2))
    both = net.concat([net.unary("COS", angles), net.unary("SIN", angles)])
    return both if scale == 1.0 else net.binary("PROD", both, net.scalar(scale, 2))


def rotary_kv_write(
    net: Network,
    qkv: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    interleaved: bool,
) -> Tensor:
    """:func:`llmapi._kernels.rotary.rotary_kv_write` as a plugin."""
    _of_one_layer(k_cache, v_cache)
    kv_heads, head_dim = k_cache.kv_heads, k_cache.head_dim
    return plugins.add_rotary_kv_write(
        net.definition, qkv, cos_sin, slot_mapping, k_cache.pools, layer=k_cache.layer,
        heads=qkv.shape[-1] // head_dim - 2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim,
        interleaved=interleaved, arch=k_cache.arch, name=net.name("kv_write"),
    )  # fmt: skip


def paged_attention(
    net: Network,
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """:func:`llmapi._kernels.paged_attention.paged_attention` as a plugin; ``[T, H D]``, as the graph views it next."""
    _of_one_layer(k_cache, v_cache)
    heads, head_dim = q.shape[1:]
    out = plugins.add_paged_attention(
        net.definition, q, k_cache.pools, block_tables, seq_lens, query_start, layer=k_cache.layer, heads=heads,
        kv_heads=k_cache.kv_heads, head_dim=head_dim, block_size=BLOCK_SIZE, scale=scale, window=window, softcap=softcap,
        alibi_slopes=None if alibi_slopes is None else net.wide(alibi_slopes),
        sinks=None if sinks is None else net.wide(sinks), arch=k_cache.arch, name=net.name("attention"),
    )  # fmt: skip
    return net.reshape(out, (-1, heads * head_dim))


def add_rms_norm(net: Network, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`llmapi._kernels.norm.add_rms_norm` as a plugin."""
    arch = arch_at_hand()
    assert arch is not None, "the inputs were made without one"
    return plugins.add_add_rms_norm(
        net.definition, x, residual, weight, eps=eps, arch=arch, name=net.name("add_rms_norm")
    )


def _profiles(graph: Graph, spec: TransformerSpec, config: EngineConfig) -> list[ProfileShapes]:
    found = []
    for bucket in buckets_of(config):
        shapes = bucket.shapes(table_width(config.max_seq_len))
        found.append({name: (shape, shape, shape) for name, shape in shapes.items()})
    return found


def _targets() -> list[str]:
    arch = arch_at_hand()
    return [] if arch is None else [f"sm{compute_capability(arch)}"]


TABLE: dict[str, Lower] = {
    "llmapi.add_rms_norm.default": add_rms_norm,
    "llmapi.paged_attention.default": paged_attention,
    "llmapi.rotary_cos_sin.default": rotary_cos_sin,
    "llmapi.rotary_kv_write.default": rotary_kv_write,
}
"""Operators that have another lowering here than in the native path."""

PATH = AttentionPath(
    name="plugin",
    layers=("add_plugin",),
    remedy="install the full tensorrt, 10.13 or newer; tensorrt_rtx has native attention alone",
    inputs=_inputs,
    table=TABLE,
    outputs=lambda net: {},
    profiles=_profiles,
    key_parts=key_parts,
    targets=_targets,
    block_size=BLOCK_SIZE,
)
"""Ragged attention over the paged cache, in the project's own kernels."""
