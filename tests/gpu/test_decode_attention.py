"""Decode attention on the GPU against the reference of paged attention, on fresh random inputs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from llmapi._kernels.decode_attention_cuda import DecodeAttention, Form, Fusion, fit, unit
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import architecture, compile_unit
from llmapi._kernels.op import relative_error
from llmapi._kernels.paged_attention import PAGED_ATTENTION, paged_attention
from llmapi._kernels.rotary import ROTARY_KV_WRITE, rotary_kv_write
from llmapi.errors import BuildError

pytestmark = pytest.mark.gpu

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# dtype, heads, key heads, head size, tokens of a block
SHAPES = [
    ("bfloat16", 32, 32, 128, 16),
    ("bfloat16", 32, 8, 128, 16),
    ("bfloat16", 9, 3, 64, 8),
    ("bfloat16", 4, 4, 80, 32),
    ("float16", 8, 2, 96, 64),
    ("float16", 6, 6, 112, 16),
    ("bfloat16", 16, 1, 192, 128),
    ("bfloat16", 20, 2, 256, 16),
    ("float16", 40, 1, 128, 32),
    ("bfloat16", 64, 1, 64, 16),
    ("bfloat16", 48, 2, 80, 8),
    ("float32", 4, 4, 64, 16),
    ("float32", 6, 2, 80, 8),
    ("float32", 20, 1, 128, 32),
    ("float32", 4, 1, 256, 16),
]

LENGTHS = {
    "one": [193],
    "long": [3001],
    "ones": [1] * 40,
    "mixed": [1, 2000, 5, 0, 16, 17, 333, 1, 64, 15, 0, 1025],
    "even": [190, 200, 180, 210, 192, 191, 177, 256],
}

# window, soft cap, ALiBi, sinks
VARIANTS = [(0, 0.0, False, False), (100, 0.0, False, True), (7, 5.0, False, False), (0, 0.0, True, False)]


def _forms(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, shared: int) -> tuple[Form, Form, Form]:
    wide = 4 if kv_heads % 4 == 0 else 2
    narrow, wider = (fit(dtype, heads, kv_heads, head_dim, shared, across) for across in (1, wide))
    return fit(dtype, heads, kv_heads, head_dim, shared, 1, warps=8, blocks=1), narrow, wider


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no NVIDIA GPU that torch can use")
    properties = torch.cuda.get_device_properties(0)
    arch = architecture(properties.major, properties.minor)
    units = []
    for dtype, heads, kv_heads, head_dim, block_size in SHAPES:
        for form in _forms(DTYPES[dtype], heads, kv_heads, head_dim, properties.shared_memory_per_block_optin):
            sizes = (DTYPES[dtype], heads, kv_heads, head_dim, block_size, form)
            units.append(unit(*sizes))
            if dtype != "float32":
                units += [unit(*sizes, fusion) for fusion in fusions_of(head_dim)]
    # A compilation holds one core for about a second; the processes need no GPU.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        built = dict(zip(units, pool.map(compile_unit, units, [arch] * len(units)), strict=True))
    return Gpu(torch.device("cuda", 0), lambda u, a: built.get(u) or compile_unit(u, a))


class Case:
    """Random inputs. What must not be read is NaN: block 0, padding of tables, and slots behind each sequence's end."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        lengths: Any,
        device: str = "cuda",
    ) -> None:
        g = torch.Generator(device).manual_seed(seed)
        rows = len(lengths)
        needed = [-(-n // block_size) for n in lengths]
        order = (torch.randperm(sum(needed), generator=g, device=device) + 1).int()
        size = (sum(needed) + 1, block_size, kv_heads, head_dim)
        self.k = torch.randn(size, generator=g, device=device).to(dtype)
        self.v = torch.randn(size, generator=g, device=device).to(dtype)
        self.tables = torch.zeros(rows, max(needed) + 3, dtype=torch.int32, device=device)
        self.k[0] = self.v[0] = float("nan")
        for i, ids in enumerate(torch.split(order, needed)):
            self.tables[i, : len(ids)] = ids
            if lengths[i] % block_size:
                self.k[ids[-1].long(), lengths[i] % block_size :] = float("nan")
                self.v[ids[-1].long(), lengths[i] % block_size :] = float("nan")
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        packed = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=g, device=device).to(dtype)
        self.packed = packed
        self.q = packed[:, : heads * head_dim].view(rows, heads, head_dim)
        self.scale = head_dim**-0.5 * 1.3
        self.slopes = torch.rand(heads, generator=g, device=device) * 0.2
        self.sinks = torch.randn(heads, generator=g, device=device)

    def expected(self, window: int, softcap: float, slopes: Any, sinks: Any) -> torch.Tensor:
        live = (self.lengths > 0).int()
        start = torch.cat((torch.zeros_like(live[:1]), live.cumsum(0).int()))
        q = self.q[self.lengths > 0]
        args = (self.k, self.v, self.tables, self.lengths, start, self.scale, window, softcap, slopes, sinks)
        return paged_attention(q, *args)


def check_fused(
    gpu: Gpu, shape: Any, forms: tuple[Form, Form, Form] | None, lengths: Any, fusion: Fusion, seed: int, device: str
) -> None:
    """Rotation and write as part of attention against the two references, one after the other."""
    dtype, heads, kv_heads, head_dim, block_size = DTYPES[shape[0]], *shape[1:]
    attention = _attention(gpu, shape, forms, batch=max(64, len(lengths)), fusions=(fusion,))
    for window, softcap, alibi, sink in VARIANTS:
        case = Case(seed, dtype, heads, kv_heads, head_dim, block_size, lengths, device)
        slopes, sinks = case.slopes if alibi else None, case.sinks if sink else None
        live = case.lengths > 0
        last = (case.lengths - 1).clamp(min=0).long()
        blocks = case.tables.gather(1, (last // block_size)[:, None])[:, 0].long()
        case.k[blocks, last % block_size] = float("nan")  # nobody has written them yet
        case.v[blocks, last % block_size] = float("nan")
        g = torch.Generator(device).manual_seed(seed + 1)
        angles = torch.rand(len(lengths), fusion.rotated // 2, generator=g, device=device) * 6.28
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1) if fusion.rotated else None
        slots = torch.where(live, blocks * block_size + last % block_size, -1).int()
        expected = Case(seed, dtype, heads, kv_heads, head_dim, block_size, lengths, device)
        expected.k, expected.v = case.k.clone(), case.v.clone()
        expected.q = rotary_kv_write(case.packed, cos_sin, slots, expected.k, expected.v, fusion.interleaved)
        for attempt in range(2):
            out = torch.full_like(case.q, float("nan"))
            attention(
                out, case.q, case.k, case.v, case.tables, case.lengths, None,
                scale=case.scale, window=window, softcap=softcap, alibi_slopes=slopes, sinks=sinks,
                fusion=fusion, cos_sin=cos_sin,
            )  # fmt: skip
            message = f"seed {seed} {fusion} window {window} cap {softcap} alibi {alibi} sink {sink} call {attempt}"
            error = relative_error(out[live], expected.expected(window, softcap, slopes, sinks))
            assert error <= PAGED_ATTENTION.tolerance[dtype], f"{error} {message}"
            assert out[~live].isnan().all(), message
        for found, theirs in ((case.k, expected.k), (case.v, expected.v)):
            assert torch.equal(found.isnan(), theirs.isnan()), message
            error = relative_error(found.nan_to_num(), theirs.nan_to_num())
            assert error <= ROTARY_KV_WRITE.tolerance[dtype], f"{error} {message}"


def fusions_of(head_dim: int) -> list[Fusion]:
    """Whole and partial rotations, neighbouring pairs, and none."""
    half = head_dim // 32 * 16
    return [Fusion(half, False), Fusion(head_dim // 16 * 16, False), Fusion(half + 8, True), Fusion(0, False)]


def _attention(
    gpu: Gpu, shape: Any, forms: tuple[Form, Form, Form] | None = None, batch: int = 64, fusions: Any = ()
) -> DecodeAttention:
    dtype, heads, kv_heads, head_dim, block_size = shape
    return DecodeAttention(
        gpu,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[dtype],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        max_batch_size=batch,
        max_seq_len=1 << 17,
        forms=forms,
        fusions=fusions,
    )


@pytest.mark.parametrize("form", [0, 1, 2], ids=["single", "narrow", "wide"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_agrees_with_the_reference(gpu: Gpu, shape: Any, form: int) -> None:
    dtype, heads, kv_heads, head_dim, block_size = DTYPES[shape[0]], *shape[1:]
    layout = _forms(dtype, heads, kv_heads, head_dim, gpu.shared_memory)[form]
    attention = _attention(gpu, shape, (layout, layout, layout))
    for name, lengths in LENGTHS.items():
        seed = random.randrange(1 << 30)
        case = Case(seed, dtype, heads, kv_heads, head_dim, block_size, lengths)
        live = case.lengths > 0
        for window, softcap, alibi, sink in VARIANTS:
            slopes, sinks = case.slopes if alibi else None, case.sinks if sink else None
            expected = case.expected(window, softcap, slopes, sinks)
            for attempt in range(2):  # the second finds the counters as the first left them
                out = torch.full_like(case.q, float("nan"))
                attention(
                    out,
                    case.q,
                    case.k,
                    case.v,
                    case.tables,
                    case.lengths,
                    None,
                    scale=case.scale,
                    window=window,
                    softcap=softcap,
                    alibi_slopes=slopes,
                    sinks=sinks,
                )
                message = f"seed {seed} {name} window {window} cap {softcap} alibi {alibi} sink {sink} call {attempt}"
                error = relative_error(out[live], expected)
                assert error <= PAGED_ATTENTION.tolerance[dtype], f"{error} {message}"
                assert out[~live].isnan().all(), message


@pytest.mark.parametrize("form", [0, 1, 2], ids=["single", "narrow", "wide"])
@pytest.mark.parametrize("shape", SHAPES[:11], ids=lambda s: "-".join(map(str, s)))
def test_rotates_and_writes_as_it_goes(gpu: Gpu, shape: Any, form: int) -> None:
    layout = _forms(DTYPES[shape[0]], *shape[1:4], gpu.shared_memory)[form]
    for at, lengths in enumerate(LENGTHS.values()):
        fusion = fusions_of(shape[3])[(at + form) % 4]
        check_fused(gpu, shape, (layout, layout, layout), lengths, fusion, random.randrange(1 << 30), "cuda")


def test_only_decoding_rows_are_written(gpu: Gpu) -> None:
    shape = SHAPES[1]
    seed = random.randrange(1 << 30)
    case = Case(seed, DTYPES[shape[0]], *shape[1:], [100, 40, 700, 33, 5])
    attention = _attention(gpu, shape)
    call = functools.partial(attention, scale=case.scale, window=0, softcap=0.0, alibi_slopes=None, sinks=None)
    args = (case.q, case.k, case.v, case.tables, case.lengths)
    expected = case.expected(0, 0.0, None, None)
    for decoding in range(6):
        out = torch.full_like(case.q, float("nan"))
        counts = torch.tensor([decoding, 9], dtype=torch.int32, device=case.q.device)
        call(out, *args, None, counts=counts)
        if decoding:
            error = relative_error(out[:decoding], expected[:decoding])
            assert error <= PAGED_ATTENTION.tolerance[out.dtype], f"{error} seed {seed}"
        assert out[decoding:].isnan().all(), f"seed {seed}"
    # Rows 0, 1, 4 and 5 of 6: sequence 2 has rows 2 and 3.
    start = torch.tensor([0, 1, 2, 4, 5, 6], dtype=torch.int32, device=case.q.device)
    q = torch.cat((case.q[:3], case.q[2:]))
    out = torch.full_like(q, float("nan"))
    call(out, q, *args[1:], start)
    error = relative_error(out[[0, 1, 4, 5]], expected[[0, 1, 3, 4]])
    assert error <= PAGED_ATTENTION.tolerance[out.dtype], f"{error} seed {seed}"
    assert out[2:4].isnan().all(), f"seed {seed}"


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=["MHA", "GQA"])
def test_large_batches_and_long_sequences(gpu: Gpu, shape: Any) -> None:
    generator = random.Random(seed := random.randrange(1 << 30))
    attention = _attention(gpu, shape, batch=1200)
    short = [generator.randrange(4) for _ in range(1100)]
    for lengths in ([20001, *([1] * 30)], short, [*short[:500], 9000, *short[500:]]):
        case = Case(seed, DTYPES[shape[0]], *shape[1:], lengths)
        live = case.lengths > 0
        out = torch.full_like(case.q, float("nan"))
        args = (out, case.q, case.k, case.v, case.tables, case.lengths, None)
        attention(*args, scale=case.scale, window=0, softcap=0.0, alibi_slopes=None, sinks=None)
        error = relative_error(out[live], case.expected(0, 0.0, None, None))
        assert error <= PAGED_ATTENTION.tolerance[out.dtype], f"{error} seed {seed}"
        assert out[~live].isnan().all(), f"seed {seed}"


def test_a_graph_is_replayed_with_other_lengths(gpu: Gpu) -> None:
    shape = SHAPES[1]
    seed = random.randrange(1 << 30)
    case = Case(seed, DTYPES[shape[0]], *shape[1:], [900, 600, 300, 50])
    attention = _attention(gpu, shape)
    out = torch.full_like(case.q, float("nan"))
    options = {"scale": case.scale, "window": 0, "softcap": 0.0, "alibi_slopes": None, "sinks": None}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            attention(out, case.q, case.k, case.v, case.tables, case.lengths, None, **options)
    for lengths in ([900, 600, 300, 50], [16, 1, 300, 0], [0, 0, 0, 0], [1, 600, 1, 1]):
        case.lengths.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        live = case.lengths > 0
        assert out[~live].isnan().all(), f"seed {seed}"
        if any(lengths):
            error = relative_error(out[live], case.expected(0, 0.0, None, None))
            assert error <= PAGED_ATTENTION.tolerance[out.dtype], f"{error} seed {seed} {lengths}"


def test_refuses_what_it_has_no_kernel_for(gpu: Gpu) -> None:
    for shape, named in (
        (("bfloat16", 4, 4, 72, 16), "72"),
        (("bfloat16", 71, 1, 64, 16), "71"),
        (("bfloat16", 4, 4, 64, 24), "24"),
    ):
        with pytest.raises(BuildError, match=named):
            _attention(gpu, shape)
