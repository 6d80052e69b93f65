"""Beam search's kernels on an emulated GPU against torch: one block a row, and clusters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._kernels import sample_cuda
from tests.emulator.cases import SEED
from tests.emulator.gpu import EmulatedGpu
from tests.gpu import test_beam as beam_tests

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["blocks", "clusters"])
def gpu(request: pytest.FixtureRequest, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where there are clusters, 24 small rows are split over two blocks each, and fewer over more."""
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)
    return EmulatedGpu(kernel_folder, capability=request.param, sms=48)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(vocab, dtype) for vocab in (7, 11, 5003) for dtype in DTYPES] + [(1000, torch.bfloat16)],
    ids=str,
)
def test_candidates(gpu: Any, vocab: int, dtype: torch.dtype) -> None:
    beam_tests.test_candidates(gpu, vocab, dtype, SEED)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=["turing", "clusters"])
def test_wide_rows(kernel_folder: Path, capability: tuple[int, int]) -> None:
    """Rows that are split because they are large; without max.NaN."""
    gpu: Any = EmulatedGpu(kernel_folder, capability=capability, sms=2)
    x = beam_tests.noise(3, 70_001, SEED, torch.float32)
    beam_tests.check(gpu, x, beam_tests.beam_scores(3, SEED), [(2, 8), (1, 1000)])


@pytest.mark.parametrize("request_", [(256, 512), (256, 1), (40, 1024), (9, 300)])
def test_many_beams(gpu: Any, request_: tuple[int, int]) -> None:
    for vocab in (11, 1100) if request_[0] == 40 else (61,):
        beam_tests.test_many_beams(gpu, vocab, request_, torch.float32, SEED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_candidates(gpu: Any, dtype: torch.dtype) -> None:
    """From the maxima of vectors, and where there are too few of these."""
    for vocab, k in ((16_500, 400), (9000, 400), (9000, 1000), (3000, 1024), (2100, 257)):
        x = beam_tests.noise(3, vocab, SEED, dtype)
        gpu.sms = 3
        beam_tests.check(gpu, x, beam_tests.beam_scores(3, SEED), [(2, k), (1, k)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [1003, 5003])
def test_ties(gpu: Any, vocab: int, dtype: torch.dtype) -> None:
    for sms in (1, 60):
        gpu.sms = sms
        beam_tests.test_ties(gpu, vocab, dtype, SEED)


def test_rows_in_order(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [(1, 8), (1, 256), (2, 400)]
    for sms in (1, 8):
        gpu.sms = sms
        x = beam_tests.noise(4, 9001, SEED, torch.float32).sort(dim=1).values
        for rows in (x, x.flip(1)):
            beam_tests.check(gpu, rows, beam_tests.beam_scores(4, SEED), requests)


def test_few_that_are_possible(gpu: Any) -> None:
    for sms in (1, 14):
        gpu.sms = sms
        beam_tests.few_possible(gpu, (20, 5003), SEED)


def test_wide_ranges(gpu: Any) -> None:
    beam_tests.test_wide_ranges(gpu, SEED)


def test_failures(gpu: Any) -> None:
    beam_tests.test_failures(gpu)


def test_unaligned_rows_and_unused_ones(gpu: Any) -> None:
    beam_tests.test_unaligned_rows_and_unused_ones(gpu, SEED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [40, 4096, 5003])
def test_edits(gpu: Any, vocab: int, dtype: torch.dtype) -> None:
    beam_tests.test_edits(gpu, vocab, dtype, SEED)


def test_an_edited_row_that_is_nan_fails(gpu: Any) -> None:
    beam_tests.test_an_edited_row_that_is_nan_fails(gpu)


def test_a_request_is_the_same_in_any_split(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)
    x, scores = beam_tests.noise(5, 17_000, SEED, torch.bfloat16), beam_tests.beam_scores(5, SEED)
    found = []
    for sms in (1, 10, 20, 40):  # for 5 rows: clusters of 1, 2, 4, 8
        gpu: Any = EmulatedGpu(kernel_folder, capability=(9, 0), sms=sms)
        out, constants = beam_tests.run(gpu, x, scores, [(4, 8), (1, 200)])
        beam_tests.compare(x, scores, [(4, 8), (1, 200)], out, constants, f"{sms} multiprocessors")
        found.append([*(getattr(out, f.name) for f in dataclasses.fields(out)), constants])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_limits(gpu: Any) -> None:
    beam_tests.test_limits(gpu)


@pytest.mark.parametrize("shape", [(1, 2), (4, 8), (5, 20), (31, 62), (33, 400), (256, 512), (256, 1024)], ids=str)
def test_choices(gpu: Any, shape: tuple[int, int]) -> None:
    beam_tests.test_choices(gpu, shape, SEED)


@pytest.mark.parametrize(("width", "k"), [(1, 2), (2, 4), (4, 12), (33, 100), (256, 1024)])
def test_books(gpu: Any, width: int, k: int) -> None:
    beam_tests.test_books(gpu, width, k, SEED)


@pytest.mark.parametrize(("width", "block_size"), [(1, 16), (37, 16), (300, 8), (5000, 1)])
def test_moves(gpu: Any, width: int, block_size: int) -> None:
    beam_tests.test_moves(gpu, width, block_size, SEED)


def test_carried_scores(gpu: Any) -> None:
    beam_tests.test_carried_scores(gpu, SEED)


@pytest.mark.parametrize("vocab", [5, 1001, 5000])
def test_counts(gpu: Any, vocab: int) -> None:
    beam_tests.test_counts(gpu, vocab, SEED)
