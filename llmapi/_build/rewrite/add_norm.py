"""Fuse a residual add with the normalization that follows it."""

from __future__ import annotations

import operator

import torch
from torch import fx

import llmapi._kernels  # noqa: F401  (defines torch.ops.llmapi)

aten, ours = torch.ops.aten, torch.ops.llmapi


def fuse_add_norm(module: fx.GraphModule) -> fx.GraphModule:
    """One pass over the activations instead of two.

    Before::

        s = add(x, y); n = rms_norm(s, w, eps)

    After::

        n, s = add_rms_norm(y, x, w, eps)

    LayerNorm with weight and bias likewise becomes ``add_layer_norm``.
    """
    graph = module.graph
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if not _adds_two_tensors(add):
            continue
        norm = next((user for user in add.users if _normalizes(user, add)), None)
        if norm is None:
            continue
        x, y = add.args
        if norm.target is ours.rms_norm.default:
            target, tail = ours.add_rms_norm.default, norm.args[1:]
        else:
            target = ours.add_layer_norm.default
            tail = (norm.args[2], norm.args[3], norm.args[4] if len(norm.args) > 4 else 1e-5)
        with graph.inserting_before(add):
            fused = graph.call_function(target, (y, x, *tail))
            normed = graph.call_function(operator.getitem, (fused, 0))
            total = graph.call_function(operator.getitem, (fused, 1))
        for node in (fused, normed, total):
            node.meta["nn_module_stack"] = norm.meta.get("nn_module_stack")
        norm.replace_all_uses_with(normed)
        graph.erase_node(norm)
        add.replace_all_uses_with(total)
        graph.erase_node(add)
    module.recompile()
    return module


def _adds_two_tensors(add: fx.Node) -> bool:
    if len(add.args) != 2 or add.kwargs or not all(isinstance(a, fx.Node) for a in add.args):
        return False
    a, b = (arg.meta.get("val") for arg in add.args)  # type: ignore[union-attr]
    return a is None or b is None or a.shape == b.shape


def _normalizes(user: fx.Node, add: fx.Node) -> bool:
    if user.args[0] is not add or (bool(user.args[1:]) and add in user.args[1:]):
        return False
    if user.target is ours.rms_norm.default:
        return True
    return user.target is aten.layer_norm.default and len(user.args) >= 4 and None not in user.args[2:4]
