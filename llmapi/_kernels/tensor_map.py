"""TensorMap: a matrix as Hopper's bulk tensor copies see it (``CUtensorMap``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from llmapi.errors import BuildError


class TensorMap:
    """A matrix of 16-bit elements as the bulk copies see it: 128-byte swizzle, zeros outside.

    Args:
        of: the tensor that begins at the first element.
        sides: lengths, the fastest first.
        steps: bytes between neighbours in the second dimension and up.
        box: lengths of what one copy moves.

    Attributes:
        address: of the 128 bytes that a kernel takes by value.

    Raises:
        BuildError: the driver refuses.
    """

    def __init__(self, of: torch.Tensor, sides: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]) -> None:
        from cuda.bindings import driver

        rank = len(sides)
        self._memory = ctypes.create_string_buffer(128 + 64)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64  # the driver wants 64-byte alignment
        kinds = driver.CUtensorMapDataType
        half = of.dtype == torch.float16
        kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        error = _encoder()(
            self.address,
            int(kind),
            rank,
            of.data_ptr(),
            (ctypes.c_uint64 * rank)(*sides),
            (ctypes.c_uint64 * (rank - 1))(*steps),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
            int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
            int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
            int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        )
        if error:
            raise BuildError(f"CUDA refused a tensor map (sides {sides}, steps {steps}, box {box}): error {error}")


def _encoder() -> Any:
    """``cuTensorMapEncodeTiled``, called through ctypes: it wants its result in memory that is aligned."""
    from cuda.bindings import driver

    error, address, _ = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, 0)
    if int(error) != 0 or not address:
        raise BuildError(f"the GPU driver has no cuTensorMapEncodeTiled ({error}); CUDA 12.0 or newer is needed")
    p, i = ctypes.c_void_p, ctypes.c_uint32
    return ctypes.CFUNCTYPE(ctypes.c_int, p, i, i, p, p, p, p, p, i, i, i, i)(int(address))
