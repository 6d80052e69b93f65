"""What the emulated tests are worth: each of these small mistakes in a kernel must be noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmapi._kernels import OPS, sample_cuda
from llmapi._kernels.decode_attention_cuda import Fusion
from tests.emulator import build, cases
from tests.emulator.gpu import EmulatedGpu
from tests.emulator.mutants import Mutant, must_be_noticed
from tests.gpu import test_beam as beam_tests
from tests.gpu import test_decode_attention as decode_tests
from tests.gpu import test_sample as sample_tests

torch.set_num_threads(1)
Check = Callable[[EmulatedGpu], None]


def operator(name: str, dtype: torch.dtype = torch.float32) -> Check:
    return lambda gpu: cases.operator(gpu, OPS[f"llmapi.{name}.default"], dtype)


def decode(dtype: str, heads: int, kv_heads: int, dim: int, block: int, form: int, **lengths: list[int]) -> Check:
    return lambda gpu: cases.decode_attention(gpu, (dtype, heads, kv_heads, dim, block), form, lengths or None)


def fused(*fusions: Fusion) -> Check:
    shape = ("bfloat16", 8, 2, 64, 16)

    def check(gpu: EmulatedGpu) -> None:
        layouts = (decode_tests._forms(torch.bfloat16, *shape[1:4], gpu.shared_memory)[1],) * 3
        for fusion in fusions:
            lengths = [300, 1, 0, 16, 33, 17, 200]
            decode_tests.check_fused(gpu, shape, layouts, lengths, fusion, cases.SEED, "cpu")  # type: ignore[arg-type]

    return check


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


def beams(
    vocab: int, requests: list[tuple[int, int]], dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> Check:
    def check(gpu: EmulatedGpu) -> None:
        n = sum(rows for rows, _ in requests)
        x = beam_tests.noise(n, vocab, cases.SEED, dtype)
        beam_tests.check(gpu, x, beam_tests.beam_scores(n, cases.SEED, spread), requests)  # type: ignore[arg-type]

    return check


def tied_beams(gpu: EmulatedGpu) -> None:
    requests = [(1, 8), (2, 900), (1, 300)]
    for x in (torch.zeros(4, 6000), beam_tests.tied_rows(4, 6000, random.Random(cases.SEED), torch.float32)):
        beam_tests.check(gpu, x, torch.tensor([0.0, -1.0, -1.0, -1e9]), requests)  # type: ignore[arg-type]


def beam_choices(gpu: EmulatedGpu) -> None:
    for shape in ((33, 400), (256, 1024)):
        beam_tests.test_choices(gpu, shape, cases.SEED)  # type: ignore[arg-type]


def beam_books(gpu: EmulatedGpu) -> None:
    for width, k in ((4, 12), (33, 100), (256, 600)):
        beam_tests.test_books(gpu, width, k, cases.SEED)  # type: ignore[arg-type]


def masks(gpu: EmulatedGpu) -> None:
    sample_tests.test_masks(gpu, 1000, 30, torch.float32, cases.SEED)  # type: ignore[arg-type]
    sample_tests.test_masks(gpu, 1003, 30, torch.float32, cases.SEED)  # type: ignore[arg-type]


CHECKS: dict[str, Check] = {
    **{name: operator(name) for name in ("rms_norm", "add_rms_norm", "add_layer_norm", "gated_activation")},
    **{name: operator(name) for name in ("rotary_cos_sin", "rotary_kv_write")},
    "skipped slots": skipped_slots,
    "step": cases.step_kernels,
    "decode": decode("bfloat16", 8, 2, 64, 16, 1, mixed=[300, 1, 0, 16, 33, 17, 200], one=[500]),
    "decode single": decode("bfloat16", 8, 2, 64, 16, 0, mixed=[300, 1, 0, 16, 33, 17, 200]),
    "decode wide": decode("bfloat16", 4, 2, 64, 16, 2, mixed=[300, 1, 0, 16, 33, 17, 200], one=[500]),
    "decode parts": decode("bfloat16", 8, 2, 64, 16, 1, few=[2600, 3]),
    "decode fused": fused(Fusion(32, False), Fusion(40, True)),
    "decode float32": decode("float32", 6, 2, 80, 8, 1, mixed=[40, 1, 0, 16, 33, 17, 150]),
    "context": context(torch.bfloat16),
    "context float32": context(torch.float32),
    "draws": draws,
    "greedy ties": cases.greedy_ties,
    "ties": lambda gpu: sample_tests.test_ties(gpu, 8, torch.float32, cases.SEED),  # type: ignore[arg-type]
    "logprobs": lambda gpu: sample_tests.test_logprobs(gpu, 5003, torch.float32, 6, cases.SEED),  # type: ignore[arg-type]
    "clusters": clusters,
    "beams": beams(5003, [(4, 8), (1, 1), (2, 24)], torch.bfloat16),
    "beams many": beams(9000, [(1, 400)], torch.bfloat16),
    "beams by bits": beams(7000, [(1, 1000)]),
    "beams merged": beams(900, [(12, 1000)], spread=60.0),
    "beams wide": beams(61, [(200, 30)]),
    "beams lacking": beams(11, [(3, 40)]),
    "beam ties": tied_beams,
    "beams few": lambda gpu: beam_tests.few_possible(gpu, (5003,), cases.SEED),  # type: ignore[arg-type]
    "beam failures": lambda gpu: beam_tests.test_failures(gpu),  # type: ignore[arg-type]
    "beam edits": lambda gpu: beam_tests.test_edits(gpu, 4096, torch.float32, cases.SEED),  # type: ignore[arg-type]
    "beam NaN": lambda gpu: beam_tests.test_an_edited_row_that_is_nan_fails(gpu),  # type: ignore[arg-type]
    "beam clusters": beams(4200, [(4, 8), (14, 30)], torch.bfloat16),
    "beam choices": beam_choices,
    "beam books": beam_books,
    "beam moves": lambda gpu: beam_tests.test_moves(gpu, 37, 16, cases.SEED),  # type: ignore[arg-type]
    "beam carried": lambda gpu: beam_tests.test_carried_scores(gpu, cases.SEED),  # type: ignore[arg-type]
    "beam counts": lambda gpu: beam_tests.test_counts(gpu, 5000, cases.SEED),  # type: ignore[arg-type]
    "masks": masks,
}

MUTANTS: list[Mutant] = [
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
    ("common.cuh", "p * cosine - r * sine", "p * cosine + r * sine", "rotary_kv_write"),
    ("rotary.cuh", "factors[half + at + k]", "factors[half + at]", "rotary_kv_write"),
    ("rotary.cuh", "INTERLEAVED ? 2 * pair + 1", "INTERLEAVED ? 2 * pair", "rotary_kv_write"),
    ("rotary.cuh", "(slot * kv_heads + own)", "(slot + own)", "rotary_kv_write"),
    ("common.cuh", "r * cosine + p * sine", "p * cosine + r * sine", "rotary_kv_write"),
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
    ("decode_attention.cu", "if (pass == 0) {", "if (pass == 1) {", "decode fused"),
    ("decode_attention.cu", "(piece.length - 1) % TILE", "piece.length % TILE", "decode fused"),
    ("decode_attention.cu", "row + TILE * PITCH))", "row))", "decode fused"),
    ("new_token.cuh", "(item + PAIRED) * 8, item < PAIRED", "item * 8, item < PAIRED", "decode fused"),
    ("new_token.cuh", "a.y * sines.at[1]", "a.y * sines.at[0]", "decode fused"),
    ("new_token.cuh", "o * 4 + at / 2]", "o * 4 + at]", "decode fused"),
    ("common.cuh", "p * cosine - r * sine", "p * cosine + r * sine", "decode fused"),
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
    ("rows.cuh", "x < 0 ? __fmul_rn(x, row.repetition)", "x < 0 ? __fdiv_rn(x, row.repetition)", "draws"),
    ("rows.cuh", "count &= 0x7fffffff;", "", "draws"),
    ("rows.cuh", "row.edited[edits[i].id] += edits[i].value", "row.edited[edits[i].id] = edits[i].value", "draws"),
    ("sample.cu", "id = x == top ? min(id, i) : id", "id = x == top ? i : id", "greedy ties"),
    ("sample.cuh", "if (lane == 31) s.scan[warp] = up_to;\n  __syncthreads();",
     "if (lane == 31) s.scan[warp] = up_to;", "draws"),
    ("sample.cuh", "if (lane == 0) s.mass[warp] = mine;\n  team_sync();",
     "if (lane == 0) s.mass[warp] = mine;", "ties"),
    ("sample.cuh", "5.0000001201e-1f", "5.01e-1f", "logprobs"),
    ("sample_logprobs.cu", "rank += peer(s.ahead, r)", "rank += s.ahead", "clusters"),
    ("sample_logprobs.cu", "logprob(x) > chosens", "logprob(x) >= chosens", "logprobs"),
    ("sample.cu", "#if EDITED", "#if !EDITED", "draws"),
    ("sample.cu", "if (row.edited) {", "if (rows[0].edited) {", "masks"),
    ("sample.cu", "View<float>(row.edited, vocab)", "View<scalar_t>(raw, vocab)", "masks"),
    ("rows.cuh", "ptx::barrier_cluster();", "__syncthreads();", "clusters"),
    ("step.cu", "(int64_t)pairs[2 * blockIdx.x + 1] * bytes", "(int64_t)pairs[2 * blockIdx.x] * bytes", "step"),
    ("rows.cuh", "? value(element<scalar_t>(raw, e))", "? element<scalar_t>(raw, e)", "beam edits"),
    ("beam.cu", "LOG2E = 1.44269504f", "LOG2E = 1.4427f", "beams"),
    ("beam.cu", "__fsub_rn(element<scalar_t>(vector, e), top)", "element<scalar_t>(vector, e)", "beams"),
    ("beam.cu", "SUPPORT = 32.0f", "SUPPORT = 8.0f", "beams"),
    ("beam.cu", "return __fsub_rn(__fsub_rn(x, top), log_sum);",
     "return __fsub_rn(x, __fadd_rn(top, log_sum));", "beams"),
    ("beam.cu", "beam << TOKEN_BITS |", "", "beams"),
    ("beam.cu", "rank += list[i] < own", "rank += list[i] <= own", "beams"),
    ("beam.cu", "== !(a & width)", "== !(b & stride)", "beams many"),
    ("beam.cu", "if (stride > 32 ||", "if (stride > 64 ||", "beams many"),
    ("beam.cu", "(stride == 1 && width > 32)", "(stride == 1 && width > 64)", "beams many"),
    ("beam.cu", "list[i] = ~0ull", "list[i] = 0", "beams many"),
    ("beam.cu", "if (want <= n && n <= LIST) return n;", "return n;", "beam ties"),
    ("beam.cu", "if (want <= n && n <= LIST) return n;", "if (n <= LIST) return n;", "beams few"),
    ("beam.cu", "ahead += i < warp ? s.scan[i] : 0", "ahead += s.scan[i]", "beams"),
    ("beam.cu", "if (run) atomicAdd(&s.count[pending], run);\n          pending", "pending", "beams by bits"),
    ("beam.cu", "falling_key(score) >> shift <= prefix", "falling_key(score) >> shift < prefix", "beams by bits"),
    ("beam.cu", "return score > last; });", "return score >= last; });", "beam ties"),
    ("beam.cu", "for (int i = 0; i < warp; i++) start += s.scan[i];", "", "beam ties"),
    ("beam.cu", "< left) put(", "+ 1 < left) put(", "beam ties"),
    ("beam.cu", "beam, begin + i);", "beam, i);", "beam clusters"),
    ("beam.cu", "score(view.at(begin + i))", "score(view.at(i))", "beam clusters"),
    ("beam.cu", "s.mass[warp] = mass;\n  team_sync();", "s.mass[warp] = mass;\n  __syncthreads();", "beam clusters"),
    ("beam.cu", "peer(s.mass[i % WARPS], i / WARPS)", "s.mass[i % WARPS]", "beam clusters"),
    ("beam.cu", "return nans ? nans : ", "return nans ? 1 : ", "beam failures"),
    ("beam.cu", "&& score < INFINITY_F", "", "beam failures"),
    ("beam.cu", "atomicMin(&s.failed, i);", "s.failed = i;", "beam failures"),
    ("beam.cu", "if (!row.given) edit", "edit", "beam edits"),
    ("beam.cu", "thread_max(edited), best", "own, best", "beam NaN"),
    ("beam.cu", "kept = min(n, want);", "", "beams merged"),
    ("beam.cu", "    lives = s.lives, room", "    lives = 0, room", "beams merged"),
    ("beam.cu", "min(s.next[own] + each,", "min(s.next[own] + each + 1,", "beams merged"),
    ("beam.cu", "if (at >= s.count[own]) continue;", "", "beams lacking"),
    ("beam.cu", "Found own = found[beam * SPLIT];", "Found own = found[0];", "beams"),
    ("beam.cu", "carried[row.carried - 1]", "carried[row.carried]", "beam carried"),
    ("beam.cu", "row.carried ? carried[row.carried - 1] : scores[at]", "scores[at]", "beam carried"),
    ("beam.cu", "score = NAN_F, token = found[s.failed].reason;", "score = NAN_F;", "beam failures"),
    ("beam_reorder.cu", "i < own.k && scores[i] > -INFINITY_F", "i < own.k", "beam choices"),
    ("beam_reorder.cu", "on = on && !ends_it(tokens[i], own, ends)", "", "beam choices"),
    ("beam_reorder.cu", "e < own.ends_stop", "e < own.ends_stop - 1", "beam choices"),
    ("beam_reorder.cu", "e < own.ends_stop", "e < own.ends_stop - 1", "beam books"),
    ("beam_reorder.cu", "how.carried ? before + how.carried - 1 : given", "false ? before : given", "beam books"),
    ("beam_reorder.cu", "tid < min(own.rows, own.k)", "tid < own.k", "beam books"),
    ("beam_reorder.cu", "(how.last || ends_it(", "(ends_it(", "beam books"),
    ("beam_reorder.cu", "int place = olds + rank_of(new_one", "int place = rank_of(new_one", "beam books"),
    ("beam_reorder.cu", "scores[tid] / how.norm", "scores[tid] * (1 / how.norm)", "beam books"),
    ("beam_reorder.cu", "i < own.k && !how.last", "i < own.k", "beam books"),
    ("beam_reorder.cu", "(all[j] == all[i] && j < i)", "(all[j] == all[i] && j > i)", "beam books"),
    ("beam_reorder.cu", "if (rank >= own.rows) continue;", "if (rank > own.rows) continue;", "beam books"),
    ("beam_reorder.cu", "how.always || scores[best]", "scores[best]", "beam books"),
    ("beam_reorder.cu", "scores[best] / how.settle", "scores[best] / how.norm", "beam books"),
    ("beam_reorder.cu", "how.settle <= worst", "how.settle < worst", "beam books"),
    ("beam_reorder.cu", "best == NOBODY || (kept", "(kept", "beam books"),
    ("beam_reorder.cu", "worths[i] = -INFINITY_F, ", "", "beam books"),
    ("beam_reorder.cu", "if (how.norm == 0) return;", "", "beam books"),
    ("beam_reorder.cu", "if (sources[i] < 0) joined = 1;", "joined = 1;", "beam books"),
    ("beam_reorder.cu", "&& found < own.rows && !failed", "&& found < own.rows", "beam choices"),
    ("beam_reorder.cu", "place < own.rows) ranks", "place < own.rows && begin == 0) ranks", "beam choices"),
    ("beam_reorder.cu", "    found += all;", "    found = all;", "beam choices"),
    ("beam_reorder.cu", "i < warp ? counts[i] : 0", "0", "beam choices"),
    ("beam_reorder.cu", "atomicMin(&heads[beam], tid)", "heads[beam] = tid", "beam choices"),
    ("beam_reorder.cu", "late[place] = tid", "late[place] = beam", "beam choices"),
    ("beam_reorder.cu", "if (found < own.rows) {", "if (found < 0) {", "beam choices"),
    ("beam_reorder.cu", "parents[tid] = beams[rank],", "parents[tid] = beam,", "beam choices"),
    ("beam_reorder.cu", "  __syncthreads();  // counts may still be read\n", "", "beam choices"),
    ("beam_reorder.cu", "(seq_lens[own.row] - 1) / block_size, width", "seq_lens[own.row] / block_size, width",
     "beam moves"),
    ("beam_reorder.cu", "= table[(int64_t)parent * width + column];", "= table[(int64_t)row * width + column];",
     "beam moves"),
    ("beam_reorder.cu", "begun = last % block_size", "begun = (last + 1) % block_size", "beam moves"),
    ("beam_reorder.cu", "begun * bytes / 16", "begun * bytes / 32", "beam moves"),
    ("beam_reorder.cu", "source = table[(int64_t)parent * width]", "source = table[parent]", "beam moves"),
    ("beam_reorder.cu", "row += gridDim.z", "row += 2 * gridDim.z", "beam moves"),
    ("beam_reorder.cu", "+ last / block_size, parents", "+ (last + 1) / block_size, parents", "beam moves"),
    ("beam_reorder.cu", "own.counts[(int64_t)row * width + token]++;", ";", "beam counts"),
    ("beam_reorder.cu", "begin <= token && token < end", "begin <= token", "beam counts"),
    ("beam_reorder.cu", "  __syncthreads();  // nobody counts before all have been read\n", "", "beam counts"),
    ("beam_reorder.cu", "= own.counts[(int64_t)parent", "= own.counts[(int64_t)row", "beam counts"),
    ("beam_reorder.cu", "tokens += own.slot;", "tokens += 0;", "beam counts"),
    ("sample.cuh", "from += n;", "", "clusters"),
    ("rows.cuh", "mask[id >> 5] >> (id & 31) : 0", "mask[id >> 5] >> (id & 15) : 0", "masks"),
    ("rows.cuh", "allowed >> e & 1", "allowed >> (e & 6) & 1", "masks"),
    ("rows.cuh", "!(mask[id >> 5] >> (id & 31) & 1)", "!(mask[id >> 5] >> (id & 31))", "masks"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)


def make(folder: Path, check: str, sources: build.Sources | None = None) -> EmulatedGpu:
    """A GPU on which 20 rows are split over two blocks each, where there are clusters."""
    capability = (9, 0) if check.endswith("clusters") else (8, 0)
    return EmulatedGpu(folder, sms=40, capability=capability, sources=sources, hasty=True)


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_pass(check: str, kernel_folder: Path) -> None:
    CHECKS[check](make(kernel_folder, check))


@pytest.mark.parametrize("at", range(len(MUTANTS)), ids=lambda i: f"{i}-{MUTANTS[i][0]}-{MUTANTS[i][3]}")
def test_a_mistake_is_noticed(at: int, kernel_folder: Path) -> None:
    check = MUTANTS[at][3]
    must_be_noticed(MUTANTS[at], lambda sources: CHECKS[check](make(kernel_folder, check, sources)))
