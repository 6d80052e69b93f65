"""Beam search's kernels against torch: the same candidates in the same order, the same tables and copies."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from llmapi._kernels.beam import candidates, log_softmax, move_tables, request_rows
from llmapi._kernels.beam_cuda import MAX_CANDIDATES, BeamKernels, Candidates, settings
from llmapi._kernels.beam_reorder_cuda import (
    BEAM_CHOICE,
    BEAM_FINISH,
    BEAM_MOVE,
    BEAM_TALLY,
    choose_beams,
    finish_beams,
    move_beams,
    move_counts,
)
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.sample_cuda import EDIT
from llmapi._runtime.beam import Beams, seats

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LOG_SUM = 1.5e-6  # error of a row's log-sum, absolute: ex2.approx, its argument, and float32's own rounding up to 12


def noise(n: int, vocab: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows from nearly flat to steep, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, generator=g) * 7.5 + 0.5
    return (torch.randn(n, vocab, generator=g) * scale).to(dtype)


def beam_scores(n: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return -20 - spread * torch.rand(n, generator=torch.Generator().manual_seed(seed))


def as_bytes(table: Any, gpu: Gpu) -> torch.Tensor:
    return torch.from_numpy(table.view(np.uint8).copy()).to(gpu.device)


def to_cpu(out: Candidates) -> Candidates:
    return Candidates(*(getattr(out, f.name).cpu() for f in dataclasses.fields(out)))


def run(
    gpu: Gpu, x: torch.Tensor, scores: torch.Tensor, requests: list[tuple[int, int]], *, rows: Any = None,
    table: Any = None, edits: Any = None, width: int | None = None, carried: torch.Tensor | None = None,
) -> tuple[Candidates, torch.Tensor]:  # fmt: skip
    """The kernels' candidates and each row's constants, on the CPU.

    Args:
        gpu: where.
        x: ``[N, V]`` logits on the CPU.
        scores: ``[N]``.
        requests: rows and candidates of each.
        rows, table: settings, if not those of the requests.
        edits: of ``EDIT``.
        width: columns of the results, if more than needed.
        carried: scores that settings of rows name.
    """
    own_rows, own_table = settings(requests)
    rows, table = own_rows if rows is None else rows, own_table if table is None else table
    most = max(k for _, k in requests)
    kernels = BeamKernels(gpu, vocab_size=x.shape[1], max_rows=len(x), max_candidates=most, logits_dtype=x.dtype)
    out = Candidates.empty(len(table), width or most, gpu.device)
    for field in dataclasses.fields(out):
        getattr(out, field.name).fill_(-77)
    kernels(
        on_device(x, gpu), scores.to(gpu.device), as_bytes(rows, gpu), as_bytes(table, gpu), out,
        edits=None if edits is None else as_bytes(edits, gpu),
        carried=None if carried is None else carried.to(gpu.device),
    )  # fmt: skip
    return to_cpu(out), kernels.row_constants(len(x)).cpu()


def on_device(x: torch.Tensor, gpu: Gpu) -> torch.Tensor:
    """With the same strides and the same offset in its storage, whose other elements are NaN."""
    if gpu.device.type == "cpu":
        return x
    size = x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    flat = torch.full((size,), math.nan, dtype=x.dtype, device=gpu.device)
    out = flat.as_strided(x.shape, x.stride(), x.storage_offset())
    out.copy_(x)
    return out


def compare(
    x: torch.Tensor, scores: torch.Tensor, requests: list[tuple[int, int]], got: Candidates, constants: torch.Tensor,
    note: str, logprobs: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """The rows' sums within rounding, and everything that follows from them to the bit.

    Args:
        x, scores, requests: as given.
        got, constants: as found.
        note: for messages.
        logprobs: edited ones, if there are edits.
    """
    exact = x.double().logsumexp(1)
    off = (constants.double().sum(1) - exact).abs()
    assert torch.equal(constants[:, 0], x.float().amax(1)), note
    allowed = LOG_SUM + 2.0**-24 * x.double().abs().amax(1)
    assert bool((off <= allowed).all()), f"{note}: log-sum off by {float(off.max())}"
    raw = log_softmax(x, constants)
    edited = raw if logprobs is None else logprobs
    for q, own in enumerate(request_rows(requests)):
        k = requests[q][1]
        values, tokens, beams = candidates(edited[own], scores[own], k)
        where = f"{note} request {q} of {requests[q]}"
        assert int(got.reasons[q]) == 0, where
        assert torch.equal(got.tokens[q, :k], tokens), f"{where}: {got.tokens[q, :k]} {tokens}"
        assert torch.equal(got.beams[q, :k], beams), where
        assert torch.equal(got.scores[q, :k], values), where
        plain = torch.full((k,), -torch.inf)
        there = tokens >= 0
        plain[there] = raw[own][beams[there].long(), tokens[there].long()]
        assert torch.equal(got.logprobs[q, :k], plain), where
        assert (got.tokens[q, k:] == -77).all() and (got.scores[q, k:] == -77).all(), where


def check(gpu: Gpu, x: torch.Tensor, scores: torch.Tensor, requests: list[tuple[int, int]], note: str = "") -> None:
    before = x.clone()
    got, constants = run(gpu, x, scores, requests)
    compare(x, scores, requests, got, constants, f"{note} {list(x.shape)} {x.dtype}")
    assert torch.equal(x, before) or bool(x.isnan().any())


MIXED = [(4, 8), (1, 8), (1, 1), (3, 12), (2, 1), (8, 16), (5, 300)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [7, 11, 1000, 5003, 32_000, 50_257, 128_256])
def test_candidates(gpu: Gpu, vocab: int, dtype: torch.dtype, seed: int) -> None:
    n = sum(r for r, _ in MIXED)
    check(gpu, noise(n, vocab, seed, dtype), beam_scores(n, seed), MIXED, f"seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "request_"),
    [(32_000, (256, 512)), (50_257, (100, 1024)), (128_256, (16, 256)), (128_256, (256, 512)), (40, (256, 1024))],
)
def test_many_beams(gpu: Gpu, vocab: int, request_: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    for spread in (0.1, 40.0):
        x = noise(request_[0], vocab, seed, dtype)
        check(gpu, x, beam_scores(len(x), seed, spread), [request_], f"seed {seed} spread {spread}")


def tied_rows(n: int, vocab: int, rng: random.Random, dtype: torch.dtype) -> torch.Tensor:
    """Of few distinct values."""
    levels = torch.tensor([0.0, -0.0, 1.0, 1.001, 1.002, -2.0, 1e-30, -1e-30, -torch.inf])
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    x = torch.zeros(n, vocab, dtype=dtype)
    for i in range(n):
        some = levels[: rng.randrange(1, 10)]
        x[i] = some[torch.randint(len(some), (vocab,), generator=g)].to(dtype)
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [1003, 40_000])
def test_ties(gpu: Gpu, vocab: int, dtype: torch.dtype, seed: int) -> None:
    """Equal values within rows and across them, and scores so large that a row's tokens become equal."""
    rng = random.Random(seed)
    requests = [(4, 8), (1, 1024), (2, 300), (4, 900), (1, 1), (3, 16)]
    n = sum(r for r, _ in requests)
    for x in (torch.zeros(n, vocab, dtype=dtype), tied_rows(n, vocab, rng, dtype)):
        for scores in (torch.zeros(n), torch.tensor([rng.choice([-1e9, -3.0, 0.0, -torch.inf]) for _ in range(n)])):
            check(gpu, x, scores, requests, f"seed {seed}")
    check(gpu, noise(n, vocab, seed, dtype), torch.full((n,), -1e9), requests, f"seed {seed}")


