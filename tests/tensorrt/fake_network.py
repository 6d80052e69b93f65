"""A stand-in for the full TensorRT, in Python: it records a network, plugin layers among its layers. Its plans are run
by ``fake_paged_runtime.py``.

It has what the lowering and the plugins ask for, and what the evaluator reads. Types and ranks of operands are checked
as a strongly typed network does it, shapes are worked out where they are known (-1 where not), and a plugin's outputs
come from the function that it registered. It knows nothing of what TensorRT would refuse besides, and never asks a
plugin for its kernel: that half runs in TensorRT's bindings, see tests/_kernels/plugins/.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tensorrt.fake_paged_runtime import World, make_runtime

Shape = tuple[int, ...]


def _enum(name: str, *members: str) -> Any:
    return enum.Enum(name, list(members))


DataType = _enum("DataType", "FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8", "BOOL")


class Tensor:
    """``ITensor``: of an input, or of a layer's output, whose shape follows from the layer as it is when asked."""

    def __init__(self, name: str, dtype: Any, shape: Callable[[], Shape]) -> None:
        self.name, self.dtype, self._shape = name, dtype, shape

    @property
    def shape(self) -> Shape:
        return self._shape()

    def settle(self) -> None:
        """From now on the shape stays: a layer takes the tensor, and its own layer was given all its fields."""
        found = self.shape
        self._shape = lambda: found


class Layer:
    """``ILayer`` with whatever fields its kind has."""

    def __init__(self, kind: str, inputs: Sequence[Tensor], **fields: Any) -> None:
        self.kind, self.inputs, self.outputs = kind, list(inputs), []
        self.name = ""
        for tensor in self.inputs:
            tensor.settle()
        for name, value in fields.items():
            setattr(self, name, value)

    @property
    def type(self) -> Any:
        return SimpleNamespace(name=self.kind)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class IActivationLayer(Layer):
    """Its own type hides the layer's, as TensorRT's does."""

    @property
    def type(self) -> Any:
        return self.function  # type: ignore[attr-defined]


