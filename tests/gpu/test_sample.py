"""Sampling on the GPU against the CPU's sampler: the same tokens for the same logits."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llmapi._kernels.gpu import Gpu
from llmapi._kernels.sample_cuda import ROW, SampleKernels, nucleus_range
from llmapi._runtime.logit_edits import LogitEdits
from llmapi._runtime.philox import uniforms
from llmapi._runtime.request import Request
from llmapi._runtime.sampler import Sampled, Sampler, SampleRow
from llmapi._runtime.sampler_cuda import CudaSampler
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams

pytestmark = pytest.mark.gpu

ROUNDING = 2e-6  # of a row's whole probability: float32 exponentials and sums of 256 on the CPU


class Words:
    """A tokenizer whose texts are numbers: ``"5 7"`` is the tokens 5 and 7."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(part) for part in text.split()]

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"


def row(
    output: list[int] | None = None, *, prompt: list[int] | None = None, seed: int = 0, index: int = 0, count: int = 1,
    end: tuple[int, ...] = (), **params: Any,
) -> SampleRow:  # fmt: skip
    p = SamplingParams(**params)
    request = Request(f"r{seed}", None, prompt or [3, 1, 4], p, seed, 64, frozenset(end), RequestMetrics(0.0))
    sequence = request.sequences[0]
    sequence.index = index
    sequence.token_ids += output or []
    return SampleRow(sequence, count)


def random_rows(n: int, vocab: int, rng: random.Random, *, edits: bool) -> list[SampleRow]:
    """Settings of every kind, together and alone."""
    out = []
    for _ in range(n):
        params: dict[str, Any] = {"temperature": rng.choice([0, 0.2, 0.7, 1.0, 1.0, 1.7])}
        if rng.random() < 0.6:
            params["top_k"] = rng.choice([1, 2, 20, 50, 200, 256, 257, 400, 1000, 1500, 10**6])
        if rng.random() < 0.6:
            params["top_p"] = rng.choice([1e-4, 0.1, 0.5, 0.8, 0.9, 0.95, 0.999])
        if rng.random() < 0.3:
            params["min_p"] = rng.choice([1e-4, 0.02, 0.1, 1.0])
        some = lambda k: [rng.randrange(vocab) for _ in range(k)]  # noqa: E731
        if edits and rng.random() < 0.8:
            if rng.random() < 0.5:
                params["logit_bias"] = {i: rng.uniform(-9, 9) for i in [*some(rng.randrange(40)), vocab + 3]}
            if rng.random() < 0.4:
                params["bad_words"] = [str(i) for i in some(4)] + ["5 7", "7"]
            if rng.random() < 0.4:
                params["repetition_penalty"] = rng.choice([0.7, 1.3])
            if rng.random() < 0.4:
                params["presence_penalty"] = rng.uniform(-2, 2)
            if rng.random() < 0.4:
                params["frequency_penalty"] = rng.uniform(-2, 2)
            params["min_tokens"] = rng.choice([0, 60])
        history = some(rng.randrange(1, 60))
        out.append(
            row(
                [*history, *history[: rng.randrange(9)], 5],
                prompt=[*some(rng.randrange(1, 80)), vocab + 1],
                seed=rng.randrange(1 << 64),
                index=rng.randrange(3),
                end=tuple(some(2)),
                **params,
            )
        )
    return out


