"""Lower: a graph becomes a TensorRT network, node by node, through one table from operators to layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmapi._build.graph import Graph, Node, Ref, map_refs
from llmapi._build.tensorrt.aten import ATEN
from llmapi._build.tensorrt.path import NATIVE, AttentionPath
from llmapi._kernels import OPS
from llmapi._kernels.tensorrt_network import Lower, Network, Tensor
from llmapi.errors import BuildError

LOGITS = "logits"
"""Name of the network's first output."""

HIDDEN_STATES = "hidden_states"
"""Name of its second: of each row of the logits, what goes into the projection to the vocabulary."""


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
    values: dict[str, Any] = dict(path.inputs(net, graph, max_seq_len))
    for item in graph.inputs:
        if item.kind == "weight":
            values[item.name] = net.input(item.name, net.dtype, [int(size) for size in item.shape])
        elif item.kind == "constant":
            values[item.name] = net.constant(constants[item.name], item.name)
    for node in graph.nodes:
        _lower_node(net, node, values, path)
    _mark(net, LOGITS, values[graph.output.name])
    _, states = graph.projection()
    _mark(net, HIDDEN_STATES, values[states.name])
    for name, tensor in path.outputs(net).items():
        _mark(net, name, tensor)


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
