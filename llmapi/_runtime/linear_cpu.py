"""Linear layers on the CPU: weights are repacked once for fast products.

With compiled kernels they lie in panels that serve any number of rows, and a row's result is the same to the bit
whatever rows it is with. Without kernels oneDNN's blocked layout serves three rows and more, of which the same holds;
one or two rows read the weights as they lie.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmapi._kernels.native import NativeKernels

_FEW_ROWS = 2


class PackedLinear:
    """``x @ weight.T + bias`` with torch's oneDNN.

    Args:
        weight: ``[out, in]``, float32 or bfloat16; kept, not copied, until more than two rows come.
        bias: ``[out]`` or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, in]`` to ``[T, out]``."""
        if x.shape[0] <= _FEW_ROWS:
            return F.linear(x, self._weight, self._bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


class NativeLinear:
    """``x @ weight.T + bias`` with compiled kernels.

    Args:
        weight: ``[out, in]`` float32; copied.
        bias: ``[out]`` or None.
        kernels: the compiled kernels.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: NativeKernels) -> None:
        self._out, self._in = weight.shape
        self._bias = bias
        self._kernels = kernels
        weight = weight.contiguous()
        self._panels = torch.empty(kernels.packed_size(self._in, self._out), dtype=torch.float32)
        threads = torch.get_num_threads()
        kernels.pack_linear(weight.data_ptr(), self._panels.data_ptr(), self._in, self._out, threads)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, in]`` to ``[T, out]``."""
        x, rows = x.contiguous(), x.shape[0]
        out = torch.empty(rows, self._out)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._kernels.linear(
            x.data_ptr(), self._panels.data_ptr(), bias, out.data_ptr(),
            rows, self._in, self._out, torch.get_num_threads(),
        )  # fmt: skip
        return out


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, kernels: NativeKernels | None, *, pack: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest product there is for a weight.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        kernels: compiled kernels, or None.
        pack: whether the weight may be repacked, which takes as much memory again.
    """
    if not pack:
        return lambda x: F.linear(x, weight, bias)
    if kernels is not None and weight.dtype == torch.float32:
        return NativeLinear(weight, bias, kernels)
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight, bias)  # oneDNN repacks it for AVX-512 and the like alone
    return PackedLinear(weight, bias)


def can_pack(weights_bytes: int, free_bytes: int) -> bool:
    """Whether this torch repacks weights, and a second copy of them takes no more than half of the free memory.

    Args:
        weights_bytes: of all linear weights.
        free_bytes: host memory that is free.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and 2 * weights_bytes <= free_bytes
