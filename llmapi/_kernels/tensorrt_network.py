"""Network: a TensorRT network in the making, in the words that operators' lowerings use.

Shapes: in the native path a step has ``B`` sequences with ``S`` new tokens each, padded, so what the graph calls
``[T, ...]`` is ``[B, S, ...]`` until rows are picked, and ``[N, ...]`` after; with plugins it stays ``[T, ...]``.
Lowerings take either: they look at the rank.

TensorRT is never imported here: the module is handed in; to lowerings ``tensorrt`` and ``tensorrt_rtx`` are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from llmapi.errors import BuildError

Tensor: TypeAlias = Any
"""A tensor of a network: ``ITensor`` of whichever package is loaded."""

Lower: TypeAlias = Callable[..., Any]
"""A lowering: called as ``lower(network, *args, **kwargs)`` with the node's arguments, its tensors among them."""


class Network:
    """A strongly typed network and what its lowerings share.

    Args:
        trt: the module, ``tensorrt`` or ``tensorrt_rtx``.
        definition: an empty, strongly typed ``INetworkDefinition``.
        dtype: the type of weights and activations: float32, float16 or bfloat16.
        complaints: gives what TensorRT has said since the last time it was asked, for messages.

    Attributes:
        path: module of the model that is being lowered; layers are named after it.
        updated: caches that were written, by the name of the input: the network's value of it from then on.
        shared: what is computed once for the whole network, such as masks, by the name that its lowering gave it.
    """

    def __init__(self, trt: Any, definition: Any, dtype: str, complaints: Callable[[], list[str]] = list) -> None:
        self.trt, self.definition, self.dtype = trt, definition, data_type(trt, dtype)
        self.path = ""
        self.updated: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self._kept: list[torch.Tensor] = []  # the network points into their memory until it is built
        self._names: Counter[str] = Counter()
        self._complaints = complaints

    # ---- tensors that come from outside

    def input(self, name: str, dtype: Any, shape: Iterable[int]) -> Tensor:
        """A named input; -1 for a size that varies from step to step."""
        return self._made(self.definition.add_input(name, dtype, tuple(shape)), f"input {name}")

    def constant(self, value: torch.Tensor, what: str = "constant") -> Tensor:
        """A small table. Weights are inputs, never constants: they would make the plan as large as the model.

        Args:
            value: float32, int32 or bool.
            what: names the layer.
        """
        value = value.detach().cpu().contiguous()
        self._kept.append(value)
        data = self.trt.DataType
        types = {torch.float32: data.FLOAT, torch.int32: data.INT32, torch.int64: data.INT64, torch.bool: data.BOOL}
        weights = self.trt.Weights(types[value.dtype], value.data_ptr(), value.numel())
        return self._layer(what, self.definition.add_constant(tuple(value.shape), weights))

    def scalar(self, value: float, rank: int) -> Tensor:
        """A float32 number that broadcasts to a rank."""
        return self.constant(torch.full((1,) * rank, value, dtype=torch.float32), "scalar")

    # ---- layers

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        """``x`` in another type; ``x`` itself where it has that type."""
        return x if x.dtype == dtype else self._layer("cast", self.definition.add_cast(x, dtype))

    def wide(self, x: Tensor) -> Tensor:
        """``x`` in float32."""
        return self.cast(x, self.trt.DataType.FLOAT)

    def narrow(self, x: Tensor) -> Tensor:
        """``x`` in the network's type."""
        return self.cast(x, self.dtype)

    def binary(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        """An element-wise operation, such as ``"SUM"``; both of one rank, sizes of 1 broadcast."""
        kind = getattr(self.trt.ElementWiseOperation, op)
        return self._layer(op.lower(), self.definition.add_elementwise(a, b, kind))

    def unary(self, op: str, x: Tensor) -> Tensor:
        """An element-wise operation of one tensor, such as ``"SQRT"``."""
        return self._layer(op.lower(), self.definition.add_unary(x, getattr(self.trt.UnaryOperation, op)))

    def activation(self, op: str, x: Tensor) -> Tensor:
        """A non-linearity, such as ``"SIGMOID"``."""
        return self._layer(op.lower(), self.definition.add_activation(x, getattr(self.trt.ActivationType, op)))

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the last dimension, which stays as 1."""
        axes = 1 << (len(x.shape) - 1)
        return self._layer("mean", self.definition.add_reduce(x, self.trt.ReduceOperation.AVG, axes, True))

    def softmax(self, x: Tensor) -> Tensor:
        """Softmax over the last dimension."""
        layer = self.definition.add_softmax(x)
        out = self._layer("softmax", layer)
        layer.axes = 1 << (len(x.shape) - 1)
        return out

    def matmul(self, a: Tensor, b: Tensor, *, transpose_b: bool = False) -> Tensor:
        """``a @ b`` (or ``a @ b.T``); both of one rank, leading sizes of 1 broadcast."""
        none, turned = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        layer = self.definition.add_matrix_multiply(a, none, b, turned if transpose_b else none)
        return self._layer("matmul", layer)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows of a table: ``[..., *table.shape[1:]]`` for indices ``[...]``."""
        return self._layer("gather", self.definition.add_gather(table, rows, 0))

    def concat(self, parts: list[Tensor]) -> Tensor:
        """Side by side along the last dimension."""
        layer = self.definition.add_concatenation(parts)
        layer.axis = len(parts[0].shape) - 1
        return self._layer("concat", layer)

    def select(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``a`` where the condition holds, else ``b``; all of one rank."""
        return self._layer("select", self.definition.add_select(condition, a, b))

    def reshape(
        self, x: Tensor, shape: Iterable[int], *, before: Iterable[int] = (), after: Iterable[int] = ()
    ) -> Tensor:
        """Permute, reshape, permute.

        Args:
            x: the tensor.
            shape: 0 keeps the size at that place, one -1 is inferred.
            before, after: permutations; none where empty.
        """
        layer = self._made(self.definition.add_shuffle(x), "reshape")
        if order := tuple(before):
            layer.first_transpose = self.trt.Permutation(order)
        layer.reshape_dims = tuple(shape)
        if order := tuple(after):
            layer.second_transpose = self.trt.Permutation(order)
        return self._layer("reshape", layer)

    def slice(self, x: Tensor, start: int, size: int) -> Tensor:
        """Channels ``start`` to ``start + size`` of the last dimension; the others may vary in size."""
        layer = self._made(self.definition.add_slice(x, (start,), (size,), (1,)), "slice")
        layer.axes = (len(x.shape) - 1,)
        return self._layer("slice", layer)

    def vector(self, v: Tensor, rank: int) -> Tensor:
        """``[C]`` as ``[1, ..., C]``, to broadcast over tensors of a rank."""
        return self.reshape(v, (1,) * (rank - 1) + (-1,)) if rank > 1 else v

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What the whole network shares, made by whoever asks first, and named after no module.

        Args:
            name: of it, among :attr:`shared`.
            make: makes it.
        """
        if name not in self.shared:
            self.path, path = "", self.path
            self.shared[name] = make()
            self.path = path
        return self.shared[name]

    def add(self, what: str, layer: Any) -> Tensor:
        """Name a layer that a lowering made itself after the module it belongs to.

        Args:
            what: which layer of that module it is.
            layer: from ``definition``; None where TensorRT refused it.

        Returns:
            its first output.
        """
        return self._layer(what, layer)

    def name(self, what: str) -> str:
        """A name for one more layer of the module that is being lowered, which no other layer gets.

        Args:
            what: which layer of that module it is.
        """
        name = f"{self.path or 'model'}/{what}"
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}.{self._names[name]}"

    def _layer(self, what: str, layer: Any) -> Tensor:
        self._made(layer, what)
        layer.name = self.name(what)
        return layer.get_output(0)

    def _made(self, made: Any, what: str) -> Any:
        if made is None:
            said = "; ".join(self._complaints()) or "it gives no reason"
            raise BuildError(
                f"{self.trt.__name__} {self.trt.__version__} refuses {self.path or 'model'}/{what}: {said}"
            )
        return made


def data_type(trt: Any, dtype: str) -> Any:
    """The package's name of a dtype.

    Args:
        trt: the module.
        dtype: float32, float16, bfloat16, int32, int64 or bool.
    """
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "bool": "BOOL"}
    return getattr(trt.DataType, names.get(dtype, dtype.upper()))
