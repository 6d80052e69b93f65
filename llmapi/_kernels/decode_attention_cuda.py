"""Attention of decoding sequences over the paged cache, on CUDA: one query token per sequence.

The kernel (``csrc/decode_attention.cu``) divides the tokens of all sequences evenly over the GPU, whatever their
lengths, in one launch. Three forms of it are built: ``single``, large blocks for one sequence; ``narrow``, where all
warps of a block share a key head; and ``wide``, where they serve neighbouring key heads, for many sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llmapi._device import HEAD_SIZES
from llmapi._kernels.gpu import Gpu, Kernel, dtype_macro
from llmapi._kernels.nvrtc import Unit
from llmapi.errors import BuildError

HEAD_DIMS = HEAD_SIZES
BLOCK_SIZES = (8, 16, 32, 64, 128)
MOST_GROUP = 64
_MOST_STAGES = 6
_SIGNATURE = "p" * 12 + "illiffip"


@dataclass(frozen=True)
class Form:
    """How the kernel is laid out on a GPU.

    Attributes:
        warps: warps of a block.
        across: key heads that a block's warps serve side by side, a divisor of ``warps`` and of the key heads (times
            passes over them).
        stages: tiles of 16 tokens that a warp keeps in flight.
        blocks: blocks resident on a multiprocessor.
        shared: bytes of shared memory of a block.
        tuning: further macros of the source, by name.
    """

    warps: int
    across: int
    stages: int
    blocks: int
    shared: int
    tuning: tuple[tuple[str, int | str], ...] = ()


@dataclass(frozen=True)
class Fusion:
    """The rotation, and the write of the newest key and value, as part of attention (``csrc/new_token.cuh``).

    Attributes:
        rotated: leading channels of a head that are rotated; 0 for none.
        interleaved: pairs are neighbours instead of half of them apart.
    """

    rotated: int
    interleaved: bool

    @classmethod
    def of(cls, dtype: torch.dtype, group: int, rotated: int, interleaved: bool) -> Fusion | None:
        """None where it is not to be used: in float32, for rotations that are not by whole octets, and for groups of
        more than 16 query heads, where registers are short.
        """
        if dtype == torch.float32 or group > 16 or rotated % (8 if interleaved else 16):
            return None
        return cls(rotated, interleaved)


def passes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Passes over the keys that the queries of a key head take, and the rows of each."""
    group = heads // kv_heads
    most = 32 if dtype != torch.float32 and group > 16 and head_dim <= 128 else 16
    return -(-group // most), min(group, most)


def sizes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Bytes of shared memory that a tile of a warp takes, and that a warp needs to hand its state to another."""
    chunks = head_dim * dtype.itemsize // 16
    _, rows = passes(dtype, heads, kv_heads, head_dim)
    if dtype == torch.float32:
        region = (rows * -(-head_dim // 32) + 2 * rows) * 128
    else:
        region = -(-rows // 8) * (head_dim // 4 + 4) * 128
    return 32 * (chunks | 1) * 16, region


def fit(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    shared_memory: int,
    across: int,
    *,
    warps: int = 4,
    blocks: int = 2,
    stages: int = _MOST_STAGES,
    tuning: tuple[tuple[str, int | str], ...] = (),
) -> Form:
    """The largest form that fits into a multiprocessor's shared memory.

    Args:
        dtype: of queries and caches.
        heads, kv_heads, head_dim: the attention's shape.
        shared_memory: bytes that one block may have; a multiprocessor has 1 KiB more.
        across, warps, blocks, stages, tuning: what to aim at; see :class:`Form`.
    """
    count, _ = passes(dtype, heads, kv_heads, head_dim)
    stage, region = sizes(dtype, heads, kv_heads, head_dim)
    while True:
        while across > 1 and (warps % across or kv_heads * count % across):
            across //= 2
        along = warps // across
        budget = (shared_memory + 1024) // blocks - 1024 - 128
        merge = across * (along // 2) * region
        found = min(stages, (budget - merge) // (warps * stage))
        if found >= 2 or (found >= 1 and warps == blocks == 1):
            return Form(warps, across, found, blocks, merge + warps * found * stage, tuning)
        if blocks > 1:
            blocks -= 1
        elif warps > 1:
            warps //= 2
        else:
            raise BuildError(
                f"decode attention of head size {head_dim} in {dtype} needs {merge + stage} bytes of shared memory; "
                f"this GPU gives a block {shared_memory}: use a 16-bit dtype"
            )


def unit(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    form: Form,
    fusion: Fusion | None = None,
) -> Unit:
    """The specialization of the kernel."""
    fused = {} if fusion is None else {"FUSED": 1, "ROTATED": fusion.rotated, "INTERLEAVED": int(fusion.interleaved)}
    return Unit.of(
        "decode_attention.cu",
        LLM_DTYPE=dtype_macro(dtype),
        HEAD_DIM=head_dim,
        GROUP=heads // kv_heads,
        KV_HEADS=kv_heads,
        BLOCK_SHIFT=block_size.bit_length() - 1,
        WARPS=form.warps,
        ACROSS=form.across,
        STAGES=form.stages,
        CTAS=form.blocks,
        **fused,
        **dict(form.tuning),
    )


def units(dtype: str) -> list[Unit]:
    """Specializations that together exercise every path of the source.

    Args:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    found = []
    for heads, kv_heads, head_dim, across in ((32, 32, 128, 4), (32, 8, 128, 1), (9, 3, 64, 1), (48, 1, 80, 1)):
        form = fit(torch_dtype, heads, kv_heads, head_dim, 64 << 10, across)
        found.append(unit(torch_dtype, heads, kv_heads, head_dim, 16, form))
        for interleaved in (False, True):
            if fusion := Fusion.of(torch_dtype, heads // kv_heads, head_dim // 32 * 16, interleaved):
                found.append(unit(torch_dtype, heads, kv_heads, head_dim, 16, form, fusion))
    return found


class DecodeAttention:
    """Launches the kernel; one for all layers of a shape. Its workspace serves one launch at a time, in stream order.

    Args:
        gpu: the device.
        dtype: of queries and outputs.
        kv_dtype: of the caches; must be ``dtype``.
        heads, kv_heads: query and key heads, at most 64 query heads per key head.
        head_dim: one of :data:`HEAD_DIMS`.
        block_size: tokens of a cache block, one of :data:`BLOCK_SIZES`.
        max_batch_size: most rows of a call.
        max_seq_len: most tokens of a sequence.
        forms: overrides the layouts ``(single, narrow, wide)``, for measurements and tests.
        fusions: those that calls will ask for.

    Attributes:
        workspace_bytes: what it holds on the GPU.

    Raises:
        BuildError: the kernel has no such specialization.
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
        max_batch_size: int,
        max_seq_len: int,
        forms: tuple[Form, Form, Form] | None = None,
        fusions: Iterable[Fusion] = (),
    ) -> None:
        check(dtype, kv_dtype, heads, kv_heads, head_dim, block_size)
        self._block_size = block_size
        self._max_batch_size = max_batch_size
        self._max_tiles = -(-max_seq_len // 16) + 1
        self._sms = gpu.sms
        self._forms = forms or default_forms(gpu, dtype, heads, kv_heads, head_dim)
        self._kernels: dict[tuple[Form, Fusion | None], Kernel] = {}
        count, rows = passes(dtype, heads, kv_heads, head_dim)
        wanted = {
            (form, fusion): unit(dtype, heads, kv_heads, head_dim, block_size, form, fusion)
            for form in self._forms
            for fusion in (None, *fusions)
        }
        gpu.prefetch(wanted.values())
        for (form, fusion), source in wanted.items():
            kernel = gpu.kernel(source, "decode_attention", _SIGNATURE, shared=form.shared, overlap=True)
            self._kernels[form, fusion] = kernel
        floats = max(gpu.sms * form.blocks * 2 * form.across * rows * (head_dim + 2) for form in self._forms)
        self._virtual_heads = kv_heads * count
        self._partials = torch.empty(floats, dtype=torch.float32, device=gpu.device)
        self._counters = torch.zeros(max_batch_size * self._virtual_heads, dtype=torch.int32, device=gpu.device)
        self.workspace_bytes = 4 * (self._partials.numel() + self._counters.numel())

    def __call__(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor | None,
        *,
        scale: float,
        window: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
        counts: torch.Tensor | None = None,
        batch: int | None = None,
        fusion: Fusion | None = None,
        cos_sin: torch.Tensor | None = None,
    ) -> None:
        """Attention of sequences with one new token; rows of others are not written.

        Args:
            out: ``[R, H, D]``, rows may be strided.
            q: ``[R, H, D]``, rows may be strided: a view into packed queries, keys and values.
            k_cache, v_cache: ``[blocks, block_size, K, D]``.
            block_tables: ``[B, M]`` int32, rows may be strided.
            seq_lens: ``[B]`` int32 tokens of each sequence, the new one included; those with 0 are skipped.
            query_start: ``[B + 1]`` int32 first row of each sequence in ``q``: sequences with another number of rows
                than one are skipped. None: sequence ``i`` has row ``i``.
            scale, window, softcap, alibi_slopes, sinks: see
                :func:`llmapi._kernels.paged_attention.paged_attention`; slopes and sinks in float32.
            counts: int32; if given, only the first ``counts[0]`` sequences take part.
            batch: sequences to look at; all of ``seq_lens`` if None.
            fusion: one of those that this object was made for. Then ``q`` is a view into packed rows, queries, keys and
                values, as the projection left them; the queries are rotated on the way in, and the keys and values
                of the rows served are written to the caches.
            cos_sin: ``[R, rotated]`` float32, for a fusion that rotates.

        Raises:
            BuildError: more sequences than ``max_batch_size``, or slopes or sinks that are not float32.
        """
        batch = seq_lens.shape[0] if batch is None else batch
        if batch > self._max_batch_size:
            raise BuildError(
                f"{batch} sequences, but decode attention was made for {self._max_batch_size}: raise max_batch_size"
            )
        for vector in (alibi_slopes, sinks):
            if vector is not None and vector.dtype != torch.float32:
                raise BuildError(f"slopes and sinks are float32, got {vector.dtype}: convert them once at load")
        form = self._forms[self._choose(batch)]
        sets = self._virtual_heads // form.across
        tiles = min(self._max_tiles, block_tables.shape[1] * self._block_size // 16 + 2)
        blocks = min(self._sms * form.blocks, batch * sets * tiles)
        self._kernels[form, fusion](
            (blocks, 1, 1),
            32 * form.warps,
            out,
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            query_start,
            counts,
            alibi_slopes,
            sinks,
            self._partials,
            self._counters,
            block_tables.stride(0),
            q.stride(0),
            out.stride(0),
            batch,
            scale,
            softcap,
            window,
            cos_sin,
            shared=form.shared,
        )

    def _choose(self, batch: int) -> int:
        """Index of the form, by what was fastest on an H200 (docs/kernels/decode_attention.md)."""
        if batch == 1 and self._virtual_heads >= 16:  # enough heads to read a short sequence without splitting it
            return 0
        return 2 if batch * self._virtual_heads >= 4 * self._sms else 1


def default_forms(gpu: Gpu, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> tuple[Form, Form, Form]:
    """The layouts ``(single, narrow, wide)`` for a GPU."""
    single = fit(dtype, heads, kv_heads, head_dim, gpu.shared_memory, 1, warps=8, blocks=1)
    narrow, wide = (fit(dtype, heads, kv_heads, head_dim, gpu.shared_memory, across) for across in (1, 4))
    return single, narrow, wide


def check(dtype: torch.dtype, kv_dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    """Whether the kernel has such a specialization.

    Raises:
        BuildError: it has not.
    """
    if kv_dtype != dtype:
        raise BuildError(f"decode attention in {dtype} reads a cache in {dtype}, got {kv_dtype}: set kv_dtype to it")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BuildError(f"decode attention runs in float32, float16 or bfloat16, got {dtype}")
    if heads % kv_heads or heads // kv_heads > MOST_GROUP:
        raise BuildError(
            f"decode attention takes at most {MOST_GROUP} query heads per key head, a whole number of them; "
            f"got {heads} and {kv_heads}: use backend='cpu'"
        )
    if head_dim not in HEAD_DIMS:
        raise BuildError(f"decode attention takes head sizes {HEAD_DIMS}, got {head_dim}: use backend='cpu'")
    if block_size not in BLOCK_SIZES:
        raise BuildError(f"decode attention takes blocks of {BLOCK_SIZES} tokens, got {block_size}")
