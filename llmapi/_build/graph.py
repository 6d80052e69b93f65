"""Graph: the model's step as plain data. Written to and read from JSON; nothing in it is executed as Python.

Nodes are in order of execution. Inputs have a kind: ``weight`` (rows of one or more canonical tensors, one below the
other), ``constant`` (a small table), ``step`` (what changes every step), ``k_cache`` and ``v_cache`` (one per layer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llmapi.errors import CacheError

InputKind = Literal["weight", "constant", "step", "k_cache", "v_cache"]

STEP_INPUTS: dict[str, tuple[str, ...]] = {
    "input_ids": ("T",),
    "positions": ("T",),
    "slot_mapping": ("T",),
    "block_tables": ("B", "M"),
    "seq_lens": ("B",),
    "query_start": ("B+1",),
    "logits_indices": ("N",),
}
"""The ragged step's inputs, all int32, and their symbolic shapes."""


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of the input or node of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Input:
    """One named input.

    Attributes:
        name: unique in the graph.
        kind: what it is.
        parts: canonical tensors whose rows it consists of (weights), or the one name it stands for.
        shape: sizes; text for those that vary from step to step.
    """

    name: str
    kind: InputKind
    parts: tuple[str, ...]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call.

    Attributes:
        name: unique in the graph.
        op: ``namespace.operator.overload``, or ``getitem``.
        args, kwargs: numbers, text, None, lists and :class:`Ref` s.
        path: module of the model that it came from.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str


@dataclass(frozen=True)
class Graph:
    """Inputs, nodes in order, and the name of the result."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    output: Ref

    @cached_property
    def text(self) -> str:
        """Canonical JSON text; equal for equal graphs."""
        data = {
            "inputs": [[i.name, i.kind, list(i.parts), list(i.shape)] for i in self.inputs],
            "nodes": [[n.name, n.op, _encode(n.args), _encode(n.kwargs), n.path] for n in self.nodes],
            "output": self.output.name,
        }
        return json.dumps(data, separators=(",", ":"), sort_keys=True)

    @property
    def digest(self) -> str:
        """SHA-256 of :attr:`text`, as hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def parse(cls, text: str) -> Graph:
        """From :attr:`text`.

        Raises:
            CacheError: it is not the text of a graph.
        """
        try:
            data = json.loads(text)
            return cls(
                tuple(Input(name, kind, tuple(parts), tuple(shape)) for name, kind, parts, shape in data["inputs"]),
                tuple(
                    Node(name, op, tuple(_decode(args)), _decode(kwargs), path)
                    for name, op, args, kwargs, path in data["nodes"]
                ),
                Ref(data["output"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"the stored graph cannot be read ({error}): remove the entry and build again") from error

    def projection(self) -> tuple[int, Ref]:
        """Index of the node that projects hidden states to the vocabulary, and what goes into it.

        Raises:
            CacheError: the graph does not end in a linear layer and operations on its result alone.
        """
        index = {node.name: i for i, node in enumerate(self.nodes)}
        at = self.output
        while at.name in index:
            node = self.nodes[index[at.name]]
            if not node.args or not isinstance(node.args[0], Ref):
                break
            if node.op == "aten.linear.default":
                return index[at.name], node.args[0]
            at = node.args[0]
        raise CacheError("the stored graph has no projection to the vocabulary: remove the entry and build again")

    def ops(self) -> list[str]:
        """Names of the operators that occur, sorted."""
        return sorted({node.op for node in self.nodes})


def map_refs(value: Any, change: Callable[[Ref], Any]) -> Any:
    """``value`` with each :class:`Ref` in it, at any depth, replaced by ``change(ref)``."""
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_refs(v, change) for v in value)
    if isinstance(value, dict):
        return {k: map_refs(v, change) for k, v in value.items()}
    return value


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"$": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a graph cannot hold {value!r}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict):
        return Ref(value["$"]) if set(value) == {"$"} else {k: _decode(v) for k, v in value.items()}
    return value
