"""Program: a graph whose every node was bound to a function once. Running it is one loop over plain calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmapi._build.graph import Graph, Node, Ref
from llmapi.errors import BuildError

Environment = list[Any]
Call = Callable[[Environment], Any]


class Slot(int):
    """Where in the environment an argument lies that is known only when the program runs."""


Implement = Callable[[Node, list[Any], dict[str, Any]], Call]
"""A node, its arguments (values known at load, or :class:`Slot` s) and keyword arguments, to its call."""


@dataclass(frozen=True)
class Program:
    """Instructions over an environment of slots; slot 0 holds the step's plan.

    Attributes:
        instructions: the call, where its result goes, and the slots that nobody reads any more.
        slots: of the step's inputs, by name.
        size: of the environment.
        output: slot of the result.
        hidden: slot of what goes into the projection to the vocabulary.
        projection: index of the instruction that begins it.
    """

    instructions: tuple[tuple[Call, int, tuple[int, ...]], ...]
    slots: Mapping[str, int]
    size: int
    output: int
    hidden: int
    projection: int

    @classmethod
    def bind(cls, graph: Graph, values: Mapping[str, Any], implement: Implement) -> Program:
        """Resolve every node once.

        Args:
            graph: the step.
            values: weights, constants and caches by name.
            implement: what to call for a node.

        Raises:
            BuildError: a node cannot be bound.
        """
        slots: dict[str, int] = {}
        for name in [i.name for i in graph.inputs if i.kind == "step"] + [n.name for n in graph.nodes]:
            slots[name] = len(slots) + 1
        last_use: dict[int, int] = {}

        def argument(value: Any, index: int) -> Any:
            if isinstance(value, Ref):
                if value.name in values:
                    return values[value.name]
                last_use[slots[value.name]] = index
                return Slot(slots[value.name])
            if isinstance(value, list) and any(isinstance(v, Ref) for v in value):
                raise BuildError(f"a list of tensors cannot be bound: {value}")
            return value

        calls = []
        for index, node in enumerate(graph.nodes):
            args = [argument(a, index) for a in node.args]
            kwargs = {k: argument(v, index) for k, v in node.kwargs.items()}
            calls.append((implement(node, args, kwargs), slots[node.name]))
        output = slots[graph.output.name]
        dead: dict[int, list[int]] = {}
        for slot, index in last_use.items():
            if slot != output:
                dead.setdefault(index, []).append(slot)
        program = tuple((call, slot, tuple(dead.get(i, ()))) for i, (call, slot) in enumerate(calls))
        index, ref = graph.projection()
        return cls(program, slots, len(slots) + 1, output, slots[ref.name], index)

    def run(self, plan: Any, inputs: Mapping[str, Any]) -> Any:
        """The result for these step inputs.

        Args:
            plan: what goes into slot 0.
            inputs: by name; those that the graph does not read are passed over.
        """
        environment = self._begin(plan, inputs)
        _execute(self.instructions, environment)
        return environment[self.output]

    def run_hidden(self, plan: Any, inputs: Mapping[str, Any], select: Callable[[Any], Any]) -> tuple[Any, Any]:
        """What goes into the projection to the vocabulary, and the result for some of its rows.

        Args:
            plan, inputs: as of :meth:`run`.
            select: from the former to the rows that are to be projected; None for none.
        """
        environment = self._begin(plan, inputs)
        _execute(self.instructions[: self.projection], environment)
        hidden = environment[self.hidden]
        environment[self.hidden] = select(hidden)
        if environment[self.hidden] is None:
            return hidden, None
        _execute(self.instructions[self.projection :], environment)
        return hidden, environment[self.output]

    def _begin(self, plan: Any, inputs: Mapping[str, Any]) -> Environment:
        environment: Environment = [None] * self.size
        environment[0] = plan
        for name, value in inputs.items():
            if name in self.slots:
                environment[self.slots[name]] = value
        return environment


def _execute(instructions: tuple[tuple[Call, int, tuple[int, ...]], ...], environment: Environment) -> None:
    for call, result, dead in instructions:
        environment[result] = call(environment)
        for slot in dead:
            environment[slot] = None


def call_of(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], *, plan: bool = False) -> Call:
    """``environment -> result`` with everything known beforehand folded in.

    Args:
        function: what to call.
        args, kwargs: values, or :class:`Slot` s among the positional ones.
        plan: whether the function takes the step's plan as ``plan``.
    """
    assert not any(isinstance(v, Slot) for v in kwargs.values())
    dynamic = [isinstance(a, Slot) for a in args]
    if dynamic == [True] + [False] * (len(args) - 1) and not plan:
        slot, rest = args[0], tuple(args[1:])
        return lambda env: function(env[slot], *rest, **kwargs)
    pairs = tuple(zip(dynamic, args, strict=True))
    if plan:
        return lambda env: function(*[env[a] if d else a for d, a in pairs], **kwargs, plan=env[0])
    return lambda env: function(*[env[a] if d else a for d, a in pairs], **kwargs)


def torch_function(op: str) -> Callable[..., Any]:
    """torch's implementation of an operator of its own.

    Args:
        op: ``namespace.operator.overload``.

    Raises:
        BuildError: this torch has none.
    """
    import operator

    import torch

    if op == "getitem":
        return operator.getitem
    fast: dict[str, Callable[..., Any]] = {  # without the cost of resolving an overload at every call
        "aten.add.Tensor": torch.add,
        "aten.view.default": torch.Tensor.view,
        "aten.index_select.default": torch.index_select,
    }
    if op in fast:
        return fast[op]
    namespace, name, overload = op.split(".")
    try:
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as error:
        raise BuildError(f"torch {torch.__version__} has no operator {op}: clear the engine from the cache") from error
    return found
