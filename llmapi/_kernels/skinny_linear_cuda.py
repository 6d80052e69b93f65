"""Launches ``csrc/skinny_linear.cu``: products of a few rows with a weight, bound by the rate of reading weights."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from llmapi._kernels.gpu import Gpu, Kernel
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit
from llmapi.errors import BuildError

BUCKETS = (8, 16, 24, 32, 48, 64)
"""Numbers of rows that there is code for; fewer rows take the next."""

GATES = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
"""``LLM_GATE`` by name of the activation."""

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MOST_TILES = 1 << 15
_BULK, _COPY = "ttplpplppiiii", "pplplpplppiiii"


class Variant(NamedTuple):
    """A configuration of the kernel. :attr:`code` is the number that tuning tables keep.

    Attributes:
        groups: warpgroups of a block, 64 weight rows each; 0 is one warpgroup that copies with ``cp.async``, which runs
            on any GPU, the others use the bulk copies of compute capability 9.0.
        boxes: depth of a stage in 64 columns.
        stages: of the ring in shared memory.
        ahead: stages prefetched into the L2 cache beyond the ring.
    """

    groups: int
    boxes: int
    stages: int
    ahead: int = 0

    @property
    def code(self) -> int:
        """Decimal digits ``groups boxes stages stages ahead``.

        >>> Variant(1, 2, 6, 3).code
        12063
        """
        return self.groups * 10000 + self.boxes * 1000 + self.stages * 10 + self.ahead

    @classmethod
    def of(cls, code: int) -> Variant:
        """From :attr:`code`.

        >>> Variant.of(12063)
        Variant(groups=1, boxes=2, stages=6, ahead=3)
        """
        return cls(code // 10000, code // 1000 % 10, code // 10 % 100, code % 10)

    @property
    def tile(self) -> int:
        """Weight rows of a tile."""
        return 64 * max(1, self.groups)

    def shared(self, bucket: int) -> int:
        """Bytes of dynamic shared memory, alignment included.

        Args:
            bucket: one of :data:`BUCKETS`.
        """
        return self.stages * self.boxes * (self.tile + bucket) * 128 + 1024

    def unit(self, dtype: str, bucket: int, gate: int) -> Unit:
        """What to compile.

        Args:
            dtype: ``"float16"`` or ``"bfloat16"``.
            bucket: one of :data:`BUCKETS`.
            gate: a value of :data:`GATES`.
        """
        return Unit.of(
            "skinny_linear.cu",
            LLM_DTYPE=DTYPE_MACRO[dtype],
            LLM_ROWS=bucket,
            LLM_BULK=int(self.groups > 0),
            LLM_GROUPS=max(1, self.groups),
            LLM_BOXES=self.boxes,
            LLM_STAGES=self.stages,
            LLM_AHEAD=self.ahead,
            LLM_GATE=gate,
        )


def units(dtype: str) -> list[Unit]:
    """Specializations that together reach all of the source.

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``.
    """
    some = [
        (Variant(0, 1, 3), 8, 1),
        (Variant(0, 1, 2), 64, 0),
        (Variant(1, 2, 5, 2), 8, 0),
        (Variant(2, 1, 5, 2), 16, 2),
        (Variant(1, 2, 4), 24, 3),
        (Variant(2, 1, 4), 32, 4),
        (Variant(2, 1, 4), 48, 0),
        (Variant(2, 1, 4), 64, 1),
    ]
    return [variant.unit(dtype, bucket, gate) for variant, bucket, gate in some]


class SkinnyLinear:
    """``x @ weight^T`` for at most 64 rows, with bias, residual or gated activation in the same launch.

    Sums are taken in float32 in an order that depends on the weight's shape and the variant alone: a row comes out the
    same, bit for bit, whatever rows are beside it, as long as the variant is the same.

    Calls share one workspace: those of one object must be in one stream's order.

    Args:
        gpu: where to run.
        dtype: ``torch.float16`` or ``torch.bfloat16``, of weights and activations.
        max_rows: largest number of rows of a call, at most 64.

    Raises:
        ValueError: an argument outside these limits.
    """

    def __init__(self, gpu: Gpu, *, dtype: torch.dtype, max_rows: int = 64) -> None:
        if dtype not in _NAMES:
            raise ValueError(f"dtype is {dtype}; skinny products take torch.float16 or torch.bfloat16")
        if not 1 <= max_rows <= BUCKETS[-1]:
            raise ValueError(f"max_rows is {max_rows}; skinny products take 1 to {BUCKETS[-1]} rows")
        self._gpu = gpu
        self._dtype = dtype
        self._max_rows = max_rows
        self._bulk = gpu.capability >= (9, 0)
        # Two partial tiles of each block, 64 or 128 weight rows; twice the blocks where tiles have 64.
        floats = 2 * 2 * gpu.sms * 64 * bucket_of(max_rows)
        self._workspace = torch.empty(floats, dtype=torch.float32, device=gpu.device)
        self._counters = torch.zeros(_MOST_TILES, dtype=torch.int32, device=gpu.device)
        self._kernels: dict[tuple[int, int, int], Kernel] = {}
        self._maps: dict[tuple[int, ...], _TensorMap] = {}

    def supports(self, rows: int, n: int, k: int) -> bool:
        """Whether a product can be asked for.

        Args:
            rows: of x.
            n: rows of the weight; with a gate those of gate and up together.
            k: columns of the weight.
        """
        units = -(-n // 64) * -(-k // 64)
        return 1 <= rows <= self._max_rows and n >= 8 and n % 8 == 0 and k >= 8 and k % 8 == 0 and units < 1 << 30

    def variants(self, rows: int, n: int, k: int) -> list[int]:
        """Configurations worth timing for a shape, the default first; :class:`Variant` says what the numbers mean.

        Args:
            rows, n, k: see :meth:`supports`.
        """
        bucket = bucket_of(rows)
        if self._bulk:
            some = [Variant(g, b, s, a) for g, b, s, a in _bulk_configurations(bucket)]
        else:
            some = []
        some.append(self._copy_variant(bucket))
        return [variant.code for variant in some if variant.shared(bucket) <= self._gpu.shared_memory]

    def _copy_variant(self, bucket: int) -> Variant:
        """As many stages, at most eight, as leave room for a second block."""
        half = (self._gpu.shared_memory - 1024) // 2
        return Variant(0, 1, max(2, min(8, (half - 1024) // ((64 + bucket) * 128))))

    def __call__(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        residual: torch.Tensor | None = None,
        gate: str | None = None,
        variant: int | None = None,
    ) -> None:
        """Write ``x @ weight^T + bias + residual`` or ``act(x @ gate^T) * (x @ up^T) + residual`` to ``out``.

        Args:
            out: ``[M, N]``, or ``[M, N / 2]`` with a gate; rows may lie apart.
            x: ``[M, K]``, M at most ``max_rows``; 16-byte aligned rows that may lie apart.
            weight: ``[N, K]``, contiguous; with a gate all its rows, then all those of up. N and K are multiples of 8
                (N / 2 with a gate).
            bias: ``[N]``.
            residual: shaped like ``out``, which it may be.
            gate: activation of the gate: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
            variant: one of :meth:`variants`; None takes the first.

        Raises:
            ValueError: a shape, stride or alignment outside these limits.
        """
        rows, depth = x.shape
        n = weight.shape[0]
        columns = n // 2 if gate else n
        self._check(out, x, weight, residual, columns)
        bucket = bucket_of(rows)
        chosen = Variant.of(self.variants(rows, n, depth)[0] if variant is None else variant)
        kernel = self._kernel(chosen, bucket, GATES[gate])
        tiles = -(-n // chosen.tile)
        stages = tiles * -(-depth // (64 * chosen.boxes))
        blocks = max(1, min(self._gpu.sms * (1 if chosen.groups else 2), stages // 2))
        shared = chosen.shared(bucket)
        residual_stride = residual.stride(0) if residual is not None else 0
        tail = (out, out.stride(0), bias, residual, residual_stride, self._workspace, self._counters)
        sizes = (rows, columns, tiles, depth)
        if chosen.groups:
            maps = self._map_of_weight(weight, chosen.tile, gate is not None), self._map_of_x(x, bucket)
            kernel((blocks, 1, 1), chosen.groups * 128 + 32, *maps, *tail, *sizes, shared=shared)
        else:
            kernel((blocks, 1, 1), 128, weight, x, x.stride(0), *tail, *sizes, shared=shared)

    def _check(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, columns: int
    ) -> None:
        (rows, depth), n = x.shape, weight.shape[0]
        if not self.supports(rows, n, depth) or columns % 8:
            raise ValueError(
                f"x {tuple(x.shape)} times weight {tuple(weight.shape)}^T: skinny products take 1 to {self._max_rows} "
                "rows, and multiples of 8 for the sides of the weight (of gate and of up): use torch's linear"
            )
        if weight.shape[1] != depth or not weight.is_contiguous():
            raise ValueError(f"weight is {tuple(weight.shape)}; it must be contiguous with {depth} columns, as x has")
        if x.stride(1) != 1 or (rows > 1 and x.stride(0) % 8) or x.data_ptr() % 16 or weight.data_ptr() % 16:
            raise ValueError(
                f"rows of x (strides {x.stride()}) and the weight must be aligned to 16 bytes, elements side by side"
            )
        for tensor in (out, residual):
            if tensor is not None and (tensor.shape != (rows, columns) or tensor.stride(1) != 1):
                raise ValueError(
                    f"out and residual must be ({rows}, {columns}) with elements side by side, not "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()}"
                )
        for tensor in (out, x, weight, residual):
            if tensor is not None and tensor.dtype != self._dtype:
                raise ValueError(f"a tensor is {tensor.dtype}; this object was made for {self._dtype}")

    def _kernel(self, variant: Variant, bucket: int, gate: int) -> Kernel:
        key = variant.code, bucket, gate
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._gpu.kernel(
                variant.unit(_NAMES[self._dtype], bucket, gate),
                "skinny_linear_bulk" if variant.groups else "skinny_linear_copy",
                _BULK if variant.groups else _COPY,
                shared=variant.shared(bucket),
                overlap=True,
            )
        return found

    def _map_of_weight(self, weight: torch.Tensor, tile: int, gated: bool) -> int:
        n, k = weight.shape
        key = (0, weight.data_ptr(), n, k, tile, int(gated))
        found = self._maps.get(key)
        if found is None:
            if gated:
                found = _TensorMap(weight, (k, 8, 2, n // 16), (2 * k, n * k, 16 * k), (64, 8, 2, tile // 16))
            else:
                found = _TensorMap(weight, (k, n), (2 * k,), (64, tile))
            self._keep(key, found)
        return found.address

    def _map_of_x(self, x: torch.Tensor, bucket: int) -> int:
        rows, k = x.shape
        key = (1, x.data_ptr(), rows, k, x.stride(0), bucket)
        found = self._maps.get(key)
        if found is None:
            found = _TensorMap(x, (k, rows), (2 * x.stride(0) if rows > 1 else 2 * k,), (64, bucket))
            self._keep(key, found)
        return found.address

    def _keep(self, key: tuple[int, ...], map_: _TensorMap) -> None:
        """A map says where a matrix lies and how it is cut, so that it stays true when memory is used again."""
        if len(self._maps) >= 1 << 14:
            self._maps.clear()
        self._maps[key] = map_


def bucket_of(rows: int) -> int:
    """The number of :data:`BUCKETS` whose code takes so many rows."""
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def _bulk_configurations(bucket: int) -> list[tuple[int, int, int, int]]:
    """``(groups, boxes, stages, ahead)``, the default first."""
    if bucket <= 16:
        return [(1, 2, 5, 0), (1, 2, 5, 4), (2, 1, 5, 0), (2, 1, 5, 4), (2, 2, 6, 0)]
    return [(2, 1, 4, 0), (2, 1, 4, 4), (1, 1, 7, 0), (1, 1, 7, 4), (2, 2, 4, 0)]


class _TensorMap:
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
