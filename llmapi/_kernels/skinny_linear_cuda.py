"""Launches ``csrc/skinny_linear*.cu``: products of a few rows with a weight, bound by the rate of reading weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmapi._kernels.gpu import Gpu, Kernel
from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.skinny_linear_layout import BUCKETS, GATES, SCALES, WRITES, Layout, Variant, bucket_of
from llmapi._kernels.tensor_map import TensorMap

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MOST_TILES = 1 << 15
_BULK, _COPY = "ttplppliiiiiipppif", "pplplpplppiiii"


def units(dtype: str) -> list[Unit]:
    """Specializations that together reach all of the source.

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``; there are none for others.
    """
    if dtype not in _NAMES.values():
        return []
    some = [
        (Variant(0, 1), 8, 4096, 1),
        (Variant(0, 1), 64, 4096, 0),
        (Variant(1, 8), 8, 4096, 0),
        (Variant(1, 2), 16, 12288, 2),
        (Variant(2, 2), 24, 4096, 3),
        (Variant(2, 1), 32, 12288, 4),
        (Variant(2, 4), 48, 4096, 0),
        (Variant(1, 1), 64, 28672, 1),
        (Variant(2, 1), 96, 12288, 0),
        (Variant(1, 1), 128, 12288, 2),
        (Variant(0, 1), 128, 4096, 1),
    ]
    normed = [
        (Variant(2, 4), 8, 4096, 0, WRITES),
        (Variant(1, 2), 64, 12288, 0, SCALES),
        (Variant(1, 1), 128, 28672, 1, SCALES),
    ]
    layouts = [
        (Layout.of(v, rows, n, 4096, sms=132, shared_memory=227 << 10, norm=norm), gate)
        for v, rows, n, gate, norm in [*((*one, 0) for one in some), *normed]
    ]
    return [layout.unit(dtype, gate) for layout, gate in layouts if layout is not None]


@dataclass(frozen=True, slots=True)
class Unscaled:
    """Rows of an RMSNorm that the product which reads them is to finish: see :meth:`SkinnyLinear.before_norm`.

    Attributes:
        rows: ``[M, K]``, the sum times the norm's weight.
        squares: ``[parts, M rounded up]`` float32, shares of the sum of squares of each row.
        eps: the norm's.
    """

    rows: torch.Tensor
    squares: torch.Tensor
    eps: float


class SkinnyLinear:
    """``x @ weight^T`` for at most 128 rows, with bias, residual or gated activation in the same launch.

    Sums are taken in float32 in an order that depends on the weight's shape and the variant alone: a row comes out the
    same, bit for bit, whatever rows are beside it, as long as the variant is the same.

    Calls share one workspace: those of one object must be in one stream's order.

    Args:
        gpu: where to run.
        dtype: ``torch.float16`` or ``torch.bfloat16``, of weights and activations.
        max_rows: largest number of rows of a call, at most 128.

    Raises:
        ValueError: an argument outside these limits.
    """

    def __init__(self, gpu: Gpu, *, dtype: torch.dtype, max_rows: int = BUCKETS[-1]) -> None:
        if dtype not in _NAMES:
            raise ValueError(f"dtype is {dtype}; skinny products take torch.float16 or torch.bfloat16")
        if not 1 <= max_rows <= BUCKETS[-1]:
            raise ValueError(f"max_rows is {max_rows}; skinny products take 1 to {BUCKETS[-1]} rows")
        self._gpu = gpu
        self._dtype = dtype
        self._max_rows = max_rows
        self._bulk = gpu.capability >= (9, 0)
        # Two partial tiles of 64 weight rows for each of two blocks a multiprocessor.
        floats = 2 * 2 * gpu.sms * 64 * bucket_of(max_rows)
        self._workspace = torch.empty(floats, dtype=torch.float32, device=gpu.device)
        self._counters = torch.zeros(_MOST_TILES, dtype=torch.int32, device=gpu.device)
        self._launches: dict[tuple[int, int, int, int, int, int], tuple[Layout, Kernel]] = {}
        self._maps: dict[tuple[int, ...], TensorMap] = {}

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
        copied = self.layout(Variant(0, 1), rows, n, k)
        assert copied is not None
        found = [
            layout
            for coarse in (0, 1)
            for cluster in ((1, 2) if self._bulk else ())
            for boxes in (8, 4, 2, 1)
            if (layout := self.layout(Variant(cluster, boxes, coarse), rows, n, k))
        ]
        found = [layout for layout in found if layout.stages >= 3] or found

        def rank(layout: Layout) -> tuple[bool, bool, bool, bool, int]:
            cluster, boxes, _ = layout.variant
            # Blocks of few rows would read x too often, and spend too long between one short tile and the next.
            shares = layout.tile_rows // cluster <= 96
            ragged = layout.tile_rows % 16 != 0 and layout.tile_rows >= 64
            large = boxes * layout.tile_rows * 128 > 34 << 10
            return (cluster == 2) != shares, ragged, layout.stages < 4, large, -boxes

        return [layout.variant.code for layout in [*sorted(found, key=rank), copied]]

    def layout(self, variant: Variant, rows: int, n: int, k: int, norm: int = 0) -> Layout | None:
        """How a variant is laid out on this GPU; None where it does not go with the shape.

        Args:
            variant: the configuration.
            rows, n, k: see :meth:`supports`.
            norm: see :attr:`Layout.norm`.
        """
        if variant.cluster and not self._bulk:
            return None
        return Layout.of(variant, rows, n, k, sms=self._gpu.sms, shared_memory=self._gpu.shared_memory, norm=norm)

    def norms(self, rows: int, n: int, k: int, variant: int, norm: int) -> bool:
        """Whether a variant can do its part of a norm.

        Args:
            rows, n, k: see :meth:`supports`.
            variant: one of :meth:`variants`.
            norm: :data:`SCALES` or :data:`WRITES`. In float16 neither is done: a sum times the norm's weight may be
                larger than its largest number.
        """
        return self._dtype != torch.float16 and self.layout(Variant.of(variant), rows, n, k, norm) is not None

    def unit(self, rows: int, n: int, k: int, gate: str | None, variant: int, norm: int = 0) -> Unit:
        """What a call will need compiled.

        Args:
            rows, n, k: see :meth:`supports`.
            gate: as of the call.
            variant: one of :meth:`variants`.
            norm: see :attr:`Layout.norm`.
        """
        layout = self.layout(Variant.of(variant), rows, n, k, norm)
        assert layout is not None, "not a variant of this shape"
        return layout.unit(_NAMES[self._dtype], GATES[gate])

    def __call__(
        self,
        out: torch.Tensor,
        x: torch.Tensor | Unscaled,
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
            x: ``[M, K]``, M at most ``max_rows``; 16-byte aligned rows that may lie apart. Or what
                :meth:`before_norm` returned, where the variant :meth:`norms`.
            weight: ``[N, K]``, contiguous; with a gate all its rows, then all those of up. N and K are multiples of 8
                (N / 2 with a gate).
            bias: ``[N]``.
            residual: shaped like ``out``, which it may be.
            gate: activation of the gate: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
            variant: one of :meth:`variants`; None takes the first.

        Raises:
            ValueError: a shape, stride or alignment outside these limits.
        """
        if isinstance(x, Unscaled):
            self._run(out, x.rows, weight, bias, residual, gate, variant, SCALES, (None, None, x.squares), x.eps)
        else:
            self._run(out, x, weight, bias, residual, gate, variant)

    def before_norm(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        variant: int,
    ) -> Unscaled:
        """Write ``x @ weight^T + bias + residual`` to ``out``, and give its RMSNorm to the product that reads it.

        ``norm(h) @ w^T`` is ``(h * gain) @ w^T`` times ``1 / rms(h)`` of each row, so that the norm takes no launch.

        Args:
            out, x, weight, bias, residual: as of a call.
            gain: ``[N]``, the norm's weight.
            eps: the norm's.
            variant: one that :meth:`norms`.
        """
        (rows, k), n = x.shape, weight.shape[0]
        layout = self.layout(Variant.of(variant), rows, n, k, WRITES)
        assert layout is not None, "a variant that does not write what a norm needs"
        scaled = torch.empty(rows, n, dtype=out.dtype, device=out.device)
        parts = layout.tiles * layout.variant.cluster
        squares = torch.empty(parts, layout.bucket, dtype=torch.float32, device=out.device)
        self._run(out, x, weight, bias, residual, None, variant, WRITES, (gain, scaled, squares), eps)
        return Unscaled(scaled, squares, eps)

    def _run(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        gate: str | None,
        variant: int | None,
        norm: int = 0,
        of_norm: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
        eps: float = 0.0,
    ) -> None:
        rows, depth = x.shape
        n = weight.shape[0]
        columns = n // 2 if gate else n
        self._check(out, x, weight, residual, columns)
        layout, kernel = self._launch(variant, rows, n, depth, GATES[gate], norm)
        residual_stride = residual.stride(0) if residual is not None else 0
        y = (out, out.stride(0), bias, residual, residual_stride)
        sizes = (rows, columns, depth, layout.tiles)
        grid = (layout.blocks, 1, 1)
        if layout.variant.cluster:
            maps = self._map_of_weight(weight, layout.tile_rows, gate is not None), self._map_of_x(x, layout.bucket)
            of_bulk = (layout.tile_rows, layout.stages, *of_norm, of_norm[2].shape[0] if of_norm[2] is not None else 0)
            kernel(grid, layout.threads, *maps, *y, *sizes, *of_bulk, eps, shared=layout.shared)
        else:
            buffers = (self._workspace, self._counters)
            kernel(grid, layout.threads, weight, x, x.stride(0), *y, *buffers, *sizes, shared=layout.shared)

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
            if tensor is None:
                continue
            if (
                tensor.shape != (rows, columns)
                or tensor.stride(1) != 1
                or tensor.stride(0) % 2
                or tensor.data_ptr() % 4
            ):
                raise ValueError(
                    f"out and residual must be ({rows}, {columns}), elements side by side and rows aligned to 4 bytes, "
                    f"not {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
        for tensor in (out, x, weight, residual):
            if tensor is not None and tensor.dtype != self._dtype:
                raise ValueError(f"a tensor is {tensor.dtype}; this object was made for {self._dtype}")

    def _launch(self, variant: int | None, rows: int, n: int, k: int, gate: int, norm: int) -> tuple[Layout, Kernel]:
        key = (-1 if variant is None else variant, rows, n, k, gate, norm)
        found = self._launches.get(key)
        if found is None:
            code = self.variants(rows, n, k)[0] if variant is None else variant
            layout = self.layout(Variant.of(code), rows, n, k, norm)
            if layout is None:
                raise ValueError(
                    f"variant {code} does not go with {rows} rows and a weight of {n} x {k} on {self._gpu.name}: "
                    f"those that do are {self.variants(rows, n, k)}"
                )
            kernel = self._gpu.kernel(
                layout.unit(_NAMES[self._dtype], gate),
                "skinny_linear_bulk" if layout.variant.cluster else "skinny_linear_copy",
                _BULK if layout.variant.cluster else _COPY,
                shared=self._gpu.shared_memory - 1024,
                overlap=True,
            )
            found = self._launches[key] = layout, kernel
        return found

    def _map_of_weight(self, weight: torch.Tensor, tile: int, gated: bool) -> int:
        n, k = weight.shape
        key = (0, weight.data_ptr(), n, k, tile, int(gated))
        found = self._maps.get(key)
        if found is None:
            if gated:
                found = TensorMap(weight, (k, 4, 2, n // 8), (2 * k, n * k, 8 * k), (64, 4, 2, tile // 8))
            else:
                found = TensorMap(weight, (k, n), (2 * k,), (64, tile))
            self._keep(key, found)
        return found.address

    def _map_of_x(self, x: torch.Tensor, bucket: int) -> int:
        rows, k = x.shape
        key = (1, x.data_ptr(), rows, k, x.stride(0), bucket)
        found = self._maps.get(key)
        if found is None:
            found = TensorMap(x, (k, rows), (2 * x.stride(0) if rows > 1 else 2 * k,), (64, bucket))
            self._keep(key, found)
        return found.address

    def _keep(self, key: tuple[int, ...], map_: TensorMap) -> None:
        """A map says where a matrix lies and how it is cut, so that it stays true when memory is used again."""
        if len(self._maps) >= 1 << 14:
            self._maps.clear()
        self._maps[key] = map_
