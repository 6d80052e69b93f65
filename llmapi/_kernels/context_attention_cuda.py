"""Context attention on NVIDIA GPUs: prompts and chunks of prompts against the paged KV cache.

Two kernels compute the same: ``csrc/context_attention.cu`` runs everywhere (FlashAttention-2, Dao 2023,
arXiv:2307.08691); ``csrc/context_attention_sm90.cu`` uses Hopper's own instructions (FlashAttention-3, Shah et al.
2024, arXiv:2407.08608). Both take their work from a queue that ``csrc/context_attention_plan.cu`` writes once a step.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch

from llmapi._device import HEAD_SIZES
from llmapi._kernels.gpu import Gpu, Kernel, dtype_macro
from llmapi._kernels.nvrtc import Unit
from llmapi.errors import BuildError

HEAD_DIMS = HEAD_SIZES
BLOCK_SIZES = (8, 16, 32, 64, 128)

_PLAN = Unit.of("context_attention_plan.cu")
_ENTRY_BYTES = 32
_QUEUE_BYTES = 16
_L2_SHARE = 3  # keys and values of the heads at work take at most this part of the cache
_KEYS_PER_PART = 512  # a tile's keys are not split into less
_MERGE_TOKENS = 1024  # in steps of more rows no keys are split: the kernel that can is 4 to 9 % slower
_MAPS = 4096


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        rows: query rows of an item.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        defines: macros.
    """

    rows: int
    threads: int
    shared: int
    defines: dict[str, int]


def portable_tiles(dtype: torch.dtype, head_dim: int, shared_memory: int, warps: int = 4) -> Tiles:
    """The largest tiles of ``context_attention.cu`` that fit into a block's shared memory.

    Args:
        dtype: of queries and caches.
        head_dim: elements of a head.
        shared_memory: bytes that one block may have.
        warps: of a block.

    Raises:
        BuildError: none fits.
    """
    if dtype == torch.float32:
        return Tiles(4 * warps, 32 * warps, 0, {"LLM_WARPS": warps})
    for row_tiles, keys in ((2, 64), (1, 64), (1, 32), (1, 16)):
        rows = 16 * warps * row_tiles
        shared = (rows + 2 * keys) * (head_dim + 8) * 2
        if (row_tiles == 1 or head_dim <= 96) and (keys == 64 or head_dim > 64) and shared + 64 <= shared_memory:
            defines = {"LLM_WARPS": warps, "LLM_ROW_TILES": row_tiles, "LLM_KEYS": keys}
            return Tiles(rows, 32 * warps, shared, defines)
    raise BuildError(
        f"context attention with head size {head_dim} needs {shared} bytes of shared memory a block; this GPU has "
        f"{shared_memory}"
    )


_HOPPER = {
    64: (2, 128, 2, 2),
    80: (2, 128, 2, 2),
    96: (2, 128, 2, 2),
    112: (2, 128, 2, 2),
    128: (2, 128, 2, 2),
    192: (2, 96, 2, 1),
    256: (2, 64, 2, 1),
}
"""By head size, for ``context_attention_sm90.cu``: LLM_GROUPS, LLM_KEYS, LLM_STAGES, LLM_QUERIES."""


