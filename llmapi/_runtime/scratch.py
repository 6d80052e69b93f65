"""Scratch: rows of float32 on the GPU for edited logits, one memory for all steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Scratch:
    """Memory that grows to the most rows that were asked for.

    Args:
        width: numbers in a row.
        device: where.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width, self._device = width, device
        self._memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """GPU memory held."""
        return 0 if self._memory is None else self._memory.nbytes

    def rows(self, count: int) -> npt.NDArray[np.uint64]:
        """Addresses of so many rows, at least one, valid until more are asked for."""
        if self._memory is None or len(self._memory) < count:
            self._memory = None
            size = 1 << (count - 1).bit_length()
            self._memory = torch.empty(size, self._width, dtype=torch.float32, device=self._device)
        step = 4 * self._width
        return np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(self._memory.data_ptr())
