"""GraphUses: who reads what in a graph, and which activation follows a linear layer and nothing else does."""

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

    def gate_of(self, linear: Node) -> Node | None:
        """The gated activation that is all that reads a linear layer's result."""
        if linear.op != "aten.linear.default" or self.count[linear.name] != 1:
            return None
        for node in self._graph.nodes:
            if node.op == "llmapi.gated_activation.default" and node.args[0] == Ref(linear.name):
                return node
        return None

    def linears(self) -> Iterator[tuple[str, str | None]]:
        """Name of the weight of each linear layer, and the activation that is computed with it, if any."""
        for node in self._graph.nodes:
            if node.op == "aten.linear.default" and isinstance(node.args[1], Ref):
                consumer = self.gate_of(node)
                yield node.args[1].name, None if consumer is None else str(consumer.args[1])


def _refs(node: Node) -> list[str]:
    return [value.name for value in (*node.args, *node.kwargs.values()) if isinstance(value, Ref)]
