"""Linear layers on the CPU: rows of weights are read as they lie for one or two tokens, repacked once for more.

A product with one or two rows is a sweep over the weights, which the plain layout serves best. For more rows oneDNN's
blocked layout is faster. Either way the result of a row is the same to the bit however many rows there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmapi._kernels.native import NativeKernels

_FEW_ROWS = 2
_NATIVE_ROWS = 32  # from here on torch's product of plain weights is as fast as the compiled sweep


class CpuLinear:
    """``x @ weight.T + bias``.

    Args:
        weight: ``[out, in]``, float32 or bfloat16; kept, not copied, until more than two rows come.
        bias: ``[out]`` or None.
        kernels: compiled kernels for float32, or None.
        pack: whether the weight may be repacked, which takes as much memory again.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: NativeKernels | None, *, pack: bool
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._kernels = kernels if weight.dtype == torch.float32 and weight.is_contiguous() else None
        self._pack = pack
        self._packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, in]`` to ``[T, out]``."""
        rows = x.shape[0]
        if self._pack and rows > _FEW_ROWS:
            if self._packed is None:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
            return out
        if self._kernels is None or rows > _NATIVE_ROWS:
            return F.linear(x, self._weight, self._bias)
        return self._sweep(self._kernels, x.contiguous())

    def _sweep(self, kernels: NativeKernels, x: torch.Tensor) -> torch.Tensor:
        (rows, size), width = x.shape, self._weight.shape[0]
        out = torch.empty(rows, width)
        bias = None if self._bias is None else self._bias.data_ptr()
        threads = torch.get_num_threads()
        kernels.linear(x.data_ptr(), self._weight.data_ptr(), bias, out.data_ptr(), rows, size, width, threads)
        return out


def can_pack(weights_bytes: int, free_bytes: int) -> bool:
    """Whether this torch repacks weights, and a second copy of them takes no more than half of the free memory.

    Args:
        weights_bytes: of all linear weights.
        free_bytes: host memory that is free.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and 2 * weights_bytes <= free_bytes
