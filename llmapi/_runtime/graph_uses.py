"""GraphUses: who reads what in a graph; which activation or norm is all that follows a linear layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from llmapi._build.graph import Graph, Node, Ref


class GraphUses:
    """Uses of the values of a graph.

    Args:
        graph: the step.

    Attributes:
        nodes: by name.
        count: how often each value is read; the graph's result counts as read.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.count = Counter(name for node in graph.nodes for name in _refs(node))
        self.count[graph.output.name] += 1
        self._hidden = graph.projection()[1]

    def gate_of(self, linear: Node) -> Node | None:
        """The gated activation that is all that reads a linear layer's result."""
        if linear.op != "aten.linear.default" or self.count[linear.name] != 1:
            return None
        for node in self._graph.nodes:
            if node.op == "llmapi.gated_activation.default" and node.args[0] == Ref(linear.name):
                return node
        return None

    def norm_of(self, linear: Node) -> Node | None:
        """The sum and RMSNorm that alone reads a linear layer's result, and that one linear layer alone reads."""
        if linear.op != "aten.linear.default" or self.count[linear.name] != 1:
            return None
        for node in self._graph.nodes:
            if node.op == "llmapi.add_rms_norm.default" and node.args[0] == Ref(linear.name):
                return None if self.after_norm(node) is None else node
        return None

    def after_norm(self, norm: Node) -> Node | None:
        """The linear layer that alone reads what a sum and RMSNorm gives first.

        None for the projection to the vocabulary, whose input is read by others in steps that embed texts, and for a
        layer that is followed by such a norm itself.
        """
        out = next((n for n in self._graph.nodes if n.op == "getitem" and n.args == (Ref(norm.name), 0)), None)
        if out is None or self.count[out.name] != 1 or out.name == self._hidden.name:
            return None
        for node in self._graph.nodes:
            if node.op == "aten.linear.default" and node.args[0] == Ref(out.name):
                return None if self.norm_of(node) is not None else node
        return None

    def linears(self) -> Iterator[tuple[str, str | None]]:
        """Name of the weight of each linear layer, and the activation that is computed with it, if any."""
        for node in self._graph.nodes:
            if node.op == "aten.linear.default" and isinstance(node.args[1], Ref):
                consumer = self.gate_of(node)
                yield node.args[1].name, None if consumer is None else str(consumer.args[1])


def _refs(node: Node) -> list[str]:
    return [value.name for value in (*node.args, *node.kwargs.values()) if isinstance(value, Ref)]
