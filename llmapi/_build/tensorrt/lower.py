"""Lower: a graph becomes a TensorRT network, node by node, through one table from operators to layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmapi._build.graph import Graph, Node, Ref, map_refs
from llmapi._build.tensorrt.aten import ATEN
from llmapi._kernels import OPS
from llmapi._kernels.tensorrt_network import Lower, Network, Tensor, data_type
from llmapi.errors import BuildError, unknown_name

LOGITS = "logits"
"""Name of the network's first output."""


@dataclass(frozen=True)
class AttentionPath:
    """One way to do attention: which inputs the network has for it, and which operators it lowers itself.

    Attributes:
        name: what the lowering asks for it by.
        step_inputs: makes the network's inputs of a step, and gives the value of each of the graph's step inputs.
        cache_shape: shape of a layer's ``k_cache`` and ``v_cache`` inputs for the channels of the graph's and the
            tokens of a sequence; -1 for the size that varies.
        table: operators that it lowers in place of their own records.
        written: whether caches are outputs too, aliases of the inputs.
    """

    name: str
    step_inputs: Callable[[Network], Mapping[str, Any]]
    cache_shape: Callable[[int, int, int], tuple[int, ...]]
    table: Mapping[str, Lower]
    written: bool


def cache_output(name: str) -> str:
    """Name of the output that is the updated cache ``name``; both lie in the same memory."""
    return f"{name}.updated"


def _native_inputs(net: Network) -> Mapping[str, Any]:
    """See :mod:`llmapi._kernels.attention_tensorrt`."""
    ints = data_type(net.trt, "int32")
    positions = net.input("positions", ints, (-1, -1))
    return {
        "input_ids": net.input("input_ids", ints, (-1, -1)),
        "positions": positions,
        "slot_mapping": net.input("write_index", ints, (-1,)),
        "seq_lens": net.input("kv_lengths", ints, (-1,)),
        "block_tables": positions,
        "query_start": None,
        "logits_indices": net.input("logits_indices", ints, (-1,)),
    }


NATIVE = AttentionPath(
    "native", _native_inputs, lambda kv_heads, head_dim, tokens: (-1, kv_heads, tokens, head_dim), {}, written=True
)
"""Padded attention over a linear cache, in the package's own layers."""


def attention_path(name: str) -> AttentionPath:
    """The way of this name.

    Args:
        name: ``native``, or ``plugin`` for the project's own kernels over the paged cache.

    Raises:
        BuildError: there is none.
    """
    if name == "native":
        return NATIVE
    if name == "plugin":
        try:
            from llmapi._kernels.plugins import attention_path as plugins  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise BuildError("attention by plugins is not part of this release: use attention='native'") from error
        found: AttentionPath = plugins()
        return found
    raise BuildError(unknown_name("attention lowering", name, ("native", "plugin")))


def unsupported(graph: Graph, path: AttentionPath) -> list[str]:
    """Every node that has no lowering, as ``operator at its place in the model``."""
    return [f"{node.op} at {node.path or 'the model'} (node {node.name})" for node in graph.nodes if not _find(node, path)]


def _find(node: Node, path: AttentionPath) -> Lower | None:
    record = OPS.get(node.op)
    return path.table.get(node.op) or ATEN.get(node.op) or (record.tensorrt if record is not None else None)


def lower(
    net: Network,
    graph: Graph,
    constants: Mapping[str, torch.Tensor],
    *,
    max_seq_len: int,
    path: AttentionPath = NATIVE,
) -> None:
    """Write the graph into a network: inputs for step, caches and weights, layers for nodes, outputs for the results.

    Args:
        net: an empty network.
        graph: the exported, rewritten step.
        constants: the graph's small tables by name.
        max_seq_len: tokens of a sequence, prompt and output together.
        path: how attention is done.

    Raises:
        BuildError: nodes have no lowering (all of them are named), or TensorRT refuses a layer.
    """
    if missing := unsupported(graph, path):
        raise BuildError(
            f"{len(missing)} nodes have no TensorRT lowering: {'; '.join(missing)}. Use backend='cuda' or 'cpu' for "
            "this model"
        )
    values: dict[str, Any] = dict(path.step_inputs(net))
    for item in graph.inputs:
        if item.kind == "weight":
            shape = [int(size) for size in item.shape]
            values[item.name] = net.input(item.name, net.dtype, shape)
        elif item.kind == "constant":
            values[item.name] = net.constant(constants[item.name], item.name)
        elif item.kind in ("k_cache", "v_cache"):
            kv_heads, head_dim = (int(size) for size in item.shape[2:])
            values[item.name] = net.input(item.name, net.dtype, path.cache_shape(kv_heads, head_dim, max_seq_len))
    for node in graph.nodes:
        _lower_node(net, node, values, path)
    _mark(net, LOGITS, values[graph.output.name])
    if path.written:
        for name, tensor in net.updated.items():
            _mark(net, cache_output(name), tensor)


def _lower_node(net: Network, node: Node, values: dict[str, Any], path: AttentionPath) -> None:
    found = _find(node, path)
    assert found is not None

    def value(ref: Ref) -> Any:
        return values[ref.name]

    net.path = node.path
    try:
        values[node.name] = found(net, *map_refs(node.args, value), **map_refs(node.kwargs, value))
    except NotImplementedError as error:
        raise BuildError(
            f"{node.op} at {node.path or 'the model'} (node {node.name}) has no TensorRT lowering in this form: {error}. "
            "Use backend='cuda' or 'cpu' for this model"
        ) from error
    finally:
        net.path = ""


def _mark(net: Network, name: str, tensor: Tensor) -> None:
    tensor.name = name
    net.definition.mark_output(tensor)