def _hopper(head_dim: int, block_size: int) -> Tiles:
    groups, keys, stages, queries = _HOPPER[head_dim]
    shared = (64 * groups * queries + 2 * stages * keys) * -(-head_dim // 64) * 128 + 1024
    return Tiles(
        64 * groups,
        128 * (groups + 1),
        shared,
        {
            "LLM_GROUPS": groups,
            "LLM_KEYS": keys,
            "LLM_STAGES": stages,
            "LLM_QUERIES": queries,
            "LLM_BOX": math.gcd(keys, block_size),
        },
    )


def _unit(source: str, dtype: torch.dtype, head_dim: int, tiles: Tiles, **more: int) -> Unit:
    macro = int(dtype_macro(dtype))
    return Unit.of(source, LLM_DTYPE=macro, LLM_HEAD_DIM=head_dim, **tiles.defines, **more)


def units(dtype: str) -> list[Unit]:
    """A representative list of specializations.

    Args:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """
    of: torch.dtype = getattr(torch, dtype)
    found = [_PLAN]
    for shared_memory in (65536, 101376, 232448):
        found += [
            _unit("context_attention.cu", of, d, portable_tiles(of, d, shared_memory)) for d in (64, 80, 128, 256)
        ]
    if of != torch.float32:
        for d in _HOPPER:
            options = {"LLM_ADJUST": int(d == 64), "LLM_MERGE": int(d >= 128)}
            found.append(_unit("context_attention_sm90.cu", of, d, _hopper(d, 16), **options))
    return list(dict.fromkeys(found))


class ContextAttention:
    """Attention of the sequences of a step that are in prefill; see :func:`llmapi._kernels.paged_attention`.

    Every token of a sequence, those of this step included, must be in the cache before a call. The sequences that
    decode come first in a step and are left alone. Lengths and counts are read on the device, so that a captured graph
    can be replayed with others.

    Args:
        gpu: where.
        dtype: of queries and results: float16, bfloat16 or float32 (the last for checking, slow).
        kv_dtype: of the cache; must be ``dtype``.
        heads, kv_heads: query heads, and key and value heads, which divide them.
        head_dim: one of :data:`HEAD_DIMS`.
        block_size: tokens of a cache block, one of :data:`BLOCK_SIZES`.
        max_num_tokens: most rows of a step.
        max_batch_size: most sequences of a step.
        max_seq_len: most tokens of a sequence.
        portable: use the kernel for every architecture even on Hopper.

    Raises:
        BuildError: a size that there is no kernel for.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        max_num_tokens: int,
        max_batch_size: int,
        max_seq_len: int,
        portable: bool = False,
    ) -> None:
        _check("dtype", dtype, (torch.float16, torch.bfloat16, torch.float32))
        _check("kv_dtype", kv_dtype, (dtype,))
        _check("head_dim", head_dim, HEAD_DIMS)
        _check("block_size", block_size, BLOCK_SIZES)
        if heads % kv_heads:
            raise BuildError(
                f"{heads} query heads are not a multiple of {kv_heads} key heads: correct the model's config"
            )
        self._gpu, self._dtype = gpu, dtype
        self._heads, self._kv_heads, self._head_dim, self._block_size = heads, kv_heads, head_dim, block_size
        self._max_num_tokens, self._max_batch_size, self._max_seq_len = max_num_tokens, max_batch_size, max_seq_len
        self._hopper = gpu.arch == "sm_90a" and dtype != torch.float32 and head_dim in _HOPPER and not portable
        if self._hopper:
            self._tiles = _hopper(head_dim, block_size)
        else:
            self._tiles = portable_tiles(dtype, head_dim, gpu.shared_memory)
        per_sm = 1 if self._hopper else max(1, min(4, gpu.shared_memory // (self._tiles.shared + 1024)))
        self._blocks = gpu.sms * per_sm
        # Where there are fewer items than blocks, Hopper's kernel splits them, up to one part for each block.
        self._parts = self._blocks if self._hopper else 0
        self._capacity = max(self._most_entries(max_num_tokens), self._parts // heads)
        partial = self._parts * self._tiles.rows * (head_dim + 8)
        self._partial = torch.empty(partial, dtype=torch.float32, device=gpu.device)
        self._arrived = torch.zeros(self._parts * self._tiles.rows // 64, dtype=torch.int32, device=gpu.device)
        self._queue = torch.zeros(
            (_QUEUE_BYTES + _ENTRY_BYTES * self._capacity) // 4, dtype=torch.int32, device=gpu.device
        )
        self._cache_bytes = gpu.l2_bytes // _L2_SHARE
        self._plan_shared = 8 * max_batch_size
        self._plan = gpu.kernel(_PLAN, "context_plan", "ppppiiiiiiii", shared=self._plan_shared, overlap=True)
        self._kernels: dict[tuple[bool, bool], Kernel] = {}
        self._maps: dict[tuple[int, ...], bytes] = {}

    def _most_entries(self, tokens: int) -> int:
        """Most query tiles of a step with so many rows."""
        rows = self._tiles.rows
        return (tokens + (rows - 1) * min(self._max_batch_size, tokens)) // rows

    def plan(self, seq_lens: torch.Tensor, query_start: torch.Tensor, counts: torch.Tensor) -> None:
        """Write the step's queue of work; once before the calls of all layers.

        Args:
            seq_lens: ``[B]`` int32, tokens of each sequence, this step's included; 0 for none.
            query_start: ``[B + 1]`` int32, first row of each sequence.
            counts: int32: how many sequences decode, and how many there are in all.
        """
        self._plan(
            (1, 1, 1),
            min(1024, 32 * self._max_batch_size),
            self._queue,
            seq_lens,
            query_start,
            counts,
            self._capacity,
            self._tiles.rows,
            self._kv_heads,
            self._heads // self._kv_heads,
            2 * self._head_dim * self._dtype.itemsize,
            self._cache_bytes,
            self._parts,
            _KEYS_PER_PART,
            shared=self._plan_shared,
        )

    def __call__(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        counts: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
        planned: bool = False,
    ) -> None:
        """Write the rows of the sequences in prefill.

        Args:
            out: ``[T, H, D]``, contiguous; other rows stay as they are.
            q: ``[T, H, D]``; its rows may be parts of longer ones, 16-byte aligned.
            k_cache, v_cache: ``[blocks, block_size, K, D]``, contiguous.
            block_tables: ``[B, M]`` int32, padded with anything.
            seq_lens, query_start, counts: as in :meth:`plan`.
            scale, window, softcap: as in :func:`llmapi._kernels.paged_attention.paged_attention`.
            alibi_slopes, sinks: ``[H]`` float32.
            planned: :meth:`plan` has been called for this step.

        Raises:
            BuildError: a layout that the kernels cannot read.
        """
        if not q.shape[0]:
            return
        if q.stride(2) != 1 or q.stride(1) != self._head_dim or q.stride(0) * q.itemsize % 16 or q.data_ptr() % 16:
            raise BuildError(f"queries with strides {q.stride()} are not rows of aligned heads: make them contiguous")
        for name, tensor in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
            if tensor is not None and tensor.dtype != torch.float32:
                raise BuildError(f"{name} are {tensor.dtype}, must be float32: convert them once at load")
        if not planned:
            self.plan(seq_lens, query_start, counts)
        adjust = self._hopper and (softcap != 0.0 or alibi_slopes is not None)
        merge = self._hopper and q.shape[0] <= _MERGE_TOKENS
        kernel = self._kernels.get((adjust, merge))
        if kernel is None:
            kernel = self._kernels[adjust, merge] = self._kernel(adjust, merge)
        sources: tuple[Any, ...] = (q, q.stride(0), k_cache, v_cache)
        workspace: tuple[Any, ...] = ()
        blocks = self._blocks
        if self._hopper:
            sources = (self._query_map(q), self._cache_map(k_cache), self._cache_map(v_cache))
            workspace = (self._partial, self._arrived)
        else:
            blocks = min(blocks, self._most_entries(q.shape[0]) * self._heads)
        kernel(
            (blocks, 1, 1),
            self._tiles.threads,
            out,
            *sources,
            block_tables,
            block_tables.stride(0),
            self._queue,
            *workspace,
            self._heads,
            self._kv_heads,
            self._block_size.bit_length() - 1,
            scale,
            window,
            softcap,
            alibi_slopes,
            sinks,
            shared=self._tiles.shared,
        )

    def other_units(self) -> list[Unit]:
        """What steps of another length will need compiled, by what those so far needed."""
        return [self._unit(adjust, not merge) for adjust, merge in self._kernels] if self._hopper else []

    def _unit(self, adjust: bool, merge: bool) -> Unit:
        if self._hopper:
            options = {"LLM_ADJUST": int(adjust), "LLM_MERGE": int(merge)}
            return _unit("context_attention_sm90.cu", self._dtype, self._head_dim, self._tiles, **options)
        return _unit("context_attention.cu", self._dtype, self._head_dim, self._tiles)

    def _kernel(self, adjust: bool, merge: bool) -> Kernel:
        entry, signature = "context_attention", "pplpppipiiififpp"
        if self._hopper:
            entry, signature = "context_attention_sm90", "ptttpipppiiififpp"
        unit = self._unit(adjust, merge)
        return self._gpu.kernel(unit, entry, signature, shared=self._tiles.shared, overlap=True)

    @property
    def _pieces(self) -> tuple[int, int]:
        """How a head is cut: into pieces of so many elements, of which one copy brings so many."""
        return (self._head_dim, 1) if self._head_dim % 64 else (64, self._head_dim // 64)

    def _query_map(self, q: torch.Tensor) -> bytes:
        tokens, row = q.shape[0], q.stride(0)
        key = (q.data_ptr(), tokens, row)
        width, pieces = self._pieces
        return self._maps.get(key) or self._map(
            key, (width, tokens, self._heads * self._head_dim // width), (row * 2, width * 2), (64, 64, pieces)
        )

    def _cache_map(self, cache: torch.Tensor) -> bytes:
        blocks, row = cache.shape[0], self._kv_heads * self._head_dim
        key = (cache.data_ptr(), blocks)
        width, pieces = self._pieces
        return self._maps.get(key) or self._map(
            key,
            (width, 8, row // width, blocks * self._block_size // 8),
            (row * 2, width * 2, 8 * row * 2),
            (64, 8, pieces, self._tiles.defines["LLM_BOX"] // 8),
        )

    def _map(
        self, key: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
    ) -> bytes:
        """Description of a tensor for the copy engine, in pieces of 128-byte rows, swizzled."""
        from cuda.bindings import driver

        kind = driver.CUtensorMapDataType
        error, found = driver.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
            if self._dtype == torch.float16
            else kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            key[0],
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1) for _ in sizes],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if int(error) != 0:
            raise BuildError(f"CUDA refused a tensor map of {sizes} in boxes of {box}: {error}")
        if len(self._maps) >= _MAPS:
            self._maps.clear()
        encoded = self._maps[key] = ctypes.string_at(found.getPtr(), 128)
        return encoded


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise BuildError(f"context attention has no kernel for {name}={value}; it has {', '.join(map(str, allowed))}")
