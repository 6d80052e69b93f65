"""Plugin: one quickly deployable plugin of full TensorRT, compiled ahead of time: the plan carries its kernel.

A plugin's kernel takes its inputs, then int32 extras, then its outputs, and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

import numpy as np
import numpy.typing as npt

from llmapi._kernels.nvrtc import Unit, compile_ptx
from llmapi.errors import BuildError

NAMESPACE = "llmapi"
MOST_SHARED = 48 << 10
"""Bytes of shared memory of a block: TensorRT asks for no more than CUDA gives without being asked."""
DTYPES = ("float32", "float16", "bfloat16")
_ARRAYS: dict[type, Any] = {int: npt.NDArray[np.int64], float: npt.NDArray[np.float64]}
"""For TensorRT, attributes are arrays of one element. Its version 10 fails at numbers with numpy 2.4, and repeats the
first element of longer arrays and texts with numpy 2."""

Dim = Any
"""An int, or TensorRT's ``ShapeExpr``, which knows ``+``, ``-``, ``*`` and ``//`` (with itself on the left)."""
Shape = Sequence[Dim]


@dataclass(frozen=True)
class Launch:
    """How a plugin's kernel is launched for shapes that may be symbolic.

    Attributes:
        unit: source and macros.
        entry: name of the kernel.
        grid: blocks in x, y, z.
        block: threads of a block.
        shared: bytes of dynamic shared memory.
        extras: int32 parameters between inputs and outputs.
    """

    unit: Unit
    entry: str
    grid: tuple[Dim, Dim, Dim]
    block: int
    shared: int
    extras: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One plugin.

    Attributes:
        name: the ``<name>`` of ``llmapi::<name>``.
        inputs: by name: the element type, ``"model"`` for the type that all inputs of that kind and all outputs share,
            one of :data:`DTYPES`; and the number of dimensions, None for any.
        attributes: types by name, int or float. Among them ``arch``, such as 80: the compute capability that the kernel
            is compiled for; newer GPUs run it, too.
        outputs: shapes of the outputs, of the shapes of inputs and the attributes.
        launch: the launch, of the model's element type, the shapes of inputs and the attributes.
        output_types: element types of the outputs, as of inputs.
    """

    name: str
    inputs: Mapping[str, tuple[str, int | None]]
    attributes: Mapping[str, type]
    outputs: Callable[[Sequence[Shape], Mapping[str, Any]], tuple[tuple[Dim, ...], ...]]
    launch: Callable[[str, Sequence[Shape], Mapping[str, Any]], Launch]
    output_types: tuple[str, ...] = ("model",)

    @property
    def id(self) -> str:
        """Name and namespace."""
        return f"{NAMESPACE}::{self.name}"

    def model_dtype(self, dtypes: Sequence[str], ranks: Sequence[int]) -> str:
        """The model's element type, once all inputs have been found to be what they must be.

        Args:
            dtypes: element type of each input, as torch calls it.
            ranks: number of dimensions of each.

        Raises:
            BuildError: one is of another type or has another number of dimensions.
        """
        model = next(d for d, (kind, _) in zip(dtypes, self.inputs.values(), strict=True) if kind == "model")
        for (name, (kind, rank)), dtype, found in zip(self.inputs.items(), dtypes, ranks, strict=True):
            allowed = (kind,) if kind != "model" else DTYPES if dtype == model else (model,)
            if dtype not in allowed:
                raise BuildError(
                    f"{name} of the plugin {self.id} is {dtype}, must be {' or '.join(allowed)}: cast it in the network"
                )
            if rank is not None and rank != found:
                raise BuildError(f"{name} of the plugin {self.id} has {found} dimensions, must have {rank}: reshape it")
        return model

    def add(self, network: Any, tensors: Sequence[Any], name: str, **attributes: int | float) -> tuple[Any, ...]:
        """Add a layer to a network.

        Args:
            network: an ``INetworkDefinition`` of full TensorRT.
            tensors: its inputs, in order.
            name: of the layer.
            attributes: all of :attr:`attributes`.

        Returns:
            The layer's outputs.

        Raises:
            BuildError: TensorRT is missing or too old, an input is not what it must be, or TensorRT refuses the layer.
        """
        trt, trtp = tensorrt()
        model = self.model_dtype([_dtype(trt, t.dtype) for t in tensors], [len(t.shape) for t in tensors])
        if model == "bfloat16" and attributes["arch"] < 80:
            raise BuildError(
                f"the plugin {self.id} in bfloat16 needs compute capability 8.0, and the plan is for "
                f"{attributes['arch'] / 10}: use dtype='float16'"
            )
        self.define()
        operator = getattr(getattr(trtp.op, NAMESPACE), self.name)
        arrays = {key: np.array([kind(attributes[key])]) for key, kind in self.attributes.items()}
        layer = network.add_plugin(operator(*tensors, **arrays), aot=True)
        if layer is None:
            raise BuildError(f"TensorRT {trt.__version__} refuses the plugin {self.id} at {name}; its log says why")
        layer.name = name
        return tuple(layer.get_output(i) for i in range(len(self.output_types)))

    def define(self) -> None:
        """Make the plugin known to the ``tensorrt`` at hand; once in a process.

        Raises:
            BuildError: TensorRT is missing or too old.
        """
        trt, trtp = tensorrt()
        if not hasattr(getattr(trtp.op, NAMESPACE, None), self.name):
            _define(self, trt, trtp)


def float_bits(value: float) -> int:
    """A float32 as the int32 that a kernel takes it from.

    >>> hex(float_bits(1.0))
    '0x3f800000'
    """
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def compute_capability(arch: str) -> int:
    """The number in an architecture's name.

    >>> compute_capability("sm_90a"), compute_capability("sm_120")
    (90, 120)
    """
    found = re.fullmatch(r"(?:sm|compute)_?(\d+)[af]?", arch)
    if found is None or int(found[1]) < 75:
        raise BuildError(f"plugins are compiled for sm_75 and newer, not for {arch!r}: name another target")
    return int(found[1])


def tensorrt() -> tuple[Any, Any]:
    """The modules ``tensorrt`` and ``tensorrt.plugin``.

    Raises:
        BuildError: TensorRT is missing or too old.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise BuildError(
            f'the plugins need TensorRT 10.13 or newer, and Python finds none ({error}): pip install "llmapi[tensorrt]"'
        ) from error
    if not hasattr(trtp, "aot_impl"):
        raise BuildError(
            f"TensorRT {trt.__version__} has no plugins that are compiled ahead of time; 10.13 has them: "
            'pip install --upgrade "llmapi[tensorrt]"'
        )
    return trt, trtp