class INetworkDefinition:
    """Records inputs, layers and outputs."""

    def __init__(self) -> None:
        self.name = ""
        self._inputs: list[Tensor] = []
        self._layers: list[Layer] = []
        self._outputs: list[Tensor] = []

    # ---- what is read

    num_inputs = property(lambda self: len(self._inputs))
    num_layers = property(lambda self: len(self._layers))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    # ---- what is written

    def add_input(self, name: str, dtype: Any, shape: Shape) -> Tensor:
        assert isinstance(dtype, DataType) and name not in {t.name for t in self._inputs}
        self._inputs.append(Tensor(name, dtype, lambda: shape))
        return self._inputs[-1]

    def mark_output(self, tensor: Tensor) -> None:
        self._outputs.append(tensor)

    def add_constant(self, shape: Shape, weights: np.ndarray[Any, Any]) -> Layer:
        dtype = DataType.FLOAT if weights.dtype == np.float32 else DataType.INT32
        return self._add(Layer("CONSTANT", [], weights=weights, shape=shape), dtype, lambda: shape)

    def add_cast(self, x: Tensor, dtype: Any) -> Layer:
        return self._add(Layer("CAST", [x], to_type=dtype), dtype, lambda: x.shape)

    def add_elementwise(self, a: Tensor, b: Tensor, op: Any) -> Layer:
        self._alike(a, b)
        dtype = DataType.BOOL if op.name in ("GREATER", "LESS") else a.dtype
        return self._add(Layer("ELEMENTWISE", [a, b], op=op), dtype, lambda: _broadcast(a.shape, b.shape))

    def add_unary(self, x: Tensor, op: Any) -> Layer:
        return self._add(Layer("UNARY", [x], op=op), x.dtype, lambda: x.shape)

    def add_activation(self, x: Tensor, function: Any) -> Layer:
        return self._add(Layer("ACTIVATION", [x], function=function), x.dtype, lambda: x.shape)

    def add_reduce(self, x: Tensor, op: Any, axes: int, keep_dims: bool) -> Layer:
        assert keep_dims
        layer = Layer("REDUCE", [x], op=op, axes=axes, keep_dims=keep_dims)
        return self._add(layer, x.dtype, lambda: tuple(1 if axes >> i & 1 else s for i, s in enumerate(x.shape)))

    def add_matrix_multiply(self, a: Tensor, op0: Any, b: Tensor, op1: Any) -> Layer:
        self._alike(a, b)

        def shape() -> Shape:
            (rows, inner), (other, columns) = (
                s[-2:] if op.name == "NONE" else (s[-1], s[-2]) for s, op in ((a.shape, op0), (b.shape, op1))
            )
            assert -1 in (inner, other) or inner == other, f"{a.shape} times {b.shape}"
            return (*_broadcast(a.shape[:-2], b.shape[:-2]), rows, columns)

        return self._add(Layer("MATRIX_MULTIPLY", [a, b], op0=op0, op1=op1), a.dtype, shape)

    def add_gather(self, table: Tensor, rows: Tensor, axis: int) -> Layer:
        assert rows.dtype == DataType.INT32 and axis == 0
        layer = Layer("GATHER", [table, rows], axis=axis, mode=GatherMode.DEFAULT)
        return self._add(layer, table.dtype, lambda: (*rows.shape, *table.shape[1:]))

    def add_concatenation(self, parts: Sequence[Tensor]) -> Layer:
        self._alike(*parts)
        layer = Layer("CONCATENATION", parts, axis=0)

        def shape() -> Shape:
            sizes = [p.shape[layer.axis] for p in parts]  # type: ignore[attr-defined]
            whole = list(parts[0].shape)
            whole[layer.axis] = -1 if -1 in sizes else sum(sizes)  # type: ignore[attr-defined]
            return tuple(whole)

        return self._add(layer, parts[0].dtype, shape)

    def add_shuffle(self, x: Tensor) -> Layer:
        same = tuple(range(len(x.shape)))
        layer: Any = Layer("SHUFFLE", [x], first_transpose=same, second_transpose=tuple(range(8)), reshape_dims=None)

        def shape() -> Shape:
            turned = [x.shape[i] for i in layer.first_transpose]
            dims = [turned[i] if d == 0 else d for i, d in enumerate(layer.reshape_dims)]
            if -1 in layer.reshape_dims and -1 not in turned:
                rest = int(np.prod([d for d in dims if d != -1]))
                dims[layer.reshape_dims.index(-1)] = int(np.prod(turned)) // rest
            return tuple(dims[i] for i in layer.second_transpose[: len(dims)])

        return self._add(layer, x.dtype, shape)

    def add_slice(self, x: Tensor, start: Shape, size: Shape, step: Shape) -> Layer:
        layer: Any = Layer("SLICE", [x], start=start, shape=size, stride=step, axes=None)

        def shape() -> Shape:
            given = dict(zip(layer.axes, size, strict=True))
            return tuple(given.get(i, s) for i, s in enumerate(x.shape))

        return self._add(layer, x.dtype, shape)

    def add_plugin(self, created: Any, aot: bool) -> Layer:
        """A layer of kind ``PLUGIN``, with what its operator was called with."""
        assert aot
        name, tensors, attributes, register = created
        assert all(isinstance(v, np.ndarray) and v.shape == (1,) for v in attributes.values())
        found = register(*map(_Desc, tensors), **attributes)
        layer = Layer("PLUGIN", tensors, plugin=name, attributes={k: v[0].item() for k, v in attributes.items()})
        for output in found if isinstance(found, tuple) else (found,):
            self._output(layer, output.dtype, lambda dims=output.dims: dims)
        self._layers.append(layer)
        return layer

    def _add(self, layer: Layer, dtype: Any, shape: Callable[[], Shape]) -> Layer:
        self._output(layer, dtype, shape)
        self._layers.append(layer)
        return layer

    def _output(self, layer: Layer, dtype: Any, shape: Callable[[], Shape]) -> None:
        layer.outputs.append(Tensor(f"t{len(self._layers)}.{len(layer.outputs)}", dtype, shape))

    @staticmethod
    def _alike(*tensors: Tensor) -> None:
        kinds = {(t.dtype, len(t.shape)) for t in tensors}
        assert len(kinds) == 1, f"operands differ: {[(t.dtype.name, t.shape) for t in tensors]}"


def _broadcast(a: Shape, b: Shape) -> Shape:
    for x, y in zip(a, b, strict=True):
        assert x == y or 1 in (x, y) or -1 in (x, y), f"{a} and {b}"
    return tuple(y if x == 1 else x if y == 1 else max(x, y) for x, y in zip(a, b, strict=True))


GatherMode = _enum("GatherMode", "DEFAULT", "ELEMENT", "ND")


class _Desc:
    """``TensorDesc``; sizes that are not known are -1, which no plugin here computes outputs with."""

    def __init__(self, of: Tensor) -> None:
        self.dtype, self.shape_expr = of.dtype, of.shape
        self.ndim = len(of.shape)


class Weights:
    """A view of ``count`` numbers at an address, as an array."""

    def __new__(cls, dtype: Any, address: int, count: int) -> Any:
        kind: Any = {DataType.FLOAT: ctypes.c_float, DataType.INT32: ctypes.c_int32}[dtype]
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), (count,))


