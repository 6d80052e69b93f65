"""AttentionPath: one way to do attention in a network, with everything about the network that follows from it.

There is ``native``, TensorRT's own layers over a linear cache, and ``plugin``, the project's own kernels over the paged
cache: :mod:`llmapi._build.tensorrt.plugin_path`. Which one is taken follows from the package, see
:attr:`llmapi._build.tensorrt.package.Package.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from llmapi._build.graph import Graph
from llmapi._build.tensorrt.shapes import Shape, native_profiles
from llmapi._kernels.tensorrt_network import Lower, Network, Tensor, data_type
from llmapi.config import EngineConfig
from llmapi.errors import BuildError, unknown_name
from llmapi.models.spec import TransformerSpec

ProfileShapes: TypeAlias = dict[str, tuple[Shape, Shape, Shape]]
"""Input to its smallest, most common and largest shape."""


@dataclass(frozen=True)
class AttentionPath:
    """One way to do attention.

    Attributes:
        name: what it is asked for by.
        layers: methods of ``INetworkDefinition`` that it needs.
        remedy: what to do where they are missing.
        inputs: makes the network's inputs for a step and for the caches, and gives what stands for each of the graph's
            step inputs, ``k_cache`` s and ``v_cache`` s; called with the network, the graph and ``max_seq_len``.
        table: operators that it lowers itself, in place of their records' own lowering.
        outputs: what the network gives beside the logits, by name, once all nodes are lowered.
        profiles: the sizes that each optimization profile takes.
        key_parts: what a plan's key needs beside the graph, the limits and the lowering's sources.
        targets: what a plan is for where no target was given; empty for any GPU of the package.
        block_size: tokens of a block of the paged cache; 0 for a linear one.
    """

    name: str
    layers: tuple[str, ...]
    remedy: str
    inputs: Callable[[Network, Graph, int], Mapping[str, Any]]
    table: Mapping[str, Lower]
    outputs: Callable[[Network], Mapping[str, Tensor]]
    profiles: Callable[[Graph, TransformerSpec, EngineConfig], list[ProfileShapes]]
    key_parts: Callable[[], Mapping[str, str]]
    targets: Callable[[], list[str]] = list
    block_size: int = 0


def cache_output(name: str) -> str:
    """Name of the output that is the updated cache ``name``; both lie in the same memory."""
    return f"{name}.updated"


def _native_inputs(net: Network, graph: Graph, max_seq_len: int) -> Mapping[str, Any]:
    """See :mod:`llmapi._kernels.attention_tensorrt`."""
    ints = data_type(net.trt, "int32")
    positions = net.input("positions", ints, (-1, -1))
    values: dict[str, Any] = {
        "input_ids": net.input("input_ids", ints, (-1, -1)),
        "positions": positions,
        "slot_mapping": net.input("write_index", ints, (-1,)),
        "seq_lens": net.input("kv_lengths", ints, (-1,)),
        "block_tables": positions,
        "query_start": None,
        "logits_indices": net.input("logits_indices", ints, (-1,)),
    }
    for item in graph.inputs:
        if item.kind in ("k_cache", "v_cache"):
            kv_heads, head_dim = (int(size) for size in item.shape[2:])
            values[item.name] = net.input(item.name, net.dtype, (-1, kv_heads, max_seq_len, head_dim))
    return values


NATIVE = AttentionPath(
    name="native",
    layers=("add_kv_cache_update", "add_attention_v2", "add_rotary_embedding"),
    remedy="install tensorrt 10.15 or newer, or tensorrt-rtx-cu13",
    inputs=_native_inputs,
    table={},
    outputs=lambda net: {cache_output(name): tensor for name, tensor in net.updated.items()},
    profiles=native_profiles,
    key_parts=dict,
)
"""Padded attention over a linear cache, in the package's own layers."""


def attention_path(name: str) -> AttentionPath:
    """The way of this name.

    Args:
        name: ``native`` or ``plugin``.

    Raises:
        BuildError: there is none.
    """
    if name == "native":
        return NATIVE
    if name != "plugin":
        raise BuildError(unknown_name("attention lowering", name, ("native", "plugin")))
    from llmapi._build.tensorrt.plugin_path import PATH

    return PATH