def test_rows_in_order(gpu: Gpu, seed: int) -> None:
    """What is best lies together: in a few vectors, in one warp's part, in one block's."""
    requests = [(1, 8), (2, 256), (1, 257), (1, 1024), (2, 512)]
    n = sum(r for r, _ in requests)
    for vocab in (9001, 70_000):
        x = noise(n, vocab, seed, torch.float32).sort(dim=1).values
        check(gpu, x, beam_scores(n, seed), requests, f"seed {seed} rising")
        check(gpu, x.flip(1), beam_scores(n, seed), requests, f"seed {seed} falling")
        peak = torch.full((n, vocab), -1.0)
        peak[:, vocab // 3 : vocab // 3 + 700] = torch.arange(700.0) / 50
        check(gpu, peak, beam_scores(n, seed), requests, f"seed {seed} peak")


def test_few_that_are_possible(gpu: Gpu, seed: int) -> None:
    few_possible(gpu, (20, 5003, 66_000), seed)


def few_possible(gpu: Gpu, vocabs: tuple[int, ...], seed: int) -> None:
    """Fewer finite values than candidates: those of -inf follow, by beam and token."""
    requests = [(1, 8), (2, 300), (4, 8)]
    n = sum(r for r, _ in requests)
    for vocab in vocabs:
        x = torch.full((n, vocab), -torch.inf)
        for row in range(n):
            x[row, torch.randperm(vocab)[: 1 + row]] = torch.randn(1 + row)
        for scores in (beam_scores(n, seed), torch.full((n,), -torch.inf)):
            check(gpu, x, scores, requests, f"seed {seed}")


def test_wide_ranges(gpu: Gpu, seed: int) -> None:
    requests = [(2, 8), (1, 300), (3, 4)]
    n = sum(r for r, _ in requests)
    for scale in (1e-6, 1e4, 3e36):
        x = noise(n, 6000, seed, torch.float32) * scale
        check(gpu, x, beam_scores(n, seed), requests, f"seed {seed} scale {scale}")


def test_failures(gpu: Gpu) -> None:
    """A failed row fails its request, and no other."""
    for vocab in (12, 2048, 5003):
        x = noise(14, vocab, 3, torch.float32)
        scores = beam_scores(14, 3)
        x[1, 4] = x[1, 11] = math.nan
        x[3, 7] = math.inf
        x[5] = -math.inf
        scores[7], scores[9] = math.nan, math.inf
        x[10, 0], x[11, 1] = math.inf, math.nan
        x[12, 3] = math.inf
        x[12, 4] = math.nan
        requests = [(2, 8)] * 7
        got, constants = run(gpu, x, scores, requests, width=9)
        assert got.reasons.tolist() == [2, -2, -1, -3, -3, -2, 1]
        for q in range(7):
            reason = int(got.reasons[q])
            assert got.tokens[q].tolist() == [reason] + [-1] * 7 + [-77] and got.beams[q].tolist() == [-1] * 8 + [-77]
            assert got.scores[q, 1:8].tolist() == [-math.inf] * 7 and got.logprobs[q, :8].tolist() == [-math.inf] * 8
            assert math.isnan(float(got.scores[q, 0]))
        good = noise(4, vocab, 4, torch.float32)
        good[2, 1] = math.nan
        requests = [(1, 8), (1, 3), (2, 5)]
        got, constants = run(gpu, good, scores[:4], requests)
        assert got.reasons.tolist() == [0, 0, 1]
        keep = [Candidates(*(getattr(got, f.name)[:2] for f in dataclasses.fields(got)))]
        compare(good[:2], scores[:2], requests[:2], keep[0], constants[:2], "beside a failed one")
        many = noise(60, vocab, 5, torch.float32)
        for row in range(7, 60):
            many[row, : 1 + row % 5] = math.nan
        assert run(gpu, many, torch.zeros(60), [(60, 4)])[0].reasons.tolist() == [3]


def test_unaligned_rows_and_unused_ones(gpu: Gpu, seed: int) -> None:
    """Any start of a row; rows between requests that are not used; requests in another order than their rows."""
    vocab = 2500
    for dtype in (torch.bfloat16, torch.float32):
        for lead in range(0, 8, 1 if dtype == torch.bfloat16 else 3):
            wide = torch.full((9, vocab + 13), math.nan, dtype=dtype)
            x = wide[:, lead : lead + vocab]
            x.copy_(noise(9, vocab, seed + lead, dtype))
            scores = beam_scores(9, seed)
            requests = [(4, 8), (1, 1), (3, 7), (1, 5)]
            rows, table = settings(requests)
            rows["used"][4] = 0
            x[4] = math.nan
            order = np.array([3, 0, 2])
            table = np.concatenate([table[order], np.zeros(1, dtype=table.dtype)])
            got, constants = run(gpu, x, scores, requests, rows=rows, table=table)
            assert got.reasons.tolist()[3] == -77 and (got.tokens[3] == -77).all()
            slices = request_rows(requests)
            for at, q in enumerate(order):
                only = Candidates(*(getattr(got, f.name)[at : at + 1] for f in dataclasses.fields(got)))
                own = slices[q]
                compare(x[own], scores[own], [requests[q]], only, constants[own], f"seed {seed} lead {lead}")


def edited(lp: torch.Tensor, row: Any, counts: torch.Tensor | None, edits: Any) -> torch.Tensor:
    """One row's log probabilities, edited."""
    lp = lp.clone()
    for entry in edits[row["edits"] : row["bans"]]:
        lp[int(entry["id"])] += float(entry["value"])
    lp[torch.from_numpy(edits["id"][row["bans"] : row["edits_end"]].astype(np.int64))] = -torch.inf
    if row["penalized"]:
        assert counts is not None
        repetition, frequency, presence = (torch.tensor(row[n]) for n in ("repetition", "frequency", "presence"))
        lp = torch.where(counts != 0, torch.where(lp < 0, lp * repetition, lp / repetition), lp)
        output = counts & 0x7FFFFFFF
        lp = torch.where(output > 0, lp - (frequency * output.float() + presence), lp)
    return lp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [40, 4096, 5003, 128_256])
