"""Linear layers on the GPU: the project's kernel for few rows, cuBLAS for many; which one, measurement decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from llmapi._kernels.gated_activation_cuda import gated_activation
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.norm_cuda import add_rms_norm
from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.skinny_linear_cuda import SkinnyLinear, Unscaled
from llmapi._kernels.skinny_linear_layout import SCALES, WRITES
from llmapi.config import EngineConfig

ROWS = (1, 8, 16, 32, 64, 128)
"""Numbers of rows for which linear layers are tuned; others take the choice of the next larger one."""

_FEW_ROWS = 8
_MOST_VARIANTS = (6, 3)  # of the kernel's own ranking that are measured, for few rows and for more

CUBLAS = -1
"""The choice that stands for torch's own product."""


def bucket_of(rows: int) -> int:
    """The number of :data:`ROWS` whose choice so many rows take; the largest where there are more."""
    return next((r for r in ROWS if r >= rows), ROWS[-1])


def tuned_rows(config: EngineConfig) -> tuple[int, ...]:
    """Those of :data:`ROWS` that an engine's steps can have."""
    return tuple(r for r in ROWS if r <= bucket_of(config.max_num_tokens))


class LinearChoices:
    """Which implementation to take.

    Args:
        gpu: the device.
        dtype: of weights and activations.

    Attributes:
        table: variant of the project's kernel, or :data:`CUBLAS`, by :meth:`name`.
        kernel: the project's kernel; None where it does not serve the type.
    """

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        self.gpu = gpu
        self.table: dict[str, int] = {}
        self.kernel = SkinnyLinear(gpu, dtype=dtype, max_rows=ROWS[-1]) if dtype != torch.float32 else None

    @staticmethod
    def name(rows: int, n: int, k: int, gate: str | None) -> str:
        """The name of a case in the table: rows rounded up, outputs, inputs, activation."""
        return f"{bucket_of(rows)}x{n}x{k}" + (f" {gate}" if gate else "")

    def cases(self, shapes: Iterable[tuple[str | None, int, int]], rows: tuple[int, ...]) -> list[str]:
        """Names of what is measured for these activations, outputs and inputs, sorted; nothing without a kernel."""
        if self.kernel is None:
            return []
        return sorted(
            {self.name(r, n, k, gate) for gate, n, k in shapes for r in rows if self.kernel.supports(r, n, k)}
        )

    def variant(self, rows: int, n: int, k: int, gate: str | None) -> int | None:
        """The variant of the kernel to take; None for cuBLAS."""
        if self.kernel is None or rows > ROWS[-1] or not self.kernel.supports(rows, n, k):
            return None
        found = self.table.get(self.name(rows, n, k, gate), CUBLAS)
        return None if found == CUBLAS else found

    def unit(self, rows: int, n: int, k: int, gate: str | None) -> Unit | None:
        """What a product will need compiled; None for cuBLAS."""
        variant = self.variant(rows, n, k, gate)
        return None if variant is None or self.kernel is None else self.kernel.unit(rows, n, k, gate, variant)

    def tune(self, groups: list[tuple[str | None, list[torch.Tensor]]], rows: tuple[int, ...] = ROWS) -> None:
        """Measure every case.

        Args:
            groups: fused activation and weights of linear layers of one shape.
            rows: numbers of rows to measure.
        """
        kernel = self.kernel
        if kernel is None:
            return
        cases = [
            (count, gate, weights, kernel.variants(count, *weights[0].shape)[: _MOST_VARIANTS[count > _FEW_ROWS]])
            for gate, weights in groups
            for count in rows
            if kernel.supports(count, *weights[0].shape)
        ]
        self.gpu.prefetch(
            kernel.unit(count, weights[0].shape[0], weights[0].shape[1], gate, variant)
            for count, gate, weights, variants in cases
            for variant in variants
        )
        for count, gate, weights, variants in cases:
            n, k = weights[0].shape
            self.table[self.name(count, n, k, gate)] = self._fastest(kernel, count, gate, weights, variants)

    def _fastest(
        self, kernel: SkinnyLinear, rows: int, gate: str | None, weights: list[torch.Tensor], variants: list[int]
    ) -> int:
        n, k = weights[0].shape
        x = torch.randn(rows, k, device=weights[0].device).to(weights[0].dtype)

        def product(weight: torch.Tensor) -> None:
            out = F.linear(x, weight)
            if gate is not None:
                gated_activation(self.gpu, out, gate)

        def own(variant: int) -> Callable[[torch.Tensor], None]:
            out = torch.empty(rows, n // 2 if gate else n, dtype=x.dtype, device=x.device)
            return lambda weight: kernel(out, x, weight, None, gate=gate, variant=variant)

        candidates = {CUBLAS: product} | {variant: own(variant) for variant in variants}
        times = {name: _time(call, weights) for name, call in candidates.items()}
        return min(times, key=lambda name: times[name])


def _time(call: Callable[[torch.Tensor], None], weights: list[torch.Tensor]) -> float:
    """Seconds of one call, in a graph over many weights, so that none of them is in the GPU's L2 cache."""
    for weight in weights[:2]:
        call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for weight in weights:
            call(weight)
    best = float("inf")
    for _ in range(3):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / len(weights))
    return best