def noise(n: int, vocab: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows from nearly flat to steep."""
    g = torch.Generator(device).manual_seed(seed)
    scale = torch.rand(n, 1, generator=g, device=device) * 7.5 + 0.5
    return (torch.randn(n, vocab, generator=g, device=device) * scale).to(dtype)


def within_rounding(x: torch.Tensor, r: SampleRow, tokens: list[int]) -> bool:
    """Whether the row's uniform number lies within rounding of each token's stretch of the exact distribution.

    Rounding moves the ends of stretches, and the token at which a nucleus ends.

    Args:
        x: ``[V]`` edited logits.
        r: the row; not greedy.
        tokens: what was chosen by one sampler or the other.
    """
    p, seq = r.sequence.request.params, r.sequence
    [u] = uniforms([seq.request.seed], [seq.index], [seq.num_output])
    z = x.double() / p.temperature
    weights = (z - z.max()).exp()
    if 0 < p.top_k < len(x):
        weights[x < x.topk(p.top_k).values[-1]] = 0
    falling, order = weights.sort(descending=True, stable=True)
    before = falling.cumsum(0) - falling
    whole = ROUNDING + len(x) / 16 * 2**-24  # the CPU's float32 sum over a row, in lanes of 16
    low, high = dict.fromkeys(tokens, 2.0), dict.fromkeys(tokens, -2.0)
    for shift in (-1, 0, 1):
        kept = weights.clone()
        if p.top_p < 1:
            kept[order[before >= (p.top_p + shift * whole) * falling.sum()]] = 0
        kept[weights < p.min_p * (1 + shift * ROUNDING) * weights.max()] = 0
        total = kept.cumsum(0) / kept.sum()
        for t in tokens:
            low[t] = min(low[t], float(total[t] - kept[t] / kept.sum()))
            high[t] = max(high[t], float(total[t]))
    return all(low[t] - ROUNDING <= u <= high[t] + ROUNDING for t in tokens)


def exact_token(x: torch.Tensor, r: SampleRow) -> int:
    """The token of the exact distribution, in float64; without min_p."""
    p, seq = r.sequence.request.params, r.sequence
    [u] = uniforms([seq.request.seed], [seq.index], [seq.num_output])
    z = x.double() / p.temperature
    weights = (z - z.max()).exp()
    if 0 < p.top_k < len(x):
        weights[x < x.topk(p.top_k).values[-1]] = 0
    falling, order = weights.sort(descending=True, stable=True)
    if p.top_p < 1:
        weights[order[falling.cumsum(0) - falling >= p.top_p * falling.sum()]] = 0
    total = weights.cumsum(0)
    return int(torch.searchsorted(total, total[-1:] * u, right=True))


def compare(x: torch.Tensor, rows: list[SampleRow], expected: list[Sampled], got: list[Sampled], note: str) -> int:
    """Check that tokens are equal except where rounding decides; how many are not equal."""
    flips = 0
    for i, (r, e, a) in enumerate(zip(rows, expected, got, strict=True)):
        assert (e.error is None) == (a.error is None), f"{note} row {i}: {e.error} {a.error}"
        if e.token_ids == a.token_ids:
            continue
        p = r.sequence.request.params
        own = x[i : i + 1].cpu().float().clone()
        LogitEdits(x.shape[1], Words()).apply(own, [r.sequence])
        tokens = [*e.token_ids, *a.token_ids]
        assert p.temperature > 0 and within_rounding(own[0], r, tokens), f"{note} row {i}: {tokens} {p}"
        flips += 1
    return flips


def make(gpu: Gpu, vocab: int, dtype: torch.dtype, max_rows: int = 512) -> CudaSampler:
    return CudaSampler(gpu, vocab, Words(), max_rows=max_rows, logits_dtype=dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("edits", [False, True], ids=["plain", "edits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "n"), [(11, 200), (1000, 300), (5003, 500), (32_000, 400), (128_256, 64), (50_257, 8)]
)
def test_tokens_are_the_cpu_samplers(gpu: Gpu, vocab: int, n: int, dtype: torch.dtype, edits: bool, seed: int) -> None:
    rng = random.Random(seed)
    x = noise(n, vocab, seed, dtype, gpu.device)
    before = x.clone()
    rows = random_rows(n, vocab, rng, edits=edits)
    expected = Sampler(vocab, Words())(x.cpu(), rows)
    got = make(gpu, vocab, dtype)(x, rows)
    flips = compare(x, rows, expected, got, f"seed {seed}")
    assert flips <= 2, f"seed {seed}: {flips} of {n} rows differ within rounding"
    assert torch.equal(x, before)


class Bits:
    """A guide that allows what it was told to."""

    def __init__(self, allowed: npt.NDArray[np.bool_]) -> None:
        wide = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.bool_)
        wide[: len(allowed)] = allowed
        self.bits = np.packbits(wide, bitorder="little").view(np.int32)


def fill_bits(guides: Any, masks: npt.NDArray[np.int32]) -> None:
    """In place of :func:`llmapi._runtime.guide.fill`."""
    for row, guide in zip(masks, guides, strict=True):
        row[:] = guide.bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "n"), [(11, 100), (1000, 100), (5003, 50), (128_256, 20)])
def test_masks(gpu: Gpu, vocab: int, n: int, dtype: torch.dtype, seed: int) -> None:
    """Rows that follow a grammar beside others: with every setting and edit, what is not allowed never comes."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    x = noise(n, vocab, seed, dtype, gpu.device)
    rows = random_rows(n, vocab, rng, edits=True)
    allowed: dict[int, npt.NDArray[np.bool_]] = {}
    for i, r in enumerate(rows):
        if rng.random() < 0.7:
            p = r.sequence.request.params
            r.sequence.request.params = dataclasses.replace(p, guided_decoding={"regex": "."}, bad_words=None)
            allowed[i] = numbers.random(vocab) < rng.choice([0.9, 0.3, 2 / vocab])
            allowed[i][rng.randrange(vocab)] = True
            r.sequence.guide = Bits(allowed[i])  # type: ignore[assignment]
            r.sequence.request.stop_token_ids = frozenset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmapi._runtime.guide.fill", fill_bits)
        patch.setattr("llmapi._runtime.sampler_cuda.fill", fill_bits)
        expected = Sampler(vocab, Words())(x.cpu(), rows)
        got = make(gpu, vocab, dtype)(x, rows)
        flips = compare(x, rows, expected, got, f"seed {seed}")
    assert flips <= 2, f"seed {seed}: {flips} of {n} rows differ within rounding"
    for i, mask in allowed.items():
        assert mask[got[i].token_ids[0]]
    assert sum(mask.mean() < 0.5 for mask in allowed.values()) > 3


@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_a_row_gives_the_same_token_in_any_batch(gpu: Gpu, vocab: int, seed: int) -> None:
    x = noise(300, vocab, seed, torch.float32, gpu.device) * 0.2
    rows = random_rows(300, vocab, random.Random(seed), edits=True)
    tokens = [s.token_ids for s in make(gpu, vocab, torch.float32)(x, rows)]
    for step in (1, 7, 100, 150):  # batches that are split over 8, 4, 2 blocks and 1
        part = make(gpu, vocab, torch.float32)
        for start in range(0, min(300, 20 * step), step):
            order = list(range(start, min(start + step, 300)))[::-1]
            at = torch.tensor(order, device=gpu.device)
            again = part(x[at], [rows[i] for i in order])
            assert [s.token_ids for s in again] == [tokens[i] for i in order], f"seed {seed}, {step} rows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 300])
def test_ties(gpu: Gpu, n: int, dtype: torch.dtype, seed: int) -> None:
    """Rows of few distinct values: more equal tokens at a border than are listed.

    The oracle is float64: the CPU sampler's float32 sum over tens of thousands of equal numbers errs by whole tokens.
    """
    vocab, rng = 40_000, random.Random(seed)
    x = torch.zeros(n, vocab, dtype=dtype, device=gpu.device)
    levels = torch.tensor([0.0, -0.0, 1.0, 1.001, 1.002, -2.0, 1e-30, -1e-30, -torch.inf], device=gpu.device)
    for i in range(n):
        some = levels[: rng.randrange(1, 10)]
        x[i] = some[torch.randint(len(some), (vocab,), device=gpu.device)].to(dtype)
    rows = [
        row(
            seed=rng.randrange(1 << 64),
            top_k=rng.choice([0, 3, 900, 20_000]),
            top_p=rng.choice([0.001, 0.5, 0.97, 1.0]),
        )
        for _ in range(n)
    ]
    got = make(gpu, vocab, dtype)(x, rows)
    for i, s in enumerate(got):
        assert (s.error is None) == bool(torch.isfinite(x[i]).any()), f"seed {seed} row {i}"
    alive = [i for i in range(n) if got[i].error is None]
    flips = sum(got[i].token_ids != [exact_token(x[i].cpu().float(), rows[i])] for i in alive)
    assert len(alive) >= n // 2 and flips <= 2, f"seed {seed}: {flips}"


def test_failures_and_infinities(gpu: Gpu) -> None:
    vocab, inf, nan = 5000, math.inf, math.nan
    cases: list[tuple[dict[int, float], float]] = [
        ({}, -inf), ({4000: nan}, 0.0), ({1: nan, 4999: nan}, 1.0), ({7: inf}, 0.0),
        ({7: inf, 90: inf, 4000: inf}, -inf),
        ({7: inf, 90: nan}, 0.0), ({5: 0.0}, -inf), ({5: -3e38}, -inf), ({5: 3e38, 6: -3e38}, 0.0),
    ]  # fmt: skip
    settings: list[dict[str, Any]] = [
        {"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 2}, {"top_k": 2, "top_p": 0.4}, {"min_p": 0.1},
        {"temperature": 1e-30}, {"temperature": 1e30}, {"bad_words": ["5"]},
    ]  # fmt: skip
    x = torch.empty(len(cases) * len(settings), vocab)
    rows = []
    for i, (special, fill) in enumerate(cases):
        for j, params in enumerate(settings):
            x[i * len(settings) + j] = fill
            for at, value in special.items():
                x[i * len(settings) + j, at] = value
            rows.append(row([8] * j, seed=i, **params))
    expected = Sampler(vocab, Words())(x, rows)
    for split in (len(rows), 1):
        sampler = make(gpu, vocab, torch.float32)
        for start in range(0, len(rows), split):
            got = sampler(x[start : start + split].to(gpu.device), rows[start : start + split])
            for e, a, r in zip(expected[start:], got, rows[start:], strict=False):
                assert (a.token_ids, str(a.error)) == (e.token_ids, str(e.error)), r.sequence.request


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [9, 5003, 128_256])
def test_logprobs(gpu: Gpu, vocab: int, dtype: torch.dtype, n: int, seed: int) -> None:
    rng = random.Random(seed)
    x = noise(n, vocab, seed, dtype, gpu.device)
    x[:, ::7] = -torch.inf
    if n > 2:
        x[1] = 0.0
        x[2] = -torch.inf
        x[2, 1] = 1.0
    rows = [
        row(
            seed=i, temperature=rng.choice([0, 1]), logprobs=rng.choice([0, 1, 5, 20, 300, None]), logit_bias={8: 100.0}
        )
        for i in range(n)
    ]
    expected, got = Sampler(vocab, Words())(x.cpu(), rows), make(gpu, vocab, dtype)(x, rows)
    for i, (e, a) in enumerate(zip(expected, got, strict=True)):
        if e.token_ids != a.token_ids:
            continue  # within rounding; another test's matter
        if e.logprobs is None:
            assert a.logprobs is None
            continue
        assert a.logprobs is not None
        [mine], [theirs] = a.logprobs, e.logprobs
        token = e.token_ids[0]
        assert abs(len(mine) - len(theirs)) <= 1 and next(iter(mine)) == token, f"seed {seed} row {i}"
        value, other = mine[token], theirs[token]
        assert abs(value.rank - other.rank) <= 2 and value.decoded_token == f"<{token}>", f"seed {seed} row {i}"
        exact = x[i].double().log_softmax(0).cpu()
        for t, entry in mine.items():
            assert entry.logprob == pytest.approx(float(exact[t]), abs=1e-5, rel=1e-6), f"seed {seed} row {i}"
            above = int((x[i].float() > x[i, t].float()).sum())  # values may become equal as log probabilities
            assert abs(entry.rank - above - 1) <= 2, f"seed {seed} row {i}"
        params = rows[i].sequence.request.params
        best = sorted((v.logprob for v in mine.values()), reverse=True)[: params.logprobs]
        others = sorted((v.logprob for v in theirs.values()), reverse=True)[: params.logprobs]
        assert best == pytest.approx(others, abs=5e-5), f"seed {seed} row {i}"  # the CPU's float32 sum


def test_penalties_follow_the_output(gpu: Gpu, seed: int) -> None:
    """Many steps, the next one started before the last token is known, sequences coming and going."""
    vocab, rng = 700, random.Random(seed)
    sampler, oracle = make(gpu, vocab, torch.float32), Sampler(vocab)

    def new(i: int) -> SampleRow:
        kind = rng.choice([{"frequency_penalty": 0.7}, {"repetition_penalty": 1.4, "presence_penalty": 0.3}, {}])
        return row(prompt=[rng.randrange(vocab) for _ in range(9)], seed=i, temperature=rng.choice([0, 1.0]), **kind)

    rows = [new(i) for i in range(6)]
    pending = None
    for step in range(40):
        x = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed + step)) * 2
        handle = sampler.start(x.to(gpu.device), rows)
        assert not any(sampler.waits(r) for r in rows)
        if pending is not None:  # the step before lands only now: its references become tokens
            results, started, logits = pending
            known = results.result()
            for r in started:
                assert r.sequence.token_ids.pop() < 0
            assert compare(logits, started, oracle(logits, started), known, f"seed {seed} step {step}") == 0
            for r, s in zip(started, known, strict=True):
                r.sequence.token_ids.append(s.token_ids[0])
        pending = (handle, list(rows), x)
        if step % 7 == 6:
            known = handle.result()
            assert compare(x, rows, oracle(x, rows), known, f"seed {seed} step {step}") == 0
            for r, s in zip(rows, known, strict=True):
                r.sequence.token_ids.append(s.token_ids[0])
            pending = None
            rows[rng.randrange(len(rows))].sequence.finish_reason = "stop"
            rows = [r for r in rows if not r.sequence.finished] + [new(100 + step), new(200 + step)]
            rng.shuffle(rows)
        else:
            for i, r in enumerate(rows):
                r.sequence.token_ids.append(~i)


