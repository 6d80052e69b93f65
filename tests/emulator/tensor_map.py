"""EmulatedTensorMap: takes the place of :class:`llmapi._kernels.tensor_map.TensorMap`, with tensors on the CPU."""

from __future__ import annotations

import ctypes
import struct

import torch

BYTES = 128


class EmulatedTensorMap:
    """A matrix as ``include/skinny_linear.cuh`` sees it; arguments and attributes as of the real one.

    Attributes:
        tensor: what it is of. :meth:`bytes_at` puts another address of the same memory into the map.
    """

    made: dict[int, EmulatedTensorMap] = {}  # noqa: RUF012
    """All, by their addresses: a kernel is given no more."""

    def __init__(self, of: torch.Tensor, sides: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]) -> None:
        assert len(sides) == len(box) == len(steps) + 1 and len(sides) in (2, 4)
        assert all(step % 16 == 0 for step in steps) and of.data_ptr() % 16 == 0, "CUDA would refuse this map"
        assert box[0] == 64 and all(0 < side <= 256 for side in box), "CUDA would refuse this box"
        self.tensor, self._sides, self._steps, self._box = of, sides, steps, box
        self._memory = ctypes.create_string_buffer(BYTES)
        self.address = ctypes.addressof(self._memory)
        self.made[self.address] = self

    def bytes_at(self, base: int) -> bytes:
        """The 128 bytes, where the first element lies at ``base``."""
        pad = [0] * (4 - len(self._sides))
        words = (len(self._sides), *self._sides, *pad, *self._box, *pad, *[0] * 15)
        return struct.pack("<4Q24I", base, *self._steps, *pad, *words)