def test_edits(gpu: Gpu, vocab: int, dtype: torch.dtype, seed: int) -> None:
    """Bias, bans and penalties upon log probabilities; rows that are given; rows without any."""
    rng = random.Random(seed)
    requests = [(4, 8), (1, 8), (3, 300), (2, 4), (4, 8)]
    n = sum(r for r, _ in requests)
    x, scores = noise(n, vocab, seed, dtype), beam_scores(n, seed)
    rows, _ = settings(requests)
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(-6, 4, (n, vocab), generator=g, dtype=torch.int32).clamp(min=0)
    counts |= torch.where(torch.rand(n, vocab, generator=g) < 0.2, -(1 << 31), 0).to(torch.int32)
    scratch = torch.full((n, vocab), math.nan, device=gpu.device)
    table = counts.to(gpu.device)
    edits = np.zeros(0, dtype=EDIT)
    _, constants = run(gpu, x, scores, requests)
    raw = log_softmax(x, constants)
    expected = raw.clone()
    for i, row in enumerate(rows):
        kind = rng.choice(["none", "lists", "penalties", "both", "given", "all banned"])
        if kind == "none":
            continue
        row["edited"] = scratch[i].data_ptr()
        row["edits"] = row["bans"] = row["edits_end"] = len(edits)
        if kind == "given":
            expected[i] = torch.randn(vocab, generator=g) * 3
            scratch[i] = expected[i]
            row["given"] = 1
            continue
        if kind in ("lists", "both"):
            bias = np.zeros(rng.randrange(20), dtype=EDIT)
            bias["id"], bias["value"] = rng.sample(range(vocab), len(bias)), [rng.uniform(-9, 9) for _ in bias]
            bans = np.zeros(rng.randrange(1, 20), dtype=EDIT)
            bans["id"] = rng.sample(range(vocab), len(bans))
            row["bans"], row["edits_end"] = len(edits) + len(bias), len(edits) + len(bias) + len(bans)
            edits = np.concatenate([edits, bias, bans])
        if kind == "all banned":
            bans = np.zeros(vocab, dtype=EDIT)
            bans["id"] = np.arange(vocab)
            row["edits_end"] = len(edits) + vocab
            edits = np.concatenate([edits, bans])
        if kind in ("penalties", "both"):
            row["counts"], row["penalized"] = table[i].data_ptr(), 1
            row["repetition"], row["presence"] = rng.choice([0.7, 1.0, 1.3]), rng.uniform(-2, 2)
            row["frequency"] = rng.uniform(-2, 2)
        expected[i] = edited(raw[i], row, counts[i], edits)
    got, constants = run(gpu, x, scores, requests, rows=rows, edits=edits if len(edits) else None)
    compare(x, scores, requests, got, constants, f"seed {seed}", expected)
    assert torch.equal(table.cpu(), counts)


