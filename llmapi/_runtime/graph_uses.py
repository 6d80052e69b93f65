"""GraphUses: who reads what in a graph; which activation or norm is all that follows a linear layer."""

from __future__ import annotations

from collections import Counter, defaultdict
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
        self._readers: defaultdict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for name in _refs(node):
                self._readers[name].append(node)
        self.count = Counter({name: len(nodes) for name, nodes in self._readers.items()})
        self.count[graph.output.name] += 1
        self._hidden = graph.projection()[1]

    def gate_of(self, linear: Node) -> Node | None:
        """The gated activation that is all that reads a linear layer's result."""
        if linear.op != "aten.linear.default":
            return None
        return self._only_reader(linear.name, "llmapi.gated_activation.default")

    def norm_of(self, linear: Node) -> Node | None:
        """The sum and RMSNorm that alone reads a linear layer's result, and that one linear layer alone reads."""
        if linear.op != "aten.linear.default":
            return None
        norm = self._only_reader(linear.name, "llmapi.add_rms_norm.default")
        return None if norm is None or self.after_norm(norm) is None else norm

    def after_norm(self, norm: Node) -> Node | None:
        """The linear layer that alone reads what a sum and RMSNorm gives first.

        None for the projection to the vocabulary, whose input is read by others in steps that embed texts, and for a
        layer that is followed by such a norm itself.
        """
        out = next((n for n in self._readers[norm.name] if n.op == "getitem" and n.args[1] == 0), None)
        if out is None or out.name == self._hidden.name:
            return None
        linear = self._only_reader(out.name, "aten.linear.default")
        return None if linear is None or self.norm_of(linear) is not None else linear

    def _only_reader(self, name: str, op: str) -> Node | None:
        """The node that alone reads a value, as its first argument, if it is one of these."""
        if self.count[name] != 1 or not self._readers[name]:
            return None
        (node,) = self._readers[name]
        return node if node.op == op and node.args[0] == Ref(name) else None

    def linears(self) -> Iterator[tuple[str, str | None]]:
        """Name of the weight of each linear layer, and the activation that is computed with it, if any."""
        for node in self._graph.nodes:
            if node.op == "aten.linear.default" and isinstance(node.args[1], Ref):
                consumer = self.gate_of(node)
                yield node.args[1].name, None if consumer is None else str(consumer.args[1])


def _refs(node: Node) -> list[str]:
    return [value.name for value in (*node.args, *node.kwargs.values()) if isinstance(value, Ref)]