class CudaLinear:
    """``x @ weight.T + bias``, or the gated activation of it.

    Args:
        choices: which implementation to take.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        gate: activation of the first half of the outputs, which then multiplies the second half.
    """

    def __init__(
        self, choices: LinearChoices, weight: torch.Tensor, bias: torch.Tensor | None, gate: str | None = None
    ) -> None:
        self._choices, self._weight, self._bias, self._gate = choices, weight, bias, gate

    def __call__(self, x: torch.Tensor | Unscaled) -> torch.Tensor:
        """``[T, in]`` to ``[T, out]``, or half as many columns with a gate."""
        values = x.rows if isinstance(x, Unscaled) else x
        rows, n = values.shape[0], self._weight.shape[0]
        variant = self._variant(rows)
        if variant is None:
            assert not isinstance(x, Unscaled), "cuBLAS was given rows that wait for their norm"
            out = F.linear(x, self._weight, self._bias)
            return out if self._gate is None else gated_activation(self._choices.gpu, out, self._gate)
        out = values.new_empty(rows, n if self._gate is None else n // 2)
        assert self._choices.kernel is not None
        self._choices.kernel(out, x, self._weight, self._bias, gate=self._gate, variant=variant)
        return out

    def can_norm(self, rows: int, norm: int) -> bool:
        """Whether for so many rows this is the project's kernel, in a variant that does a part of a norm.

        Args:
            rows: of x.
            norm: :data:`~llmapi._kernels.skinny_linear_layout.SCALES` or ``WRITES``.
        """
        variant, kernel = self._variant(rows), self._choices.kernel
        n, k = self._weight.shape
        return variant is not None and kernel is not None and kernel.norms(rows, n, k, variant, norm)

    def units(self, rows: int, norm: int) -> list[Unit]:
        """What a part of a norm will need compiled; nothing where :meth:`can_norm` says no.

        Args:
            rows, norm: as of :meth:`can_norm`.
        """
        variant, kernel = self._variant(rows), self._choices.kernel
        if not self.can_norm(rows, norm) or variant is None or kernel is None:
            return []
        n, k = self._weight.shape
        return [kernel.unit(rows, n, k, self._gate, variant, norm)]

    def before_norm(
        self, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[Unscaled, torch.Tensor]:
        """The RMSNorm of ``x @ weight.T + bias + residual``, for the layer that reads it to finish, and that sum.

        Args:
            x: ``[T, in]``; :meth:`can_norm` was asked.
            residual: ``[T, out]``.
            gain: ``[out]``, the norm's weight.
            eps: the norm's.
        """
        kernel, variant = self._choices.kernel, self._variant(x.shape[0])
        assert kernel is not None and variant is not None
        total = torch.empty_like(residual)
        unscaled = kernel.before_norm(total, x, self._weight, self._bias, residual, gain, eps, variant)
        return unscaled, total

    def _variant(self, rows: int) -> int | None:
        n, k = self._weight.shape
        return self._choices.variant(rows, n, k, self._gate) if rows else None


class NormBetween:
    """A linear layer, the sum of its result with a residual, and the RMSNorm of that, which one other layer reads.

    Where the project's kernel computes both layers, the norm takes no launch: the first layer writes what the second
    finishes.

    Args:
        gpu: the device.
        before, after: the layers.
    """

    def __init__(self, gpu: Gpu, before: CudaLinear, after: CudaLinear) -> None:
        self._gpu, self._before, self._after = gpu, before, after

    def units(self, rows: int) -> list[Unit]:
        """What so many rows will need compiled."""
        before, after = self._before.units(rows, WRITES), self._after.units(rows, SCALES)
        return before + after if before and after else []

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor | Unscaled, torch.Tensor]:
        """What ``after`` reads, and the sum.

        Args:
            x: what ``before`` reads, ``[T, in]``.
            residual: ``[T, out]``.
            gain: ``[out]``, the norm's weight.
            eps: the norm's.
        """
        rows = x.shape[0]
        if self._before.can_norm(rows, WRITES) and self._after.can_norm(rows, SCALES):
            return self._before.before_norm(x, residual, gain, eps)
        return add_rms_norm(self._gpu, self._before(x), residual, gain, eps)
