"""Merge linears that read the same tensor and are concatenated: q/k/v, gate/up."""

from __future__ import annotations

import torch
from torch import fx

from llmapi._build.graph import Input

aten = torch.ops.aten


def merge_sibling_linears(module: fx.GraphModule) -> fx.GraphModule:
    """One product instead of several: the input is read once and the weights in one sweep.

    Before::

        a = linear(x, Wa, ba); b = linear(x, Wb, bb); y = cat([a, b], -1)

    After, with ``W`` a new weight input whose rows are Wa's, then Wb's (and ``bias`` likewise)::

        y = linear(x, W, bias)

    The weights' rows lie one after the other in the weights file, so the merged input is a view of it.
    """
    graph = module.graph
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        siblings = _siblings(cat)
        if siblings is None:
            continue
        operands: list[fx.Node] = [siblings[0].args[0]]  # type: ignore[list-item]
        for position in (1, 2):
            pieces = [s.args[position] for s in siblings if len(s.args) > position and s.args[position] is not None]
            if pieces:
                operands.append(_merged_input(graph, pieces))  # type: ignore[arg-type]
        with graph.inserting_before(cat):
            merged = graph.call_function(aten.linear.default, tuple(operands))
        merged.meta["nn_module_stack"] = cat.meta.get("nn_module_stack")
        cat.replace_all_uses_with(merged)
        graph.erase_node(cat)
        for sibling in siblings:
            graph.erase_node(sibling)
    _drop_unused_inputs(graph)
    module.recompile()
    return module


def _siblings(cat: fx.Node) -> list[fx.Node] | None:
    """The linears that ``cat`` joins, if that is all it does and nobody else reads them."""
    nodes = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if dim != -1 or not isinstance(nodes, (list, tuple)) or len(nodes) < 2:
        return None
    if not all(isinstance(n, fx.Node) and n.target is aten.linear.default and len(n.users) == 1 for n in nodes):
        return None
    siblings: list[fx.Node] = list(nodes)  # type: ignore[arg-type]
    if len({s.args[0] for s in siblings}) != 1:
        return None
    biased = [len(s.args) > 2 and s.args[2] is not None for s in siblings]
    if any(biased) != all(biased):
        return None
    weights = [w for s in siblings for w in s.args[1:] if w is not None]
    if not all(isinstance(w, fx.Node) and w.op == "placeholder" and len(w.users) == 1 for w in weights):
        return None
    return siblings


def _merged_input(graph: fx.Graph, pieces: list[fx.Node]) -> fx.Node:
    inputs: list[Input] = [piece.meta["input"] for piece in pieces]
    parts = tuple(part for i in inputs for part in i.parts)
    rows = sum(int(i.shape[0]) for i in inputs)
    with graph.inserting_before(pieces[0]):
        node = graph.placeholder("merged_" + "_".join(piece.name for piece in pieces))
    node.meta["input"] = Input("+".join(parts), "weight", parts, (rows, *inputs[0].shape[1:]))
    return node


def _drop_unused_inputs(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and node.meta["input"].kind == "weight":
            graph.erase_node(node)
