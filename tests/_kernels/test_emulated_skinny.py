"""The skinny products on the emulator: both kernels, with what they have of clusters, bulk copies and mbarriers.

Hopper's matrix instruction of a warpgroup is not emulated: here the bulk kernel multiplies with that of a warp, as it
does on GPUs after Hopper. Small mistakes in the sources must be noticed, as in test_emulated_mutants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmapi._kernels import skinny_linear_cuda
from llmapi._kernels.skinny_linear_cuda import SkinnyLinear
from tests.emulator import build, cases
from tests.emulator.gpu import EmulatedGpu
from tests.emulator.mutants import Mutant, must_be_noticed
from tests.emulator.tensor_map import EmulatedTensorMap

Check = Callable[[EmulatedGpu], None]


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(skinny_linear_cuda, "TensorMap", EmulatedTensorMap)
    yield
    EmulatedTensorMap.made.clear()


def hopper(folder: Path) -> EmulatedGpu:
    return EmulatedGpu(folder, capability=(9, 0), shared_memory=227 << 10, hasty=True)


def test_copied(kernel_folder: Path) -> None:
    """The kernel that runs on any GPU, with partial tiles added up through memory; plain copies on Turing."""
    for capability in ((8, 0), (7, 5)):
        cases.skinny_copy(EmulatedGpu(kernel_folder, capability=capability, hasty=True))


@pytest.mark.parametrize("rows", [5, 16, 33, 100])
def test_bulk(kernel_folder: Path, rows: int) -> None:
    cases.skinny_bulk(hopper(kernel_folder), rows)


@pytest.mark.parametrize("rows", [3, 24, 70])
def test_norm_between(kernel_folder: Path, rows: int) -> None:
    cases.skinny_norm(hopper(kernel_folder), rows)


def product(rows: int, n: int, k: int, variant: int, gate: str | None = None) -> Check:
    def check(gpu: EmulatedGpu) -> None:
        kernel = SkinnyLinear(gpu, dtype=torch.bfloat16)  # type: ignore[arg-type]
        cases.skinny_product(kernel, rows, n, k, torch.bfloat16, variant, gate)

    return check


CHECKS: dict[str, Check] = {
    "copy": product(3, 200, 520, 1),
    "copy gate": product(6, 272, 264, 1, "silu"),
    "bulk": product(5, 408, 328, 11),
    "bulk tiles": product(13, 2200, 136, 11),
    "bulk cluster": product(13, 408, 200, 21),
    "bulk gate": product(5, 272, 200, 11, "silu"),
    "norm": lambda gpu: cases.skinny_norm_between(gpu, 5, 200, 272, 11, 21, "silu"),
    "norm cluster": lambda gpu: cases.skinny_norm_between(gpu, 5, 264, 200, 21, 11, None),
}

MUTANTS: list[Mutant] = [
    # file, what it says, what it is to say, who is to notice
    ("skinny_linear_tile.cuh", "(row & 7)) << 4", "(row & 3)) << 4", "bulk"),
    ("skinny_linear_tile.cuh", "^ (lane & 7)) << 4", "^ (lane & 6)) << 4", "bulk"),
    ("skinny_linear_tile.cuh", "mma(c, a[1], b[2], b[3]", "mma(c, a[1], b[0], b[3]", "copy"),
    ("skinny_linear_tile.cuh", "thread >> 2 & 6), column", "thread >> 2 & 4), column", "bulk"),
    ("skinny_linear_tile.cuh", "low ? c[2 + j] : c[j], 16", "low ? c[j] : c[2 + j], 16", "bulk gate"),
    ("skinny_linear_tile.cuh", "args.bias[args.columns + column]", "args.bias[column]", "bulk gate"),
    ("skinny_linear_tile.cuh", "odd ? y[h][0] : y[h][1], 4", "odd ? y[h][1] : y[h][0], 4", "copy"),
    ("skinny_linear_tile.cuh", "squares += low * low + high * high;", "squares += low * low;", "norm"),
    ("skinny_linear_tile.cuh", "high * to_float(gain.of[h].at[1])", "high * to_float(gain.of[h].at[0])", "norm"),
    ("skinny_linear.cu", "barrier_wait(full + slot, parity);", "", "bulk"),
    ("skinny_linear.cu", "barrier_wait(empty + slot, parity);", "", "bulk tiles"),
    ("skinny_linear.cu", "slot = 0, parity ^= 1;", "slot = 0;", "bulk tiles"),
    ("skinny_linear.cu", "if ((thread & 31) == 0) barrier_arrive(empty + slot);", "", "bulk tiles"),
    ("skinny_linear.cu", "unit = begin, tile += step", "unit = 0, tile += step + 1", "bulk tiles"),
    ("skinny_linear.cu", "unit != begin);", "unit > 1);", "bulk"),
    ("skinny_linear.cu", "units * rank / CLUSTER, end", "units * rank / 4, end", "bulk cluster"),
    ("skinny_linear.cu", "if (CLUSTER > 1 && rank < BLOCKS) barrier_wait_cluster(&received, 0);", "", "bulk cluster"),
    ("skinny_linear.cu", "if (from != rank) part =", "if (from == rank) part =", "bulk cluster"),
    ("skinny_linear.cu", "* (CLUSTER - 1) * THREADS * 16", "* CLUSTER * THREADS * 16", "bulk cluster"),
    ("skinny_linear.cu", "barrier_arrive(&scales_ready);", ";", "norm"),
    ("skinny_linear.cu", "sum.x / width + eps", "sum.x / width", "norm"),
    ("skinny_linear.cu", "part = i % 4; part < parts; part += 4", "part = i % 4; part < parts; part += 8", "norm"),
    ("skinny_linear.cu", "c[0] *= scale.x, c[1] *= scale.y", "c[0] *= scale.x, c[1] *= scale.x", "norm"),
    ("skinny_linear.cu", "sum += __shfl_xor_sync(0xffffffffu, sum, 8);", "", "norm"),
    ("skinny_linear.cu", "    ptx::bar_sync<SUBTILES * THREADS>(1);\n    for", "    for", "norm"),
    ("skinny_linear.cu", "+ rank) * ROWS + row] = sum", ") * ROWS + row] = sum", "norm cluster"),
    ("skinny_linear_copy.cu", "if (arrived == last - first) counters[tile] = 0;", "", "copy"),
    ("skinny_linear_copy.cu", "((int64_t)of * 2 + (of == first && late))", "((int64_t)of + (of == first && late))",
     "copy"),
    ("skinny_linear_copy.cu", "arrived != last - first) return", "arrived == last - first) return", "copy"),
    ("skinny_linear_copy.cu", "column + box * BOX < depth;\n        cp_async16(ring + slot * STAGE + BOXES",
     "true;\n        cp_async16(ring + slot * STAGE + BOXES", "copy"),
    ("skinny_linear_copy.cu", "row % 8 < 4 ? 0 : columns", "row % 8 < 4 ? columns : 0", "copy gate"),
    ("skinny_linear_copy.cu", "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES>();", "copy"),
]  # fmt: skip


def make(folder: Path, check: str, sources: build.Sources | None = None) -> EmulatedGpu:
    capability = (8, 0) if check.startswith("copy") else (9, 0)
    sms = 16 if check.startswith("norm") else 4
    return EmulatedGpu(folder, capability=capability, sms=sms, shared_memory=113 << 10, sources=sources, hasty=True)


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_pass(check: str, kernel_folder: Path) -> None:
    CHECKS[check](make(kernel_folder, check))


@pytest.mark.parametrize("at", range(len(MUTANTS)), ids=lambda i: f"{i}-{MUTANTS[i][0]}-{MUTANTS[i][3]}")
def test_a_mistake_is_noticed(at: int, kernel_folder: Path) -> None:
    check = MUTANTS[at][3]
    must_be_noticed(MUTANTS[at], lambda sources: CHECKS[check](make(kernel_folder, check, sources)))
