"""Beam search's kernels against torch: the same candidates in the same order, the same tables and copies."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from llmapi._kernels.beam import candidates, log_softmax, request_rows
from llmapi._kernels.beam import reorder_tables as reference_tables
from llmapi._kernels.beam_cuda import (
    MAX_CANDIDATES,
    BeamKernels,
    Candidates,
    reorder_counts,
    reorder_tables,
    settings,
)
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.sample_cuda import EDIT
from llmapi._kernels.step_cuda import copy_blocks

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
    table: Any = None, edits: Any = None, width: int | None = None,
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
            assert got.tokens[q].tolist() == [-1] * 8 + [-77] and got.beams[q].tolist() == [-1] * 8 + [-77]
            assert got.scores[q, :8].tolist() == got.logprobs[q, :8].tolist() == [-math.inf] * 8
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
    assert got.reasons.tolist() == [-3, 0] and (got.tokens[0] == -1).all() and (got.tokens[1] >= 0).all()


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


def random_step(
    rng: random.Random, requests: list[tuple[int, int]], width: int, block_size: int
) -> dict[str, torch.Tensor]:
    """Parents within each request, lengths and spares; some rows end, some lack a spare."""
    n = sum(r for r, _ in requests)
    parents, lengths = [-1] * n, [0] * n
    for own in request_rows(requests):
        length = rng.choice([0, 1, block_size, rng.randrange(width * block_size), width * block_size + 1])
        for r in range(own.start, own.stop):
            lengths[r] = max(0, length + rng.choice([0, 0, 0, -1]))
            parents[r] = -1 if rng.random() < 0.1 else rng.randrange(own.start, own.stop)
    spares = [-1 if rng.random() < 0.2 else 100_000 + r for r in range(n)]
    tokens = [rng.randrange(-1, 50) for _ in range(n)]
    as_ints = {"parents": parents, "lengths": lengths, "spares": spares, "tokens": tokens}
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in as_ints.items()}


@pytest.mark.parametrize("in_place", [False, True])
def test_tables(gpu: Gpu, in_place: bool, seed: int) -> None:
    rng = random.Random(seed)
    for requests in (
        [(4, 8)] * 5, [(1, 1), (256, 512), (3, 6)], [(rng.randrange(1, 9), 4) for _ in range(70)], [(44, 1)],
    ):  # fmt: skip
        for width, block_size in ((1, 16), (37, 16), (300, 8), (5000, 1)):
            n = sum(r for r, _ in requests)
            if n * width > 400_000:
                continue
            step = random_step(rng, requests, width, block_size)
            source = torch.arange(n * width, dtype=torch.int32).view(n, width)
            expected = source.clone() if in_place else torch.full_like(source, -5)
            pairs, lacking = reference_tables(
                source, expected, step["parents"], step["lengths"], step["spares"], block_size
            )
            here = source.to(gpu.device)
            target = here if in_place else torch.full_like(here, -5)
            totals = torch.full((2,), -9, dtype=torch.int32, device=gpu.device)
            listed = torch.full((n, 2), -3, dtype=torch.int32, device=gpu.device)
            ids = torch.full((n,), -4, dtype=torch.int32, device=gpu.device)
            _, queue = settings(requests)
            reorder_tables(
                gpu, here, target, requests=as_bytes(queue, gpu), most_rows=max(r for r, _ in requests),
                **{name: value.to(gpu.device) for name, value in step.items()}, block_size=block_size, pairs=listed,
                totals=totals, ids=ids,
            )  # fmt: skip
            note = f"seed {seed} {requests} {width} {block_size}"
            assert torch.equal(target.cpu(), expected), note
            assert totals.tolist() == [len(pairs), lacking], note
            assert [tuple(p) for p in listed.tolist()] == pairs + [(-3, -3)] * (n - len(pairs)), note
            assert torch.equal(ids.cpu(), step["tokens"].clamp(min=0)), note


def test_the_first_step_of_beams(gpu: Gpu) -> None:
    """One row becomes four, in other rows than before."""
    source = torch.tensor([[9, 9, 9], [5, 6, 7], [8, 8, 8]], dtype=torch.int32, device=gpu.device)
    ints = lambda *values: torch.tensor(values, dtype=torch.int32, device=gpu.device)  # noqa: E731
    for length, tail, copies in ((18, [6, 40, 41, 42], [[6, 40], [6, 41], [6, 42]]), (16, [30, 40, 41, 42], [])):
        target = torch.full((6, 3), -1, dtype=torch.int32, device=gpu.device)
        pairs, totals, ids = torch.zeros(6, 2, dtype=torch.int32, device=gpu.device), ints(7, 7), ints(*[-1] * 6)
        queue = np.zeros(2, dtype=settings([(1, 1)])[1].dtype)
        queue[0], queue[1] = (2, 4, 8, 0), (0, 0, 0, 0)
        reorder_tables(
            gpu, source, target, requests=as_bytes(queue, gpu), most_rows=4, parents=ints(-1, -1, 1, 1, 1, 1),
            lengths=ints(0, length, 0), spares=ints(-1, -1, 30, 40, 41, 42), tokens=ints(-1, -1, 3, 4, 5, 6),
            block_size=16, pairs=pairs, totals=totals, ids=ids,
        )  # fmt: skip
        assert target.tolist() == [[-1] * 3] * 2 + [[5, t, -1] for t in tail]
        assert totals.tolist() == [len(copies), 0] and pairs[: len(copies)].tolist() == copies
        assert ids[2:].tolist() == [3, 4, 5, 6]


def test_copies_of_forked_blocks(gpu: Gpu) -> None:
    """As many as the list has, however long it could be."""
    caches = [torch.randn(60, 16, 2, 40, generator=torch.Generator().manual_seed(i)).to(gpu.device) for i in range(3)]
    addresses = torch.tensor([c.data_ptr() for c in caches], device=gpu.device)
    pairs = torch.tensor([[i % 7, 10 + i] for i in range(45)], dtype=torch.int32)
    for count in (45, 33, 32, 1, 0):
        expected = [c.cpu().clone() for c in caches]
        for cache in expected:
            cache[10 : 10 + count] = cache[pairs[:count, 0].long()]
        totals = torch.tensor([count, 99], dtype=torch.int32, device=gpu.device)
        copy_blocks(gpu, addresses, pairs.to(gpu.device), caches[0][0].nbytes, totals)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(caches, expected, strict=True)), count
        for cache in caches:
            cache[10:] = torch.randn(50, 16, 2, 40).to(gpu.device)


@pytest.mark.parametrize("in_place", [False, True])
def test_counts(gpu: Gpu, in_place: bool, seed: int) -> None:
    rng = random.Random(seed)
    for vocab in (5, 1001, 5000):
        requests = [(4, 8), (1, 2), (9, 4)]
        step = random_step(rng, requests, 9, 16)
        n = len(step["parents"])
        step["tokens"] = torch.tensor([rng.randrange(-1, vocab) for _ in range(n)], dtype=torch.int32)
        counts = torch.randint(-(1 << 31), 1 << 30, (n, vocab), dtype=torch.int32)
        expected = counts.clone() if in_place else torch.full_like(counts, 3)
        for row, (parent, token) in enumerate(zip(step["parents"].tolist(), step["tokens"].tolist(), strict=True)):
            if parent >= 0 and row != 6:
                expected[row] = counts[parent]
                if token >= 0:
                    expected[row, token] += 1
        here = counts.to(gpu.device)
        target = here if in_place else torch.full_like(here, 3)
        addresses = [torch.tensor([row.data_ptr() for row in t], device=gpu.device) for t in (here, target)]
        addresses[1][6] = 0
        _, queue = settings(requests)
        parents, tokens = step["parents"].to(gpu.device), step["tokens"].to(gpu.device)
        reorder_counts(
            gpu, *addresses, requests=as_bytes(queue, gpu), most_rows=9, parents=parents, tokens=tokens,
            vocab_size=vocab,
        )  # fmt: skip
        assert torch.equal(target.cpu(), expected), f"seed {seed} {vocab}"