def test_an_edited_row_that_is_nan_fails(gpu: Gpu) -> None:
    x, scores = noise(3, 3000, 1, torch.float32), torch.zeros(3)
    rows, _ = settings([(2, 4), (1, 4)])
    given = torch.zeros(3000, device=gpu.device)
    given[2900] = math.nan
    rows["edited"][1], rows["given"][1] = given.data_ptr(), 1
    got, _ = run(gpu, x, scores, [(2, 4), (1, 4)], rows=rows)
    assert got.reasons.tolist() == [-3, 0] and got.tokens[0].tolist() == [-3, -1, -1, -1] and (got.tokens[1] >= 0).all()


@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_a_request_is_the_same_in_any_batch(gpu: Gpu, vocab: int, seed: int) -> None:
    """Alone, where its rows are split over more blocks, to the bit."""
    x, scores = noise(160, vocab, seed, torch.bfloat16), beam_scores(160, seed)
    all_, _ = run(gpu, x, scores, [(4, 8)] * 40)
    for q in (0, 7, 39):
        own = slice(4 * q, 4 * q + 4)
        alone, _ = run(gpu, x[own], scores[own], [(4, 8)])
        for field in dataclasses.fields(alone):
            assert torch.equal(getattr(alone, field.name)[0], getattr(all_, field.name)[q]), f"seed {seed} {field.name}"


