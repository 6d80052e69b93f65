"""The CUDA kernels, run on the CPU by the emulator, against their references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._kernels import OPS, Op, relative_error
from tests.emulator import cases
from tests.emulator.gpu import EmulatedGpu
from tests.gpu import test_decode_attention as decode_tests

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def gpu(kernel_folder: Path) -> EmulatedGpu:
    return EmulatedGpu(kernel_folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.cuda], ids=lambda op: op.name)
def test_operators(gpu: EmulatedGpu, op: Op, dtype: torch.dtype) -> None:
    cases.operator(gpu, op, dtype)


def test_queries_may_stay_where_they_are(gpu: EmulatedGpu) -> None:
    op = OPS["llmapi.rotary_kv_write.default"]
    assert op.cuda is not None
    for sample in op.samples(torch.Generator().manual_seed(5), torch.bfloat16):
        qkv, *rest = sample.args
        expected = op.reference(qkv.clone(), *[r.clone() if isinstance(r, torch.Tensor) else r for r in rest])
        q = op.cuda(gpu, qkv, *rest, in_place=True)
        assert q.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert relative_error(q, expected) <= op.tolerance[torch.bfloat16], sample.label


def test_slots_below_zero_are_not_written(gpu: EmulatedGpu) -> None:
    launch = OPS["llmapi.rotary_kv_write.default"].cuda
    assert launch is not None
    for interleaved in (False, True):
        for dim in (64, 20):  # 20: not by whole vectors
            caches = [torch.zeros(1, 8, 2, dim) for _ in range(2)]
            slots = torch.tensor([-1, 3], dtype=torch.int32)
            launch(gpu, torch.ones(2, 6 * dim), None, slots, *caches, interleaved)
            for found in caches:
                assert found.sum() == 2 * dim and found[0, 3].sum() == 2 * dim


def test_step(gpu: EmulatedGpu) -> None:
    cases.step_kernels(gpu)


@pytest.mark.parametrize(
    "at", range(len(decode_tests.SHAPES)), ids=lambda i: "-".join(map(str, decode_tests.SHAPES[i]))
)
def test_decode_attention(gpu: EmulatedGpu, at: int) -> None:
    cases.decode_attention(gpu, decode_tests.SHAPES[at], at % 3)


@pytest.mark.parametrize("at", range(11), ids=lambda i: "-".join(map(str, decode_tests.SHAPES[i])))
def test_decode_attention_that_rotates_and_writes(gpu: EmulatedGpu, at: int) -> None:
    shape = decode_tests.SHAPES[at]
    layout = decode_tests._forms(decode_tests.DTYPES[shape[0]], *shape[1:4], gpu.shared_memory)[at % 3]
    for turn, lengths in enumerate((cases.LENGTHS["edges"], [600])):
        fusion = decode_tests.fusions_of(shape[3])[(at + 2 * turn) % 4]
        decode_tests.check_fused(gpu, shape, (layout,) * 3, lengths, fusion, cases.SEED, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [0, 1, 2], ids=["single", "narrow", "wide"])
def test_forms_of_decode_attention(gpu: EmulatedGpu, form: int) -> None:
    """Many multiprocessors cut a sequence into many parts; one has all sequences in turn."""
    for sms in (1, 40):
        gpu.sms = sms
        cases.decode_attention(
            gpu, ("bfloat16", 8, 4, 64, 16), form, {"few": [2600, 3], "edges": cases.LENGTHS["edges"]}
        )


@pytest.mark.parametrize("shape", [("float16", 8, 2, 64, 8), ("float32", 6, 2, 80, 16)], ids=["half", "float"])
def test_decode_attention_on_turing(kernel_folder: Path, shape: Any) -> None:
    """Without cp.async, and with the matrix instructions of half the depth."""
    cases.decode_attention(EmulatedGpu(kernel_folder, capability=(7, 5), shared_memory=64 << 10), shape, 1)


def test_only_decoding_rows_are_written(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = decode_tests.Case
    monkeypatch.setattr(decode_tests, "Case", lambda *args: case(*args, device="cpu"))
    decode_tests.test_only_decoding_rows_are_written(gpu)  # type: ignore[arg-type]


def test_a_large_batch_of_decoding_sequences(gpu: EmulatedGpu) -> None:
    """More than 1024 sequences: lanes of a warp tally several each."""
    lengths = [i * 7 % 5 for i in range(1030)]
    shape = ("bfloat16", 2, 1, 64, 16)
    case = decode_tests.Case(cases.SEED, torch.bfloat16, *shape[1:], lengths, "cpu")  # type: ignore[arg-type]
    attention = decode_tests._attention(gpu, shape, batch=1200)  # type: ignore[arg-type]
    out = torch.full_like(case.q, float("nan"))
    options: dict[str, Any] = {"window": 0, "softcap": 0.0, "alibi_slopes": None, "sinks": None}
    attention(out, case.q, case.k, case.v, case.tables, case.lengths, None, scale=case.scale, **options)
    live = case.lengths > 0
    assert relative_error(out[live], case.expected(0, 0.0, None, None)) <= 8e-3
    assert out[~live].isnan().all()


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_context_attention(gpu: EmulatedGpu, dtype: torch.dtype, block_size: int) -> None:
    heads, kv_heads = {8: (6, 2), 16: (2, 2), 32: (4, 1), 64: (3, 3), 128: (4, 2)}[block_size]
    cases.context_attention(gpu, dtype, heads, kv_heads, 64, block_size)


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 192, 256])
def test_head_sizes_of_context_attention(gpu: EmulatedGpu, head_dim: int) -> None:
    cases.context_attention(gpu, torch.bfloat16, 2, 1, head_dim, 16, cases.STEPS[1:])
    if head_dim in (80, 256):
        cases.context_attention(gpu, torch.float32, 2, 1, head_dim, 16, cases.STEPS[1:])


def test_context_attention_on_turing(kernel_folder: Path) -> None:
    gpu = EmulatedGpu(kernel_folder, capability=(7, 5), shared_memory=64 << 10)
    for head_dim in (64, 256):
        cases.context_attention(gpu, torch.float16, 4, 2, head_dim, 16)