def test_rows_that_need_the_host(gpu: Gpu, seed: int) -> None:
    vocab = 3000
    x = noise(6, vocab, seed, torch.bfloat16, gpu.device)
    down = lambda ids, logits: logits * 0.5  # noqa: E731
    rows = [
        row(seed=1, logits_processors=[down]), row(seed=2), row(seed=3, count=3, n=3), row(seed=4, return_logits=True),
        row(seed=5, temperature=0), row(seed=6, logprobs=700),
    ]  # fmt: skip
    sampler = make(gpu, vocab, torch.bfloat16)
    assert [sampler.waits(r) for r in rows] == [True, False, True, True, False, True]
    assert [sampler.overlaps(r) for r in rows] == [True, True, False, True, True, True]
    assert sampler.waits(row(bad_words=["5 7"])) and not sampler.waits(row(bad_words=["5"]))
    handle = sampler.start(x, rows)
    got, expected = handle.result(), Sampler(vocab)(x.cpu(), rows)
    assert [s.token_ids for s in got] == [s.token_ids for s in expected], f"seed {seed}"
    assert handle.ids.tolist() == [s.token_ids[0] for s in expected]
    assert torch.equal(got[3].logits, x[3].cpu().float()) and len(got[5].logprobs[0]) >= 700  # type: ignore[index,arg-type]