def test_graphs(gpu: Gpu, seed: int) -> None:
    """Captured once, replayed with other logits, scores and settings."""
    vocab, n = 32_000, 64
    kernels = BeamKernels(gpu, vocab_size=vocab, max_rows=n, max_candidates=16, logits_dtype=torch.bfloat16)
    x = torch.zeros(n, vocab, dtype=torch.bfloat16, device=gpu.device)
    scores = torch.zeros(n, device=gpu.device)
    rows, table = (as_bytes(t, gpu) for t in settings([(4, 8)] * 16))
    out = Candidates.empty(16, 16, gpu.device)
    kernels(x, scores, rows, table, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels(x, scores, rows, table, out)
    for attempt, requests in enumerate([[(4, 8)] * 16, [(2, 16)] * 16, [(8, 3)] * 8]):
        count = sum(r for r, _ in requests)
        fresh, values = noise(n, vocab, seed + attempt, torch.bfloat16), beam_scores(n, seed + attempt)
        own, queue = settings(requests)
        rows.zero_()
        table.zero_()
        rows[: own.nbytes], table[: queue.nbytes] = as_bytes(own, gpu), as_bytes(queue, gpu)
        x.copy_(fresh)
        scores.copy_(values)
        for field in dataclasses.fields(out):
            getattr(out, field.name).fill_(-77)
        graph.replay()
        torch.cuda.synchronize()
        compare(
            fresh[:count], values[:count], requests, to_cpu(out), kernels.row_constants(n).cpu()[:count],
            f"seed {seed} replay {attempt}",
        )  # fmt: skip


def test_limits(gpu: Gpu) -> None:
    with pytest.raises(ValueError, match="257 beams"):
        settings([(257, 4)])
    with pytest.raises(ValueError, match="1025 candidates"):
        settings([(4, MAX_CANDIDATES + 1)])
    with pytest.raises(ValueError, match="max_candidates=1025"):
        BeamKernels(gpu, vocab_size=9, max_rows=1, max_candidates=1025, logits_dtype=torch.float32)
    kernels = BeamKernels(gpu, vocab_size=9, max_rows=2, max_candidates=4, logits_dtype=torch.float32)
    rows, table = (as_bytes(t, gpu) for t in settings([(4, 4)]))
    with pytest.raises(ValueError, match="4 rows"):
        kernels(
            torch.zeros(4, 9, device=gpu.device), torch.zeros(4, device=gpu.device), rows, table,
            Candidates.empty(1, 4, gpu.device),
        )  # fmt: skip


# ---- between steps


def random_candidates(rng: random.Random, rows: int, k: int, kind: str) -> tuple[list[float], list[int], list[int]]:
    """Scores, tokens and rows of a search, best first.

    Args:
        kind: "usual"; "ties", equal scores and tokens; "ends", many of the tokens that end; "few", too few that are
            possible; "failed", NaN first.
    """
    count = k if kind != "few" else rng.randrange(rows)
    scores = sorted(
        (-rng.choice([1.0, 2.0]) if kind == "ties" else -9 * rng.random() for _ in range(count)), reverse=True
    )
    scores += [-math.inf] * (k - count)
    if kind == "failed":
        scores[0] = math.nan
    tokens = [rng.randrange(6 if kind in ("ties", "ends") else 1000) for _ in range(k)]
    favourites = rng.sample(range(rows), rng.randint(1, rows))
    parents = [rng.choice(favourites) if i < count else -1 for i in range(k)]
    return scores, tokens, parents


def expected_choice(
    scores: list[float], tokens: list[int], parents: list[int], rows: int, ends: list[int]
) -> list[tuple[int, int, float]]:
    """Parent, token and score of each row."""
    good = [i for i, s in enumerate(scores) if s > -math.inf and tokens[i] not in ends][:rows]
    if math.isnan(scores[0]) or len(good) < rows:
        return [(row, 0, 0.0) for row in range(rows)]
    by_row, late = seats([parents[i] for i in good], rows)
    assert not late
    return [(parents[i], tokens[i], scores[i]) for i in (good[rank] for rank in by_row if rank is not None)]


KINDS = ["usual", "ties", "ends", "few", "failed"]


@pytest.mark.parametrize(
    "shape", [(1, 2), (2, 4), (4, 8), (5, 20), (31, 62), (33, 400), (256, 512), (256, 1024)], ids=str
)
def test_choices(gpu: Gpu, shape: tuple[int, int], seed: int) -> None:
    """Continuations and their rows, of searches in another order than their candidates, one without an own place."""
    rng = random.Random(seed)
    for attempt in range(3):
        kinds = [*KINDS, *rng.choices(KINDS, k=4)]
        shapes = [shape if i < 5 else (rng.randint(1, 9), rng.randint(18, shape[1] + 18)) for i in range(len(kinds))]
        width = max(k for _, k in shapes) + attempt
        planes = torch.full((3, len(kinds), width), -7, dtype=torch.int32)
        choices = np.zeros(len(kinds), dtype=BEAM_CHOICE)
        ends: list[int] = []
        expected: list[tuple[int, int, float]] = []
        order = rng.sample(range(len(kinds)), len(kinds))
        for at, place in enumerate(order):
            rows, k = shapes[at]
            found = random_candidates(rng, rows, k, kinds[at])
            planes[0, place, :k] = torch.tensor(found[0]).view(torch.int32)
            planes[1:, place, :k] = torch.tensor(found[1:], dtype=torch.int32)
            own = rng.sample(range(6), 1 if kinds[at] == "ties" else rng.randint(0, 3))
            choices[at] = (place, rows, k, len(expected), len(ends), len(ends) + len(own), 0)
            ends += own
            scores = torch.tensor(found[0]).tolist()
            expected += expected_choice(scores, found[1], found[2], rows, own)
        chosen = torch.full((3, len(expected) + 2), -5, dtype=torch.int32, device=gpu.device)
        listed = torch.tensor([*ends, -1], dtype=torch.int32, device=gpu.device)
        choose_beams(gpu, planes.to(gpu.device), as_bytes(choices, gpu), listed, chosen)
        chosen = chosen.cpu()
        told = zip(chosen[0].tolist(), chosen[1].tolist(), chosen[2].view(torch.float32).tolist(), strict=True)
        assert list(told)[:-2] == expected, f"seed {seed} attempt {attempt}"
        assert (chosen[:, -2:] == -5).all()


@pytest.mark.parametrize(("width", "k"), [(1, 2), (2, 4), (4, 12), (33, 100), (256, 1024)])
def test_books(gpu: Gpu, width: int, k: int, seed: int) -> None:
    """Who has ended, and when it is over, step after step, as the rules in plain numbers have it. Searches change
    places; some are met again by the host, and of some the host keeps the books."""
    rng = random.Random(seed)
    searches: list[Beams] = []
    places: list[tuple[Beams, int]] = []  # of searches among the results of the last step
    before: torch.Tensor | None = None
    ended = 0
    for step in range(60 if width <= 4 else 12):
        searches = [s for s in searches if not s.over]
        while len(searches) < 7:
            early: Any = rng.choice([True, False, "never"])
            penalty = rng.choice([1.0, 0.0, 2.0, 0.6, -0.5])
            searches.append(
                Beams(width if len(searches) < 5 else rng.randint(1, width), penalty, early, rng.randint(1, 9))
            )
        rng.shuffle(searches)
        planes = torch.full((3, 7, k + step % 5), -7, dtype=torch.int32)
        choices, finishes = np.zeros(7, dtype=BEAM_CHOICE), np.zeros(7, dtype=BEAM_FINISH)
        ends: list[int] = []
        given: list[float] = []
        found = []
        for at, (own, place) in enumerate(zip(searches, rng.sample(range(7), 7), strict=True)):
            drawn = random_candidates(rng, own.width, k, rng.choice(["usual", "ties", "ends", "ends", "few"]))
            lower = rng.choice([0, 0, 4, 20])
            found.append(([score - lower for score in drawn[0]], *drawn[1:]))
            planes[0, place, :k] = torch.tensor(found[-1][0]).view(torch.int32)
            planes[1:, place, :k] = torch.tensor(found[-1][1:], dtype=torch.int32)
            choices[at] = (place, own.width, k, len(given), len(ends), len(ends) + 2, 0)
            ends += [2, 4]
            how, carried = own.finishing(0), next((slot + 1 for other, slot in places if other is own), 0)
            carried *= rng.random() < 0.8
            finishes[at] = (how.norm, how.settle, how.last, how.always, carried, 0)
            known = how.worths + [-math.inf] * (own.width - len(how.worths))
            given += [math.nan] * own.width if carried else known
        held = rng.randrange(7)
        finishes[held]["norm"] = 0
        worths = torch.full((len(given) + 1,), 5.0, dtype=torch.float64, device=gpu.device)
        records = torch.full((7, 3 + width), -9, dtype=torch.int32, device=gpu.device)
        listed = torch.tensor([*ends, -1], dtype=torch.int32, device=gpu.device)
        finish_beams(
            gpu, planes.to(gpu.device), as_bytes(choices, gpu), listed, as_bytes(finishes, gpu), before=before,
            given=torch.tensor(given, dtype=torch.float64, device=gpu.device), worths=worths, records=records,
        )  # fmt: skip
        told, numbers, places = worths.tolist(), records.tolist(), []
        for at, own in enumerate(searches):
            scores, tokens, rows = torch.tensor(found[at][0]).tolist(), found[at][1], found[at][2]
            slot, follower = int(choices[at]["slot"]), copy.deepcopy(own)
            ranks, new = own.advance(scores, rows, tokens, frozenset([2, 4]))
            if at == held:
                assert set(numbers[at]) == {-9} and set(told[slot : slot + own.width]) == {5.0}
                continue
            places.append((own, slot))
            assert told[slot : slot + own.width] == worths_of(own) + [-math.inf] * (own.width - len(own.finished))
            assert numbers[at][2 + own.width :] == [-9] * (1 + width - own.width)
            assert follower.follow(numbers[at], scores, rows, tokens, frozenset([2, 4]))[0] == ranks
            assert bool(numbers[at][0] & 1) == bool(new), f"seed {seed} step {step}"
            assert (follower.over, books_of(follower)) == (own.over, books_of(own)), f"seed {seed} step {step}"
            ended += own.over
        assert told[-1] == 5.0
        before = worths
    assert ended > 10


def worths_of(beams: Beams) -> list[float]:
    return [one.score for one in beams.finished]


def books_of(beams: Beams) -> list[tuple[Any, ...]]:
    return [(f.score, f.cumulative, f.row, f.token, f.reason, f.stop) for f in beams.finished]


def random_parents(rng: random.Random, rows: int) -> list[int]:
    """Where each row goes on from; who has a continuation stays."""
    by_row, _ = seats(parents := [rng.randrange(rows) for _ in range(rows)], rows)
    return [parents[rank] for rank in by_row if rank is not None]


@pytest.mark.parametrize(("width", "block_size"), [(1, 16), (37, 16), (300, 8), (5000, 1)])
def test_moves(gpu: Gpu, width: int, block_size: int, seed: int) -> None:
    """Tables and blocks that are begun, of searches between other rows, in another order than their parents."""
    rng = random.Random(seed)
    for shapes in ([4] * 5, [1, 256, 3], [rng.randrange(1, 9) for _ in range(20)], [44]):
        n = sum(shapes) + len(shapes)
        if n * width > 400_000:
            continue
        size, token = n * width, 32
        table = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).int().view(n, width)
        blocks = size if width < 40 else n
        if blocks < size:  # only last blocks are in the caches; the others are numbers
            table += blocks
        lens = torch.zeros(n, dtype=torch.int32)
        moves = np.zeros(len(shapes), dtype=BEAM_MOVE)
        parents = torch.zeros(sum(shapes), dtype=torch.int32)
        caches = [
            torch.randn(blocks, block_size, token // 4, generator=torch.Generator().manual_seed(i)) for i in range(2)
        ]
        expected, moved, row = table.clone(), [c.clone() for c in caches], 0
        slots = rng.sample(range(len(shapes)), len(shapes))
        for at, rows in enumerate(shapes):
            slot, row = sum(shapes[s] for s in slots[: slots.index(at)]), row + 1
            length = rng.choice([0, 1, block_size, rng.randrange(width * block_size), width * block_size - 1])
            length = min(length, width * block_size - 1)
            lens[row : row + rows] = length + 1
            own = random_parents(rng, rows)
            parents[slot : slot + rows] = torch.tensor(own)
            if blocks < size:
                table[row : row + rows, length // block_size] = torch.arange(row, row + rows)
            expected[row : row + rows] = table[row : row + rows]
            moves[at] = (row, rows, slot, 0)
            for source, target in move_tables(expected[row : row + rows], own, length, block_size):
                for cache in moved:
                    cache[target, : length % block_size] = cache[source, : length % block_size].clone()
            row += rows
        here, there = table.to(gpu.device), [c.to(gpu.device) for c in caches]
        addresses = torch.tensor([c.data_ptr() for c in there], device=gpu.device)
        move_beams(
            gpu, here, addresses, moves=as_bytes(moves, gpu), most_rows=max(shapes), parents=parents.to(gpu.device),
            seq_lens=lens.to(gpu.device), block_size=block_size, token_bytes=token,
        )  # fmt: skip
        note = f"seed {seed} {shapes} {width} {block_size}"
        assert torch.equal(here.cpu(), expected), note
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there, moved, strict=True)), note


