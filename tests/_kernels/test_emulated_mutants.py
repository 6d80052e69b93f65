"""What the emulated tests are worth: each of these small mistakes in a kernel must be noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmapi._kernels import OPS, sample_cuda
from tests.emulator import build, cases
from tests.emulator.gpu import EmulatedGpu, EmulationError
from tests.gpu import test_sample as sample_tests

torch.set_num_threads(1)
Check = Callable[[EmulatedGpu], None]


def operator(name: str, dtype: torch.dtype = torch.float32) -> Check:
    return lambda gpu: cases.operator(gpu, OPS[f"llmapi.{name}.default"], dtype)


def decode(dtype: str, heads: int, kv_heads: int, dim: int, block: int, form: int, **lengths: list[int]) -> Check:
    return lambda gpu: cases.decode_attention(gpu, (dtype, heads, kv_heads, dim, block), form, lengths or None)


def context(dtype: torch.dtype) -> Check:
    return lambda gpu: cases.context_attention(gpu, dtype, 4, 2, 64, 16)


def skipped_slots(gpu: EmulatedGpu) -> None:
    launch, caches = OPS["llmapi.rotary_kv_write.default"].cuda, [torch.zeros(1, 8, 2, 64) for _ in range(2)]
    assert launch is not None
    launch(gpu, torch.ones(2, 384), None, torch.tensor([-1, 3], dtype=torch.int32), *caches, False)
    assert all(c.sum() == 128 for c in caches)


def draws(gpu: EmulatedGpu) -> None:
    cases.sampling(gpu, 1000, 40, torch.float32, edits=False)
    cases.sampling(gpu, 1000, 40, torch.float32, edits=True)
    cases.flat_rows(gpu, torch.float32)


def clusters(gpu: EmulatedGpu) -> None:
    cases.sampling(gpu, 4200, 20, torch.float32, edits=True)
    sample_tests.test_logprobs(gpu, 4200, torch.float32, 20, cases.SEED)  # type: ignore[arg-type]


CHECKS: dict[str, Check] = {
    **{name: operator(name) for name in ("rms_norm", "add_rms_norm", "add_layer_norm", "gated_activation")},
    **{name: operator(name) for name in ("rotary_cos_sin", "rotary_kv_write")},
    "skipped slots": skipped_slots,
    "step": cases.step_kernels,
    "decode": decode("bfloat16", 8, 2, 64, 16, 1, mixed=[300, 1, 0, 16, 33, 17, 200], one=[500]),
    "decode single": decode("bfloat16", 8, 2, 64, 16, 0, mixed=[300, 1, 0, 16, 33, 17, 200]),
    "decode wide": decode("bfloat16", 4, 2, 64, 16, 2, mixed=[300, 1, 0, 16, 33, 17, 200], one=[500]),
    "decode parts": decode("bfloat16", 8, 2, 64, 16, 1, few=[2600, 3]),
    "decode float32": decode("float32", 6, 2, 80, 8, 1, mixed=[40, 1, 0, 16, 33, 17, 150]),
    "context": context(torch.bfloat16),
    "context float32": context(torch.float32),
    "draws": draws,
    "greedy ties": cases.greedy_ties,
    "ties": lambda gpu: sample_tests.test_ties(gpu, 8, torch.float32, cases.SEED),  # type: ignore[arg-type]
    "logprobs": lambda gpu: sample_tests.test_logprobs(gpu, 5003, torch.float32, 6, cases.SEED),  # type: ignore[arg-type]
    "clusters": clusters,
}

MUTANTS: list[tuple[str, str, str, str]] = [
    # file, what it says, what it is to say (everywhere), who is to notice
    ("common.cuh", "offset = 16; offset; offset >>= 1) x += __shfl",
     "offset = 8; offset; offset >>= 1) x += __shfl", "rms_norm"),
    ("common.cuh", "scratch[warp] = x;\n  __syncthreads();", "scratch[warp] = x;", "rms_norm"),
    ("common.cuh", "scratch[32] = total;\n  }\n  __syncthreads();", "scratch[32] = total;\n  }", "rms_norm"),
    ("norm.cuh", "/ width + eps", "/ width - eps", "rms_norm"),
    ("norm.cuh", "/ width + eps", "/ (width - 1) + eps", "rms_norm"),
    ("norm.cuh", "float d = to_float(kept[j].at[k]) - mean;", "float d = to_float(kept[j].at[k]);", "add_layer_norm"),
    ("norm.cuh", "+ to_float(bias[i])", "", "add_layer_norm"),
    ("norm.cuh", "weights[j].at[k], bias", "weights[j].at[0], bias", "add_rms_norm"),
    ("norm.cuh", "      store<scalar_t, N>(sum + at, kept[j]);\n", "", "add_rms_norm"),
    ("rotary.cuh", "p * cosine - r * sine", "p * cosine + r * sine", "rotary_kv_write"),
    ("rotary.cuh", "factors[half + at + k]", "factors[half + at]", "rotary_kv_write"),
    ("rotary.cuh", "INTERLEAVED ? 2 * pair + 1", "INTERLEAVED ? 2 * pair", "rotary_kv_write"),
    ("rotary.cuh", "(slot * kv_heads + own)", "(slot + own)", "rotary_kv_write"),
    ("rotary.cu", "sine * scale", "sine", "rotary_cos_sin"),
    ("rotary.cuh", "if (slot < 0) continue;", "", "skipped slots"),
    ("gated_activation.cu", "0.044715f", "0.0447f", "gated_activation"),
    ("gated_activation.cu", "0.70710678118654752f", "0.7071f", "gated_activation"),
    ("gated_activation.cu", "expf(-x)", "expf(x)", "gated_activation"),
    ("gated_activation.cu", "k < min(at + N, width)", "k < at + N", "gated_activation"),
    ("step.cu", "sampled[~id]", "sampled[-id]", "step"),
    ("step.cu", "max(0, sampled[~id])", "sampled[~id]", "step"),
    ("step.cu", "i < bytes / 16", "i < bytes / 16 - 1", "step"),
    ("decode_attention.cuh", "LOG2E 1.4426950408889634f", "LOG2E 1.4427f", "decode float32"),
    ("decode_attention.cuh", "__shfl_xor_sync(0xffffffffu, score[r], 16)", "score[r]", "decode float32"),
    ("decode_attention.cuh", "length - work.window :", "length - work.window - 1 :", "decode"),
    ("decode_attention.cuh", "at >= piece.length)", "at > piece.length)", "decode"),
    ("decode_attention.cuh", "limit - 2.0f * limit", "limit - 1.9f * limit", "decode"),
    ("decode_attention.cuh", "slopes[n * 2 + (i & 1)]", "slopes[n * 2]", "decode"),
    ("decode_attention.cuh", "((lane >> 4) * 8 + (lane & 7)) * PITCH + ((lane >> 3) & 1)",
     "(((lane >> 3) & 1) * 8 + (lane & 7)) * PITCH + (lane >> 4)", "decode"),
    ("decode_attention.cuh", "pack2(scalar_t(), x[0], x[1])", "pack2(scalar_t(), x[1], x[0])", "decode"),
    ("decode_attention.cuh", "ptx::bar_sync<ALONG * 32>(1 + across);", "", "decode wide"),
    ("decode_attention.cu", "cp_async_wait<STAGES - 1>();", "cp_async_wait<STAGES>();", "decode"),
    ("decode_attention.cu", "cp_async_wait<STAGES - 1>();\n      __syncwarp();",
     "cp_async_wait<STAGES - 1>();", "decode float32"),
    ("decode_attention.cu", "if (last) *counter = 0;", "", "decode"),
    ("decode_attention.cuh", "sum = sum * shrink + exp2_fast(sink - top);", "sum = sum * shrink;", "decode"),
    ("decode_attention.cu", "float keep = exp2_fast(most - top);", "float keep = 1.0f;", "decode parts"),
    ("decode_attention.cuh", "along < half) join", "along == 0) join", "decode single"),
    ("context_attention.cuh", "key > last_seen", "key >= last_seen", "context"),
    ("context_attention.cuh", "-first - window :", "-first - window - 1 :", "context"),
    ("context_attention.cuh", "highest, __shfl_xor_sync(0xffffffffu, highest, 2)", "highest, highest", "context"),
    ("context_attention.cuh", "sum += __shfl_xor_sync(0xffffffffu, sum, 1);", "", "context"),
    ("context_attention.cuh", "sum[r] * old[r] + total", "sum[r] + total", "context"),
    ("context_attention.cuh", "span.z - span.y + tile * tile_rows", "span.z - span.y", "context"),
    ("context_attention_tile.cuh", "__syncthreads();\n    load_tile(sv", "load_tile(sv", "context"),
    ("context_attention_tile.cuh", "cp_async_wait<0>();\n    __syncthreads();\n    if (tile",
     "__syncthreads();\n    if (tile", "context"),
    ("context_attention_tile.cuh", "o[m][j][3] *= old[1];", "o[m][j][3] *= old[0];", "context"),
    ("context_attention_tile.cuh", "if (row < item.rows)", "if (row <= item.rows)", "context"),
    ("context_attention_tile.cuh", "of.softcap * tanhf(s / of.softcap)", "tanhf(s / of.softcap)", "context float32"),
    ("context_attention_plan.cu", "(count + tile_rows - 1) / tile_rows", "count / tile_rows", "context"),
    ("context_attention_plan.cu", "other.x == own.x && j < i", "other.x == own.x && j <= i", "context"),
    ("sample.cu", "0xD2511F53u, c0)", "0xD2511F55u, c0)", "draws"),
    ("sample.cu", "round < 10", "round < 9", "draws"),
    ("sample.cu", "larger < row.top_k", "larger <= row.top_k", "draws"),
    ("sample.cu", "kept = kept && ahead < share_up(row.top_p, total);", "", "draws"),
    ("sample.cu", "x < 0 ? __fmul_rn(x, row.repetition)", "x < 0 ? __fdiv_rn(x, row.repetition)", "draws"),
    ("sample.cu", "count &= 0x7fffffff;", "", "draws"),
    ("sample.cu", "row.edited[edits[i].id] += edits[i].value", "row.edited[edits[i].id] = edits[i].value", "draws"),
    ("sample.cu", "id = x == top ? min(id, i) : id", "id = x == top ? i : id", "greedy ties"),
    ("sample.cu", "if (lane == 31) s.scan[warp] = up_to;\n  __syncthreads();",
     "if (lane == 31) s.scan[warp] = up_to;", "draws"),
    ("sample.cu", "if (lane == 0) s.mass[warp] = mine;\n  team_sync();", "if (lane == 0) s.mass[warp] = mine;", "ties"),
    ("sample.cu", "5.0000001201e-1f", "5.01e-1f", "logprobs"),
    ("sample.cu", "rank += peer(s.ahead, r)", "rank += s.ahead", "clusters"),
    ("sample.cu", "ptx::barrier_cluster();", "__syncthreads();", "clusters"),
    ("sample.cu", "from += n;", "", "clusters"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)


def make(folder: Path, check: str, sources: build.Sources | None = None) -> EmulatedGpu:
    """A GPU on which 20 rows are split over two blocks each, where there are clusters."""
    return EmulatedGpu(folder, sms=40, capability=(9, 0) if check == "clusters" else (8, 0), sources=sources)


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_pass(check: str, kernel_folder: Path) -> None:
    CHECKS[check](make(kernel_folder, check))


@pytest.mark.parametrize("at", range(len(MUTANTS)), ids=lambda i: f"{i}-{MUTANTS[i][0]}-{MUTANTS[i][3]}")
def test_a_mistake_is_noticed(at: int, kernel_folder: Path) -> None:
    name, old, new, check = MUTANTS[at]
    texts = build.sources()
    assert old in texts[name], f"{name} no longer says {old!r}: choose another mistake"
    gpu = make(kernel_folder, check, {**texts, name: texts[name].replace(old, new)})
    with pytest.raises((AssertionError, EmulationError)):
        CHECKS[check](gpu)