def _dtype(trt: Any, dtype: Any) -> str:
    names = {getattr(trt, name): name for name in (*DTYPES, "int32", "int64", "int8", "bool") if hasattr(trt, name)}
    return names.get(dtype, str(dtype))


_ptx = functools.lru_cache(maxsize=64)(compile_ptx)


def _define(plugin: Plugin, trt: Any, trtp: Any) -> None:
    """Hand two functions to TensorRT: one for shapes and types, one for the kernel. It reads their signatures."""
    desc, count = trtp.TensorDesc, len(plugin.inputs)

    def checked(descs: Sequence[Any]) -> str:
        return plugin.model_dtype([_dtype(trt, d.dtype) for d in descs], [d.ndim for d in descs])

    def shapes(descs: Sequence[Any]) -> list[Shape]:
        return [[d.shape_expr[i] for i in range(d.ndim)] for d in descs]

    def numbers(arrays: Iterable[Any]) -> dict[str, int | float]:
        return {key: kind(a[0]) for (key, kind), a in zip(plugin.attributes.items(), arrays, strict=True)}

    def register(*args: Any, **arrays: Any) -> Any:
        model = checked(args)
        dims = plugin.outputs(shapes(args), numbers(arrays[key] for key in plugin.attributes))
        types = [getattr(trt, model if kind == "model" else kind) for kind in plugin.output_types]
        found = [trtp.from_shape_expr(shape, dtype) for shape, dtype in zip(dims, types, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)

    def aot_impl(*args: Any) -> Any:
        attributes = numbers(args[count:-2])
        launch = plugin.launch(checked(args[:count]), shapes(args[:count]), attributes)
        params = trtp.KernelLaunchParams()
        params.grid_x, params.grid_y, params.grid_z = launch.grid
        params.block_x, params.shared_mem = launch.block, launch.shared
        extras = trtp.SymIntExprs.from_tuple([trtp.SymInt32(extra) for extra in launch.extras])
        return launch.entry, _ptx(launch.unit, f"compute_{attributes['arch']}"), params, extras

    given = dict.fromkeys(plugin.inputs, desc) | {key: _ARRAYS[kind] for key, kind in plugin.attributes.items()}
    outputs, code = GenericAlias(tuple, (desc,) * len(plugin.output_types)), str | bytes
    _sign(register, given, desc if len(plugin.output_types) == 1 else outputs)
    kernel = GenericAlias(tuple, (code, code, trtp.KernelLaunchParams, trtp.SymExprs))
    _sign(aot_impl, {**given, "outputs": outputs, "tactic": int}, kernel)
    trtp.register(plugin.id, lazy_register=True)(register)
    trtp.aot_impl(plugin.id)(aot_impl)


def _sign(function: Any, parameters: Mapping[str, Any], returns: Any) -> None:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(signed, return_annotation=returns)