def test_carried_scores(gpu: Gpu, seed: int) -> None:
    """Scores that the step before left on the device give what the same scores from the host give."""
    x, scores = noise(9, 3000, seed, torch.float32), beam_scores(9, seed)
    requests = [(4, 8), (1, 3), (4, 8)]
    rows, _ = settings(requests)
    carried, given = torch.full((11,), math.nan), scores.clone()
    for row, place in ((0, 7), (1, 2), (2, 0), (3, 10), (4, 5)):
        rows["carried"][row], carried[place], given[row] = place + 1, scores[row], math.nan
    out, constants = run(gpu, x, given, requests, rows=rows, carried=carried)
    compare(x, scores, requests, out, constants, f"seed {seed}")


@pytest.mark.parametrize("vocab", [5, 1001, 5000])
def test_counts(gpu: Gpu, vocab: int, seed: int) -> None:
    """Counts of searches in another order than their parents; tokens at the ends of a block's part, and none."""
    rng = random.Random(seed)
    for shapes in ([4] * 5, [1, 9, 3], [rng.randrange(1, 9) for _ in range(6)], [256] if vocab < 5000 else [33]):
        total, tallies = sum(shapes), np.zeros(len(shapes), dtype=BEAM_TALLY)
        parents, tokens = torch.zeros(2, total, dtype=torch.int32)
        tables = [torch.randint(-(1 << 31), 1 << 30, (rows, vocab), dtype=torch.int32) for rows in shapes]
        there = [table.to(gpu.device) for table in tables]
        slots = rng.sample(range(len(shapes)), len(shapes))
        for at, rows in enumerate(shapes):
            slot = sum(shapes[s] for s in slots[: slots.index(at)])
            own, part = random_parents(rng, rows), 4096 // max(shapes)
            chosen = [rng.choice([-1, 0, vocab - 1, min(part, vocab) - 1, rng.randrange(vocab)]) for _ in own]
            parents[slot : slot + rows], tokens[slot : slot + rows] = torch.tensor(own), torch.tensor(chosen)
            tallies[at] = (there[at].data_ptr(), rows, slot)
            tables[at] = tables[at][own]
            for row, token in enumerate(chosen):
                if token >= 0:
                    tables[at][row, token] += 1
        move_counts(
            gpu, as_bytes(tallies, gpu), most_rows=max(shapes), parents=parents.to(gpu.device),
            tokens=tokens.to(gpu.device), vocab_size=vocab,
        )  # fmt: skip
        for number, (found, expected) in enumerate(zip(there, tables, strict=True)):
            assert torch.equal(found.cpu(), expected), f"seed {seed} {shapes} {number}"
