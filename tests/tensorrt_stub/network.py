"""A network that takes plugins through the bindings' own code, for shapes with symbolic dimensions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tensorrt as trt
import tensorrt_bindings.plugin._lib as lib
import tensorrt_bindings.plugin._plugin_class as plugin_class
import tensorrt_bindings.plugin._tensor as tensor_module

Sizes = Mapping[str, int]


class Expression:
    """Takes the place of ``IDimensionExpr``: an integer that depends on the sizes of named dimensions."""

    def __init__(self, value: Callable[[Sizes], int], constant: bool) -> None:
        self.value, self._constant = value, constant

    @classmethod
    def of(cls, dim: int | str) -> Expression:
        return cls(lambda sizes: dim if isinstance(dim, int) else sizes[dim], isinstance(dim, int))

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        assert self._constant, "the value of a dimension that is not known yet was asked for"
        return self.value({})


class ExpressionBuilder:
    """Takes the place of ``IExprBuilder``."""

    def constant(self, value: int) -> Expression:
        assert -(1 << 31) <= value < 1 << 31, f"{value} is no int32"
        return Expression.of(value)

    def operation(self, kind: Any, a: Expression, b: Expression) -> Expression:
        kinds = trt.DimensionOperation
        compute = {
            kinds.SUM: lambda x, y: x + y,
            kinds.SUB: lambda x, y: x - y,
            kinds.PROD: lambda x, y: x * y,
            kinds.FLOOR_DIV: lambda x, y: x // y,
            kinds.CEIL_DIV: lambda x, y: -(-x // y),
            kinds.MAX: max,
            kinds.MIN: min,
        }[kind]
        return Expression(lambda sizes: compute(a.value(sizes), b.value(sizes)), a.is_constant() and b.is_constant())


@dataclass
class Tensor:
    """Takes the place of ``ITensor``; a dimension is a number, or the name of one that is not known yet."""

    dtype: Any
    dims: tuple[int | str, ...]
    expressions: list[Expression] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expressions = self.expressions or [Expression.of(dim) for dim in self.dims]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(e.get_constant_value() if e.is_constant() else -1 for e in self.expressions)

    def size(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(e.value(sizes) for e in self.expressions)


@dataclass
class Layer:
    """What came of a plugin."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    kernel: str
    ptx: str
    params: dict[str, Expression]
    extras: list[Expression]
    attributes: dict[str, Any]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def grid(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(self.params[f"grid_{axis}"].value(sizes) for axis in "xyz")

    def block(self) -> int:
        assert all(self.params[f"block_{axis}"].get_constant_value() == 1 for axis in "yz")
        return self.params["block_x"].get_constant_value()

    def shared(self) -> int:
        return self.params["shared_mem"].get_constant_value()

    def parameters(self) -> list[str]:
        """Types of the kernel's parameters in the PTX."""
        found = re.search(rf"\.entry\s+{re.escape(self.kernel)}\s*\((.*?)\)", self.ptx, re.DOTALL)
        assert found, f"the PTX has no entry {self.kernel}"
        return re.findall(r"\.param\s+\.(\w+)", found[1])


class _Bindings:
    """The bindings, but for what Python cannot make or what needs the library."""

    ITensor, IDimensionExpr = Tensor, Expression

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)

    def DimsExprs(self, count: int) -> list[None]:
        return [None] * count

    def get_plugin_registry(self) -> Any:
        return self

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


_BINDINGS = _Bindings()


class _Extra:
    """Takes the place of ``SymExprImpl``."""

    def __init__(self, of: Any) -> None:
        assert type(of) is tensor_module.SymInt32 or isinstance(of, tensor_module.SymInt32)
        self.expression: Expression = of._expr


@contextmanager
def _replaced() -> Iterator[None]:
    saved = [(module, module.trt) for module in (lib, plugin_class, tensor_module)]
    implementation = tensor_module.SymExprImpl
    for module, _ in saved:
        module.trt = _BINDINGS
    tensor_module.SymExprImpl = _Extra
    try:
        yield
    finally:
        for module, original in saved:
            module.trt = original
        tensor_module.SymExprImpl = implementation


class _Setter(dict[int, _Extra]):
    nbSymExprs = 0


class _Params:
    pass


class Network:
    """Takes the place of ``INetworkDefinition``.

    Args:
        sizes: of the named dimensions, as an optimization profile has them.
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.layers: list[Layer] = []

    def __enter__(self) -> Network:
        self._replaced = _replaced()
        self._replaced.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._replaced.__exit__(*reason)

    def add_plugin(self, create: Any, aot: bool) -> Layer:
        """As TensorRT does it from the network to the kernel."""
        request = trt.QuickPluginCreationRequest.STRICT_AOT if aot else trt.QuickPluginCreationRequest.STRICT_JIT
        inputs, shape_inputs, plugin = create(request)
        assert not shape_inputs and plugin.get_num_outputs() >= 1
        dtypes = plugin.get_output_data_types([t.dtype for t in inputs], [len(t.dims) for t in inputs])
        builder = ExpressionBuilder()
        shapes = plugin.get_output_shapes([t.expressions for t in inputs], [], builder)
        assert len(dtypes) == len(shapes) == plugin.get_num_outputs()
        outputs = [Tensor(d, ("?",) * len(s), list(s)) for d, s in zip(dtypes, shapes, strict=True)]
        assert all(plugin.get_aliased_input(i) == -1 for i in range(len(outputs)))
        plugin = plugin.clone()
        descs = [self._desc(t) for t in (*inputs, *outputs)]
        plugin.configure_plugin(descs[: len(inputs)], descs[len(inputs) :])
        formats = plugin.get_supported_format_combinations(descs, len(inputs))
        assert [f.type for f in formats] == [t.dtype for t in (*inputs, *outputs)]
        assert all(f.format == trt.TensorFormat.LINEAR for f in formats)
        plugin.set_tactic(0)
        params, extras = _Params(), _Setter()
        plugin.get_launch_params([t.expressions for t in inputs], descs, len(inputs), params, extras, builder)
        assert sorted(extras) == list(range(extras.nbSymExprs))
        flat = [d.desc for d in descs]
        kernel, ptx = plugin.get_kernel(flat[: len(inputs)], flat[len(inputs) :])
        layer = Layer(
            "", inputs, outputs, kernel, ptx.decode(), {n: _expression(e) for n, e in vars(params).items()},
            [extras[i].expression for i in range(len(extras))], {n: a[0] for n, a in plugin.attrs.items()},
        )  # fmt: skip
        self.layers.append(layer)
        return layer

    def _desc(self, tensor: Tensor) -> Any:
        desc = trt.DynamicPluginTensorDesc()
        size = tensor.size(self.sizes)
        desc.desc.type, desc.desc.format = tensor.dtype, trt.TensorFormat.LINEAR
        desc.desc.dims = trt.Dims(tensor.shape)
        desc.min = desc.opt = desc.max = trt.Dims(size)
        return desc


def _expression(found: Any) -> Expression:
    return found if isinstance(found, Expression) else found.expression


def network(**sizes: int) -> Network:
    """A network for ``with``."""
    return Network(**sizes)


def tensor(dtype: str, *dims: int | str) -> Tensor:
    """An input of a network.

    Args:
        dtype: such as ``"float16"``.
        dims: numbers, or names of dimensions that are not known yet.
    """
    return Tensor(getattr(trt, dtype), tuple(dims))


def tensors(dtype: str, *shapes: Sequence[int | str]) -> list[Tensor]:
    """Several of one type."""
    return [tensor(dtype, *shape) for shape in shapes]
