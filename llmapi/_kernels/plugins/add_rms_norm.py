"""A plugin for the residual add with the RMSNorm after it; both of its results leave one kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit
from llmapi._kernels.plugins.plugin import Dim, Launch, Plugin, Shape, compute_capability, float_bits
from llmapi.errors import BuildError


def add_add_rms_norm(
    network: Any, x: Any, residual: Any, weight: Any, *, eps: float, arch: str, name: str
) -> tuple[Any, Any]:
    """Add :func:`llmapi._kernels.norm.add_rms_norm` to a network of full TensorRT.

    Args:
        network: an ``INetworkDefinition``.
        x, residual: ``[T, width]``, in the model's type.
        weight: ``[width]``, of the same type.
        eps: what is added to the mean square.
        arch: what the kernel is compiled for, such as ``"sm_89"``; newer GPUs run it, too.
        name: of the layer.

    Returns:
        The normed sum, and the sum.

    Raises:
        BuildError: TensorRT is missing or too old, or an input is not what it must be.
    """
    width = weight.shape[0] if len(weight.shape) == 1 else -1
    if width < 1:
        raise BuildError(f"the weight of {name} has the shape {tuple(weight.shape)}; its width must be constant")
    tensors = (x, residual, weight)
    attributes = {"width": width, "eps": float(eps), "arch": compute_capability(arch)}
    out, total = ADD_RMS_NORM.add(network, tensors, name, **attributes)
    return out, total


def units(dtype: str) -> list[Unit]:
    """The one specialization for an element type."""
    return [Unit.of("plugin_add_rms_norm.cu", LLM_DTYPE=DTYPE_MACRO[dtype])]


def _launch(dtype: str, shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    width = attributes["width"]
    accesses = -(-width // (4 if dtype == "float32" else 8))
    return Launch(
        unit=units(dtype)[0],
        entry="plugin_add_rms_norm",
        grid=(shapes[0][0], 1, 1),
        block=min(1024, max(32, accesses + 31 & ~31)),
        shared=0,
        extras=(width, float_bits(attributes["eps"])),
    )


def _outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[tuple[Dim, ...], ...]:
    return (tuple(shapes[0]), tuple(shapes[0]))


ADD_RMS_NORM = Plugin(
    name="add_rms_norm",
    inputs={"x": ("model", 2), "residual": ("model", 2), "weight": ("model", 1)},
    attributes={"width": int, "eps": float, "arch": int},
    outputs=_outputs,
    launch=_launch,
    output_types=("model", "model"),
)
