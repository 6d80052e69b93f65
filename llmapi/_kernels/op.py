"""Op: the record of one operator. Everything about it lives in its module; everything else reads the record.

A record registers ``torch.ops.llmapi.<name>`` with its reference as the kernel, so graphs export, trace and run
anywhere. Engines do not call through torch's dispatcher: they bind :attr:`Op.cpu` (or a GPU launch) once at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("llmapi", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, made from a seed.

    Attributes:
        label: what this sample exercises.
        args: positional arguments, tensors on the CPU.
    """

    label: str
    args: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator.

    Attributes:
        name: ``torch.ops.llmapi.<name>``.
        schema: torch schema without the name, e.g. ``"(Tensor x) -> Tensor"``.
        shape: rule for result shapes and dtypes on meta tensors.
        reference: plain torch, written for clarity in float32 or better: the oracle.
        cpu: the CPU implementation, called as ``cpu(*args, plan=...)`` where :attr:`reads_plan`, else ``cpu(*args)``;
            None binds the reference.
        cuda: the launch on a GPU, called as ``cuda(gpu, *args)``; None where an engine binds the operator itself.
        tensorrt: the lowering to native TensorRT layers, called as ``tensorrt(network, *args)`` with the
            :class:`~llmapi._kernels.tensorrt_network.Network`; None where there is none.
        native: the compiled CPU implementation for float32, called as ``native(kernels, *args)`` with the
            :class:`~llmapi._kernels.native.NativeKernels`, and ``plan=...`` where :attr:`reads_plan`; what it does not
            cover it hands on to ``cpu``. None binds ``cpu``.
        reads_plan: whether ``cpu`` (and ``native``) takes the step's :class:`~llmapi._kernels.plan.StepPlanCPU`.
        samples: seeded inputs that together exercise every argument, in a dtype.
        tolerance: largest relative error (L2 norm) of an implementation, by dtype.
        reason: why that tolerance.
        mutates: positions of arguments that are written.
    """

    name: str
    schema: str
    shape: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.Generator, torch.dtype], Iterator[Sample]]
    tolerance: Mapping[torch.dtype, float]
    reason: str
    cpu: Callable[..., Any] | None = None
    cuda: Callable[..., Any] | None = None
    tensorrt: Callable[..., Any] | None = None
    native: Callable[..., Any] | None = None
    reads_plan: bool = False
    mutates: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        _LIBRARY.define(self.name + self.schema)
        _LIBRARY.impl(self.name, self.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmapi::{self.name}", self.shape, lib=_LIBRARY)

    @property
    def target(self) -> str:
        """The name under which graphs call it."""
        return f"llmapi.{self.name}.default"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|`` in the L2 norm, in float64; infinite where ``actual`` has a NaN.

    Args:
        actual, expected: tensors of one shape.
    """
    a, e = actual.detach().double(), expected.detach().double()
    if not torch.isfinite(a).all():
        return float("inf")
    return float((a - e).norm() / e.norm().clamp_min(1e-30))