class Builder:
    """``Builder``: its plan is no plan, but says as JSON what it was told: flags that were cleared, and profiles; and
    the number under which the network is kept.
    """

    world: World

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return INetworkDefinition()

    def create_builder_config(self) -> Any:
        settings = SimpleNamespace(profiles=[], cleared=[])
        settings.clear_flag = settings.cleared.append
        settings.add_optimization_profile = settings.profiles.append
        return settings

    def create_optimization_profile(self) -> Any:
        profile = SimpleNamespace(shapes={})
        profile.set_shape = lambda name, *shapes: profile.shapes.__setitem__(name, shapes)
        return profile

    def build_serialized_network(self, definition: INetworkDefinition, settings: Any) -> bytes:
        number = len(self.world.networks)
        self.world.networks[number] = definition
        for layer in map(definition.get_layer, range(definition.num_layers)):
            if layer.kind == "CONSTANT":  # the plan holds the numbers; whose they were need not live on
                layer.weights = layer.weights.copy()  # type: ignore[attr-defined]
        told: dict[str, Any] = {"network": number, "cleared": [f.name for f in settings.cleared]}
        told["profiles"] = [p.shapes for p in settings.profiles]
        return json.dumps(told).encode()


class NetworkDefinitionCreationFlag(enum.IntEnum):
    """As TensorRT 10 has it."""

    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class _Logger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"


class _ProgressMonitor:
    pass


def _modules() -> tuple[ModuleType, ModuleType]:
    trt, plugin = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    trt.__spec__ = ModuleSpec("tensorrt", None)  # whoever asks whether there is one finds it
    world = World()
    registered = SimpleNamespace()

    def register(name: str, lazy_register: bool) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            operator = name.partition("::")[2]
            setattr(registered, operator, lambda *tensors, **arrays: (operator, tensors, arrays, function))
            return function

        return keep

    plugin.__dict__.update(
        TensorDesc=_Desc, KernelLaunchParams=type("KernelLaunchParams", (), {}), SymExprs=type("SymExprs", (), {}),
        op=SimpleNamespace(llmapi=registered), register=register, aot_impl=lambda name: lambda function: function,
        from_shape_expr=lambda shape, dtype: SimpleNamespace(dims=tuple(shape), dtype=dtype),
    )  # fmt: skip
    trt.__dict__.update(
        __version__="10.15.0", plugin=plugin, DataType=DataType, Weights=Weights, GatherMode=GatherMode,
        Builder=type("Builder", (Builder,), {"world": world}), world=world, Runtime=make_runtime(trt, world),
        ExecutionContextAllocationStrategy=_enum(
            "ExecutionContextAllocationStrategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"
        ), INetworkDefinition=INetworkDefinition, ILogger=_Logger, IProgressMonitor=_ProgressMonitor,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag, Permutation=tuple,
        BuilderFlag=_enum("BuilderFlag", "TF32"),
        ProfilingVerbosity=_enum("ProfilingVerbosity", "LAYER_NAMES_ONLY"),
        MatrixOperation=_enum("MatrixOperation", "NONE", "TRANSPOSE"),
        ReduceOperation=_enum("ReduceOperation", "SUM", "AVG", "MAX"),
        ElementWiseOperation=_enum("ElementWiseOperation", "SUM", "SUB", "PROD", "DIV", "GREATER", "LESS", "AND", "OR"),
        UnaryOperation=_enum("UnaryOperation", "SQRT", "COS", "SIN", "EXP", "NOT"),
        ActivationType=_enum("ActivationType", "SIGMOID", "RELU", "TANH", "GELU_ERF", "GELU_TANH"),
        float32=DataType.FLOAT, float16=DataType.HALF, bfloat16=DataType.BF16, int32=DataType.INT32,
        int64=DataType.INT64,
    )  # fmt: skip
    for kind in ("Cast", "Concatenation", "Constant", "ElementWise", "Gather", "MatrixMultiply", "Plugin", "Reduce",
                 "Shuffle", "Slice", "Unary"):  # fmt: skip
        setattr(trt, f"I{kind}Layer", Layer)
    trt.IActivationLayer = IActivationLayer  # type: ignore[attr-defined]
    return trt, plugin


@contextmanager
def fake_tensorrt() -> Iterator[Any]:
    """In it, ``import tensorrt`` finds the stand-in; gives the module, whose ``world`` is the stand-in's own."""
    trt, plugin = _modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", trt)
        patch.setitem(sys.modules, "tensorrt.plugin", plugin)
        yield trt
