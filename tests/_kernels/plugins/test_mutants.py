"""What the emulated tests of plugins are worth: each of these small mistakes in a kernel must be noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.emulator import plugin_cases as cases
from tests.emulator.gpu import EmulatedGpu
from tests.emulator.mutants import Mutant, must_be_noticed

torch.set_num_threads(1)


def decode(gpu: EmulatedGpu) -> None:
    cases.attention(gpu, torch.bfloat16, 8, 2, 64, 16, ["decode"])


def mixed(gpu: EmulatedGpu) -> None:
    cases.attention(gpu, torch.bfloat16, 4, 2, 64, 16, ["mixed", "prompts"], ["plain", "all"])


def passes(gpu: EmulatedGpu) -> None:
    cases.attention(gpu, torch.bfloat16, 48, 1, 64, 16, ["decode"], ["all"])


def parts(gpu: EmulatedGpu) -> None:
    cases.attention(gpu, torch.bfloat16, 4, 2, 64, 16, ["mixed", "decode"], ["plain", "all"], parts=40)


CHECKS: dict[str, Callable[[EmulatedGpu], None]] = {
    "decode": decode,
    "mixed": mixed,
    "passes": passes,
    "parts": parts,
    "many": cases.many_sequences,
    "impossible": cases.impossible_lengths,
    "no guard": cases.no_guard,
    "write": lambda gpu: cases.write(gpu, torch.bfloat16),
    "norm": lambda gpu: cases.add_rms_norm(gpu, torch.float32),
}

ATTENTION, JOIN = "plugin_paged_attention.cu", "plugin_join_parts.cu"
WRITE, NORM = "plugin_rotary_kv_write.cu", "plugin_add_rms_norm.cu"
MUTANTS: list[Mutant] = [
    # file, what it says, what it is to say (everywhere), who is to notice
    ("plugin.cuh", "pools[1 + 2 * layer]", "pools[1 + layer]", "write"),
    ("plugin.cuh", "pools[2 + 2 * layer]", "pools[1 + 2 * layer]", "decode"),
    ("plugin.cuh", "if (pools[0] != POOL_GUARD) return false;", "", "no guard"),
    ("plugin.cuh", "0x6c6c6d6170694b56ll", "0x6c6c6d6170694b57ll", "write"),
    ("plugin.cuh", "i < width; i", "i < width - 1; i", "mixed"),
    (WRITE, "blockIdx.x * HEADS * HEAD_DIM, HEADS", "blockIdx.x, HEADS", "no guard"),
    (WRITE, "NEIGHBOURS != 0", "NEIGHBOURS == 0", "write"),
    (WRITE, "ROTARY_DIM == HEAD_DIM", "ROTARY_DIM", "write"),
    (WRITE, "slots, q, keys, values", "slots, q, values, keys", "write"),
    (NORM, "nullptr, out, total", "nullptr, total, out", "norm"),
    (NORM, "__int_as_float(eps)", "(float)eps", "norm"),
    (ATTENTION, "0) + BM - 1) / BM", "0) + BM - 2) / BM", "decode"),
    (ATTENTION, "0) + BM - 1) / BM", "0) + BM) / BM", "many"),
    (ATTENTION, "before <= index &&", "before < index &&", "decode"),
    (ATTENTION, "index < behind", "index <= behind", "mixed"),
    (ATTENTION, "min((lane + 1) * each, batch)", "min((lane + 1) * each - 1, batch)", "many"),
    (ATTENTION, "first = at * each", "first = at * each + 1", "many"),
    (ATTENTION, "first += 32", "first += 31", "many"),
    (ATTENTION, "behind, 31)", "behind, 30)", "many"),
    (ATTENTION, "spot.tile = index - __shfl_sync(0xffffffffu, before, at)", "spot.tile = 0", "mixed"),
    (ATTENTION, "sequence + 1, of.window", "sequence, of.window", "decode"),
    (ATTENTION, "of.window, 1, false", "0, 1, false", "decode"),
    (ATTENTION, "pass * PASS, rows", "pass, rows", "passes"),
    (ATTENTION, "head < KV_HEADS * PASSES", "head < KV_HEADS", "passes"),
    (ATTENTION, "of.alibi_slopes[head + row_of(s)]", "of.alibi_slopes[head]", "decode"),
    (ATTENTION, "SINKS ? of.sinks + head", "SINKS ? of.sinks", "decode"),
    (ATTENTION, "(int64_t)sequence * of.table_stride", "0", "decode"),
    (ATTENTION, "piece.first_tile + tile, table", "tile, table", "decode"),
    (ATTENTION, "fetch(warp + i * WARPS, i)", "fetch(warp + i, i)", "decode"),
    (ATTENTION, "fetch(tile + STAGES * WARPS, stage)", "fetch(tile + WARPS, stage)", "decode"),
    (ATTENTION, "cp_async_wait<STAGES - 1>();", "cp_async_wait<STAGES>();", "decode"),
    (ATTENTION, "close_sums(state);", "", "decode"),
    (ATTENTION, "if (WARPS > 1) __syncthreads();", "", "decode"),
    (ATTENTION, "int row = query_start[batch] + blockIdx.x", "int row = query_start[batch] + blockIdx.x + 1", "mixed"),
    (ATTENTION, "fill_row(row, NOT_A_NUMBER)", "", "no guard"),
    (ATTENTION, "if (length < count)", "if (length < 0)", "impossible"),
    (ATTENTION, "row < begin + min(first + BM, count)", "row < begin + 1", "impossible"),
    (ATTENTION, "length - count + first", "length - count", "mixed"),
    (ATTENTION, "min(BM, count - first)", "BM", "mixed"),
    (ATTENTION, "head, begin + first", "head, begin", "mixed"),
    (ATTENTION, "from = blockIdx.z * each", "from = blockIdx.z", "parts"),
    (ATTENTION, "min(each, piece.tiles - from)", "each", "parts"),
    (ATTENTION, "piece.first_tile += from;", "", "parts"),
    (ATTENTION, "parts + (at + r) * HEAD_DIM", "parts + at * HEAD_DIM", "parts"),
    (ATTENTION, "make_float2(state.most[s], state.sum[s])", "make_float2(state.sum[s], state.most[s])", "parts"),
    (ATTENTION, "make_float2(0.0f, -1.0f)", "make_float2(0.0f, 1.0f)", "parts"),
    (ATTENTION, "blockIdx.z * tokens * HEADS", "blockIdx.z * HEADS", "parts"),
    (ATTENTION, "whole(item.row + row)", "whole(item.row)", "parts"),
    (JOIN, "sum *= ptx::ex2(most - top);", "", "parts"),
    (JOIN, "sinks[blockIdx.y] * 1.4426950408889634f", "sinks[blockIdx.y]", "parts"),
    (JOIN, "sum = 1.0f", "sum = 0.0f", "parts"),
    (JOIN, "top = fmaxf(top, sums[at + i * step].x)", "top = sums[at + i * step].x", "parts"),
    (JOIN, "(at + i * step) * HEAD_DIM", "at * HEAD_DIM", "parts"),
    (JOIN, "if (joined) {\n      float", "if (true) {\n      float", "parts"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_pass(check: str, kernel_folder: Path) -> None:
    CHECKS[check](EmulatedGpu(kernel_folder, hasty=True))


@pytest.mark.parametrize("at", range(len(MUTANTS)), ids=lambda i: f"{i}-{MUTANTS[i][0]}-{MUTANTS[i][3]}")
def test_a_mistake_is_noticed(at: int, kernel_folder: Path) -> None:
    check = MUTANTS[at][3]
    must_be_noticed(MUTANTS[at], lambda sources: CHECKS[check](EmulatedGpu(kernel_folder, sources=sources, hasty=True)))
