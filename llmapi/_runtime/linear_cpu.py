"""Linear layers on the CPU: rows of weights are read as they lie for one or two tokens, repacked once for more.

A product with one or two rows is a sweep over the weights, which the plain layout serves best. For more rows oneDNN's
blocked layout is faster; with it the result of a row is the same to the bit however many rows there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_FEW_ROWS = 2


class PackedLinear:
    """``x @ weight.T + bias``.

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


def can_pack(weights_bytes: int, free_bytes: int) -> bool:
    """Whether this torch repacks weights, and a second copy of them takes no more than half of the free memory.

    Args:
        weights_bytes: of all linear weights.
        free_bytes: host memory that is free.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and 2 * weights_bytes <= free_bytes