def test_a_captured_launch_reads_new_settings_and_skips_unused_rows(gpu: Gpu, seed: int) -> None:
    vocab, n = 5000, 9
    wide = torch.full((n, vocab + 13), math.nan, dtype=torch.bfloat16, device="cuda")
    x = wide[:, 3 : 3 + vocab]  # unaligned, with a stride
    kernels = SampleKernels(gpu, vocab_size=vocab, max_rows=n, logits_dtype=torch.bfloat16)
    table = np.zeros(n, dtype=ROW)
    settings = torch.zeros(table.nbytes, dtype=torch.uint8, device="cuda")
    ids = torch.empty(n, dtype=torch.int32, device="cuda")
    kernels(x, settings, ids, edited=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels(x, settings, ids, edited=False)
    for step in range(3):
        x.copy_(noise(n, vocab, seed + step, torch.bfloat16, gpu.device))
        rows = [row([0] * step, seed=i, temperature=0.9, top_k=30, top_p=0.8) for i in range(n)]
        table["used"], table["temperature"], table["top_k"], table["top_p"] = 1, 0.9, 30, int(0.8 * 2**53)
        table["seed"], table["counter"], table["range"] = np.arange(n), step, nucleus_range(0.8, vocab)
        table["used"][step::4] = 0
        settings.copy_(torch.from_numpy(table.view(np.uint8)))
        ids.fill_(-7)
        graph.replay()
        expected = [s.token_ids[0] for s in Sampler(vocab)(x.cpu(), rows)]
        expected[step::4] = [-7] * len(expected[step::4])
        assert ids.tolist() == expected, f"seed {seed}"
