"""Sampling on an emulated GPU against the CPU's sampler: one block a row, and clusters."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmapi._kernels import sample_cuda
from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.sample_cuda import ROW, SampleKernels, nucleus_range
from llmapi._runtime.sampler import Sampler, SampleRow
from tests.emulator import cases
from tests.emulator.gpu import EmulatedGpu
from tests.gpu import test_sample as sample_tests

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["blocks", "clusters"])
def gpu(request: pytest.FixtureRequest, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where there are clusters, small rows are split too: few rows over more blocks."""
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)
    return EmulatedGpu(kernel_folder, capability=request.param, sms=16)


@pytest.mark.parametrize("edits", [False, True], ids=["plain", "edits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "n"), [(11, 100), (1000, 30), (5003, 8)])
def test_tokens_are_the_cpu_samplers(gpu: Any, vocab: int, n: int, dtype: torch.dtype, edits: bool) -> None:
    cases.sampling(gpu, vocab, n, dtype, edits=edits)


@pytest.mark.parametrize("split", [2, 4, 8])
def test_clusters(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch, split: int) -> None:
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)
    """So wide that every block has a part of the row."""
    n, vocab = 32 // split, 2100 * split
    gpu: Any = EmulatedGpu(kernel_folder, capability=(9, 0), sms=n * split)
    for edits in (False, True):
        cases.sampling(gpu, vocab, n, torch.float32, edits=edits)
    sample_tests.test_logprobs(gpu, vocab, torch.float32, n, cases.SEED)


def test_wide_rows(kernel_folder: Path) -> None:
    """A row that is split because it is large."""
    for capability in ((8, 0), (9, 0)):
        gpu = EmulatedGpu(kernel_folder, capability=capability, sms=2)
        cases.sampling(gpu, 70_001, 2, torch.float32, edits=True)


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ties(gpu: Any, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(cases.SEED)
    sample_tests.test_ties(gpu, n, dtype, cases.SEED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flat_rows(gpu: Any, dtype: torch.dtype) -> None:
    cases.flat_rows(gpu, dtype)


def test_greedy_ties(gpu: Any) -> None:
    cases.greedy_ties(gpu)


def test_failures_and_infinities(gpu: Any) -> None:
    sample_tests.test_failures_and_infinities(gpu)


@pytest.mark.parametrize(
    ("vocab", "n", "dtype"),
    [(vocab, n, dtype) for vocab, n in ((9, 12), (5003, 12)) for dtype in DTYPES] + [(5003, 1, torch.bfloat16)],
    ids=str,
)
def test_logprobs(gpu: Any, vocab: int, n: int, dtype: torch.dtype) -> None:
    sample_tests.test_logprobs(gpu, vocab, dtype, n, cases.SEED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "n"), [(11, 60), (1000, 30), (5003, 10)])
def test_masks(gpu: Any, vocab: int, n: int, dtype: torch.dtype) -> None:
    sample_tests.test_masks(gpu, vocab, n, dtype, cases.SEED)


def test_penalties_follow_the_output(gpu: Any) -> None:
    sample_tests.test_penalties_follow_the_output(gpu, cases.SEED)


def test_rows_that_need_the_host(gpu: Any) -> None:
    sample_tests.test_rows_that_need_the_host(gpu, cases.SEED)


def test_only_batches_with_an_edited_row_take_the_kernel_for_edits(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, n, dtype = 1000, 6, torch.float32
    first, later = (f(gpu, n, vocab, dtype) for f in (sample_cuda.units_for, sample_cuda.later_units_for))
    assert not set(first) & set(later) and {*first, *later} <= set(sample_cuda.units("float32"))
    asked: list[Unit] = []
    known = gpu.kernel
    monkeypatch.setattr(gpu, "kernel", lambda unit, *args, **more: (asked.append(unit), known(unit, *args, **more))[1])
    sampler, oracle = sample_tests.make(gpu, vocab, dtype, n), Sampler(vocab)
    assert asked == first
    raw = [sample_tests.row([0], seed=i, temperature=0.9, top_k=30) for i in range(n)]
    mixed = [*raw[:3], sample_tests.row([0], seed=9, logit_bias={7: 100.0}), *raw[3:5]]
    waiting = [*raw[:3], sample_tests.row([0], seed=9, end=(7,), min_tokens=2, logprobs=2)]  # may not end yet
    x = sample_tests.noise(n, vocab, cases.SEED, dtype, gpu.device)
    tokens: list[list[int]] = []

    def sample(rows: list[SampleRow], *, edited: bool) -> None:
        asked.clear()
        logits = x[: len(rows)].clone()
        if rows is waiting:
            logits[3, 7] = 1e4
        got, expected = sampler(logits, rows), oracle(logits, rows)
        tokens.append([s.token_ids[0] for s in got])
        assert tokens[-1] == [s.token_ids[0] for s in expected]
        assert [dict(u.defines)["EDITED"] for u in asked if u.source == "sample.cu"] == [str(int(edited))]
        assert [u.source for u in asked[1:]] == ["sample_logprobs.cu"] * (rows is waiting)
        assert set(asked) <= {*first, *later}

    sample(raw, edited=False)
    sample(mixed, edited=True)
    sample(raw, edited=False)
    assert tokens[0] == tokens[2] and tokens[1] == [*tokens[0][:3], 7, *tokens[1][4:]]
    sample(waiting, edited=True)
    waiting[3].sequence.token_ids.append(0)
    sample(waiting, edited=False)  # the same rows: one less is to be edited
    assert tokens[3][3] != 7 and tokens[4][3] == 7


def test_unaligned_rows_and_unused_ones(gpu: Any) -> None:
    vocab, n = 1000, 9
    for lead in range(8):
        wide = torch.full((n, vocab + 13), math.nan, dtype=torch.bfloat16)
        x = wide[:, lead : lead + vocab]
        x.copy_(sample_tests.noise(n, vocab, lead, torch.bfloat16, gpu.device))
        kernels = SampleKernels(gpu, vocab_size=vocab, max_rows=n, logits_dtype=torch.bfloat16)
        rows = [sample_tests.row([0], seed=i, temperature=0.9, top_k=30, top_p=0.8) for i in range(n)]
        table = np.zeros(n, dtype=ROW)
        table["used"], table["temperature"], table["top_k"], table["top_p"] = 1, 0.9, 30, int(0.8 * 2**53)
        table["seed"], table["counter"], table["range"] = np.arange(n), 1, nucleus_range(0.8, vocab)
        table["used"][::4] = 0
        ids = torch.full((n,), -7, dtype=torch.int32)
        kernels(x, torch.from_numpy(table.view(np.uint8)), ids, edited=False)
        expected = [s.token_ids[0] for s in Sampler(vocab)(x, rows)]
        expected[::4] = [-7] * len(expected[::4])
        assert ids.tolist() == expected, lead


def test_a_row_gives_the_same_token_in_any_split(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cuda, "_WORTH_A_BLOCK", 100)
    vocab, rng = 17_000, random.Random(cases.SEED)
    x = sample_tests.noise(8, vocab, cases.SEED, torch.float32, torch.device("cpu")) * 0.2
    rows = sample_tests.random_rows(8, vocab, rng, edits=True)
    tokens = []
    for sms in (1, 16, 32, 64):  # for 8 rows: clusters of 1, 2, 4, 8
        gpu: Any = EmulatedGpu(kernel_folder, capability=(9, 0), sms=sms)
        tokens.append([s.token_ids for s in sample_tests.make(gpu, vocab, torch.float32, 8)(x, rows)])
    assert all(t == tokens[0] for t in tokens)
