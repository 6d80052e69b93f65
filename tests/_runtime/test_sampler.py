"""Sampler against transformers' logits processors, float64 formulas and the frequencies of what it draws."""

from __future__ import annotations

import gc
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmapi._runtime import draw as draw_module
from llmapi._runtime.draw import Truncation, argmax, draw, largest
from llmapi._runtime.penalties import Penalties
from llmapi._runtime.philox import uniforms
from llmapi._runtime.request import Request
from llmapi._runtime.sampler import Sampled, Sampler, SampleRow, prompt_logprobs
from llmapi.errors import RequestError
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams

torch.set_num_threads(1)

PROMPT = [3, 1, 4]


def row(
    output: list[int] | None = None, *, prompt: list[int] | None = None, seed: int = 0, index: int = 0, count: int = 1,
    end: tuple[int, ...] = (), **params: Any,
) -> SampleRow:  # fmt: skip
    """A row of a request with these prompt and output tokens; ``end`` are the ids that end it."""
    prompt = PROMPT if prompt is None else prompt
    p = SamplingParams(**params)
    request = Request(f"r{seed}", None, prompt, p, seed, 64, frozenset(end), RequestMetrics(0.0))
    sequence = request.sequences[0]
    sequence.index = index
    sequence.token_ids += output or []
    return SampleRow(sequence, count)


def one(logits: torch.Tensor, r: SampleRow, **kwargs: Any) -> Sampled:
    return Sampler(logits.shape[-1], **kwargs)(logits.reshape(1, -1), [r])[0]


def noise(n: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def kept(x: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Which tokens of each row can be drawn: a fine ladder of uniforms reaches all that have weight."""
    s = Truncation(**settings)
    ladder = torch.arange(20_000, dtype=torch.float64)[None].expand(x.shape[0], -1) / 20_000
    ids = draw(x, [s] * x.shape[0], ladder)
    return torch.zeros_like(x, dtype=torch.bool).scatter(1, ids, True)


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 1000, 1024, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_argmax(vocab: int, dtype: torch.dtype) -> None:
    x = noise(7, vocab).to(dtype)
    got = Sampler(vocab)(x, [row(temperature=0, seed=i) for i in range(7)])
    assert [s.token_ids for s in got] == [[i] for i in x.float().argmax(1).tolist()]


@pytest.mark.parametrize("vocab", [7, 1024, 5003])
def test_greedy_takes_the_lowest_of_equals(vocab: int) -> None:
    for first, second in [(0, vocab - 1), (1, 2), (vocab // 2, vocab - 2)]:
        x = torch.full((1, vocab), -1.0)
        x[0, [second, first]] = 2.0
        assert one(x, row(temperature=0)).token_ids == [first]
    assert one(torch.zeros(1, vocab), row(temperature=0)).token_ids == [0]


@pytest.mark.parametrize("width", [3, 1500, 2048, 49_157])
def test_argmax_and_largest_equal_torch(width: int) -> None:
    x = noise(5, width)
    value, index = argmax(x)
    assert torch.equal(value, x.max(1).values) and torch.equal(index, x.max(1).indices)
    for k in {1, 3, min(66, width), min(300, width), width}:
        values, ids = largest(x, k)
        assert torch.equal(values, x.topk(k).values)
        assert torch.equal(x.gather(1, ids), values)
        assert all(len(set(r)) == k for r in ids.tolist())


def test_logits_are_not_changed() -> None:
    x = noise(3, 600)
    before = x.clone()
    rows = [row([1], seed=i, repetition_penalty=2.0, logit_bias={5: 9.0}, min_tokens=3, end=(2,)) for i in range(3)]
    Sampler(600)(x, rows)
    assert torch.equal(x, before)


# --- truncation: which tokens are left, against transformers ----------------------------------------------------------

NONE = torch.zeros(1, 0, dtype=torch.long)


@pytest.mark.parametrize("vocab", [40, 700, 6000])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": 37, "temperature": 0.7},
        {"top_p": 0.3},
        {"top_p": 0.9, "temperature": 0.8},
        {"top_p": 0.97, "temperature": 0.5},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 30, "top_p": 0.8},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
        {"top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_kept_tokens_equal_transformers(vocab: int, settings: dict[str, Any]) -> None:
    x = noise(6, vocab, seed=vocab, scale=2.5)
    x[0] = x[0] * 4  # a sharp row
    chain = LogitsProcessorList()
    if "temperature" in settings:
        chain.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        chain.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        chain.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(MinPLogitsWarper(settings["min_p"]))
    want = chain(NONE, x).softmax(1, dtype=torch.float64)
    mine = kept(x, **settings)
    assert not mine[want == 0].any()
    assert mine[want > 1e-4].all()  # each step of the ladder is 5e-5 wide


def weights(x: torch.Tensor, draws: int = 100_000, **settings: Any) -> torch.Tensor:
    """The distribution that ``draw`` realizes, from an even ladder of uniforms."""
    ladder = (torch.arange(draws, dtype=torch.float64)[None] + 0.5) / draws
    ids = draw(x, [Truncation(**settings)], ladder)[0]
    return torch.bincount(ids, minlength=x.shape[1]).double() / draws


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"temperature": 2.0, "top_k": 12}, {"top_p": 0.85}, {"min_p": 0.05}],
    ids=str,
)
def test_distribution_in_float64(settings: dict[str, Any]) -> None:
    x = noise(1, 900, seed=4)
    p = (x.double() / settings.get("temperature", 1.0)).softmax(1)[0]
    order = p.argsort(descending=True)
    keep = torch.ones(900, dtype=torch.bool)
    if "top_k" in settings:
        keep[order[settings["top_k"] :]] = False
    if "top_p" in settings:
        before = p[order].cumsum(0) - p[order]
        keep[order[before >= settings["top_p"]]] = False
    if "min_p" in settings:
        keep &= p >= settings["min_p"] * p.max()
    p = torch.where(keep, p, 0.0)
    assert torch.allclose(weights(x, **settings), p / p.sum(), atol=2e-5)


def test_top_k_keeps_ties_as_transformers() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0, -1.0]])
    assert kept(x, top_k=2)[0].tolist() == (TopKLogitsWarper(2)(NONE, x)[0] > -math.inf).tolist()
    wide = torch.full((2, 3000), -2.0)
    wide[0, 5:105] = 1.0  # a tie far longer than the candidates that are looked at
    wide[1, :20] = torch.arange(20.0) / 10
    assert kept(wide[:1], top_k=10)[0].nonzero().flatten().tolist() == list(range(5, 105))
    assert kept(wide, top_k=10).sum(1).tolist() == [100, 10]


def test_top_k_of_masked_rows() -> None:
    x = torch.full((1, 3000), -torch.inf)
    x[0, [7, 2999]] = torch.tensor([1.0, 1.5])
    assert kept(x, top_k=50)[0].nonzero().flatten().tolist() == [7, 2999]
    assert kept(x, top_k=2000)[0].nonzero().flatten().tolist() == [7, 2999]


@pytest.mark.parametrize("vocab", [8, 4000])
def test_top_p_among_equals_takes_the_lowest_ids(vocab: int) -> None:
    x = torch.zeros(1, vocab)
    assert kept(x, top_p=0.25)[0].nonzero().flatten().tolist() == list(range(vocab // 4))
    x[0, 5] = 20.0
    assert kept(x, top_p=0.9)[0].nonzero().flatten().tolist() == [5]


def test_top_p_border_is_exact() -> None:
    x = torch.zeros(1, 600)
    x[0, [3, 9, 20, 500]] = 9.0
    for p, left in [(0.25, [3]), (0.5, [3, 9]), (0.501, [3, 9, 20]), (0.75, [3, 9, 20])]:
        assert kept(x, top_k=4, top_p=p)[0].nonzero().flatten().tolist() == left


def test_top_p_border_in_a_tie_beyond_the_candidates() -> None:
    equals = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:100].sort().values
    x = torch.full((1, 4000), -60.0)
    x[0, equals] = 1.0
    assert torch.equal(kept(x, top_p=0.295)[0].nonzero().flatten(), equals[:30])


def test_top_p_keeps_one() -> None:
    assert kept(noise(3, 500), top_p=1e-6).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("steps", [(), (64,), (64, 256), (700,)])
def test_every_way_to_the_nucleus_agrees(steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([noise(3, 3000, 1, 5.0), noise(3, 3000, 2, 2.0)]).bfloat16().float()  # bfloat16: many equals
    u = torch.rand(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = [Truncation(top_p=0.9)] * 6
    want = draw(x, s, u)
    monkeypatch.setattr(draw_module, "_NUCLEUS_STEPS", steps)
    assert torch.equal(draw(x, s, u), want)


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e-3])
def test_tiny_temperatures_are_nearly_greedy(temperature: float) -> None:
    x = noise(4, 800, scale=40)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.9}):
        got = draw(x, [Truncation(temperature, **settings)] * 4, torch.full((4, 1), 0.99, dtype=torch.float64))
        assert got[:, 0].tolist() == x.argmax(1).tolist()


def test_extreme_uniforms_never_draw_the_impossible() -> None:
    x = torch.full((1, 1000), -torch.inf)
    x[0, [3, 400]] = torch.tensor([0.0, -30.0])
    top = math.nextafter(1.0, 0.0)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.9999999}, {"min_p": 1e-9}):
        ids = draw(x, [Truncation(**settings)], torch.tensor([[0.0, top]], dtype=torch.float64))[0].tolist()
        assert ids[0] == 3 and ids[1] in (3, 400)
    assert draw(x, [Truncation()], torch.tensor([[top]], dtype=torch.float64)).item() == 400


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_frequencies_fit_the_softmax(settings: dict[str, Any]) -> None:
    """Chi-square of 20 000 draws with different seeds against what the settings leave."""
    x = noise(1, 30, seed=9, scale=1.5)
    draws = 20_000
    rows = [row(seed=i, **settings) for i in range(500)]
    sampler = Sampler(30)
    counts: Counter[int] = Counter()
    for _ in range(draws // 500):
        for r in rows:
            r.sequence.request.seed += 500
        counts.update(s.token_ids[0] for s in sampler(x.expand(500, -1), rows))
    p = weights(x, **settings)
    assert set(counts) <= set(p.nonzero().flatten().tolist())
    frequent = [(counts[i], draws * q) for i, q in enumerate(p.tolist()) if draws * q >= 5]
    chi2 = sum((c - e) ** 2 / e for c, e in frequent)
    freedom = len(frequent) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_inverse_cdf_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0, 2.0, 1.0]])
    total = x.double().softmax(1)[0].cumsum(0)
    for seed in range(200):
        u = uniforms([seed], [0], [0])[0]
        assert one(x, row(seed=seed)).token_ids == [int((total <= u).sum())]


def test_draw_depends_on_seed_index_and_output_position() -> None:
    x = noise(1, 5000, scale=1.0)
    base = one(x, row([1, 2], seed=7, index=1)).token_ids
    assert one(x, row([8, 9], prompt=[1], seed=7, index=1)).token_ids == base  # not on which tokens they are
    assert one(x, row([1, 2], seed=8, index=1)).token_ids != base
    assert one(x, row([1, 2], seed=7, index=2)).token_ids != base
    assert one(x, row([1, 2, 3], seed=7, index=1)).token_ids != base


def test_n_first_tokens_use_the_streams_of_their_sequences() -> None:
    x = noise(2, 400, scale=1.0)
    many = Sampler(400)(x, [row(seed=3, n=5, count=5, logprobs=1), row(seed=4)])
    assert many[0].token_ids == [one(x[0], row(seed=3, index=i)).token_ids[0] for i in range(5)]
    assert len(set(many[0].token_ids)) > 1
    assert many[0].logprobs is not None and len(many[0].logprobs) == 5
    assert all(t in entry for t, entry in zip(many[0].token_ids, many[0].logprobs, strict=True))
    assert many[1].token_ids == one(x[1], row(seed=4)).token_ids


MIX: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 1500},
    {"top_p": 0.5},
    {"top_p": 0.99},
    {"min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.1, "temperature": 1.4},
    {"repetition_penalty": 1.3},
    {"temperature": 0, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"logit_bias": {7: 50.0}},
    {"logprobs": 3},
    {"temperature": 0, "min_tokens": 9},
    {"n": 3},
]


@pytest.mark.parametrize("vocab", [2048, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_alone_and_in_any_batch(vocab: int, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = noise(48, vocab, seed=5).to(dtype)
        rows = [row([i % 9, 2], seed=i, end=(2,), count=p.get("n", 1), **p) for i, p in enumerate(MIX * 3)]
        sampler = Sampler(vocab)
        alone = [sampler(x[i : i + 1], [r])[0] for i, r in enumerate(rows)]
        rng = np.random.default_rng(0)
        for size in (48, 48, 17, 5, 2):
            pick = rng.permutation(48)[:size].tolist()
            for i, got in zip(pick, sampler(x[pick], [rows[i] for i in pick]), strict=True):
                assert got.token_ids == alone[i].token_ids and got.logprobs == alone[i].logprobs, MIX[i % len(MIX)]
    finally:
        torch.set_num_threads(before)


# --- edits -----------------------------------------------------------------------------------------------------------


def edited(x: torch.Tensor, r: SampleRow, tokenizer: Any = None) -> torch.Tensor:
    """The logits after all edits, as a processor-free look inside."""
    from llmapi._runtime.logit_edits import LogitEdits

    y = x.reshape(1, -1).clone()
    errors = LogitEdits(y.shape[1], tokenizer).apply(y, [r.sequence])
    assert errors == [None]
    return y


def test_repetition_penalty_equals_transformers() -> None:
    x = noise(1, 50)
    for output in ([], [5, 5, 9], [49]):
        want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + output]), x.clone())
        assert torch.allclose(edited(x, row(output, repetition_penalty=1.7)), want, rtol=1e-6)
    assert not torch.equal(want, x)


def test_presence_and_frequency_count_the_output_only() -> None:
    x = noise(1, 50)
    got = edited(x, row([5, 5, 9, 5], presence_penalty=0.5, frequency_penalty=-0.25))
    want = x.clone()
    want[0, 5] -= 0.5 - 0.25 * 3
    want[0, 9] -= 0.5 - 0.25
    assert torch.allclose(got, want)


def test_repetition_comes_before_the_subtractions() -> None:
    x = torch.tensor([[4.0, 1.0]])
    r = row([0, 0], prompt=[1], repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    assert edited(x, r).tolist() == [[4.0 / 2 - 1.0 - 0.25, 0.5]]


def test_penalties_pass_over_ids_beyond_the_logits() -> None:
    x = noise(2, 10)
    want = edited(x[0], row([3], prompt=[1], repetition_penalty=2.0, presence_penalty=1.0))
    got = edited(x[0], row([3, 10, 900], prompt=[1, 12], repetition_penalty=2.0, presence_penalty=1.0))
    assert torch.equal(got, want)


def test_penalties_follow_a_growing_sequence() -> None:
    penalties, rng = Penalties(300), np.random.default_rng(0)
    rows = [row(repetition_penalty=1.2, seed=i, presence_penalty=0.3) for i in range(200)]
    for step in range(4):
        for r in rows:
            r.sequence.token_ids += rng.integers(0, 300, 400 if step == 2 else 3).tolist()
        x = noise(200, 300, seed=step)
        y = x.clone()
        penalties.apply(y, [r.sequence for r in rows])
        for i in (0, 1, 199):
            assert torch.equal(y[i], edited(x[i], rows[i])[0])
    for i in range(2000):
        penalties.apply(noise(1, 300), [row(repetition_penalty=1.2, seed=i).sequence])
    assert len(penalties._histories) <= 66  # forgets


def test_min_tokens_equals_transformers() -> None:
    x = noise(1, 30)
    for length in range(5):
        output = [7] * length
        want = MinLengthLogitsProcessor(len(PROMPT) + 3, [2, 11])(torch.tensor([PROMPT + output]), x)
        assert torch.equal(edited(x, row(output, end=(2, 11, 99), min_tokens=3)), want)


def test_min_tokens_beats_logit_bias() -> None:
    x = torch.zeros(1, 10)
    assert one(x, row(temperature=0, end=(4,), min_tokens=1, logit_bias={4: 100.0, 6: 1.0})).token_ids == [6]
    assert one(x, row([1], temperature=0, end=(4,), min_tokens=1, logit_bias={4: 100.0})).token_ids == [4]


def test_logit_bias() -> None:
    x = noise(1, 20)
    want = x.clone()
    want[0, [3, 5]] += torch.tensor([10.0, -100.0])
    assert torch.equal(edited(x, row(logit_bias={3: 10.0, 5: -100, 20: 5.0, 10**9: 1.0})), want)
    assert torch.equal(edited(x, row(logit_bias={20: 5.0})), x)


class Letters:
    """Encodes a = 1, b = 2, ..., a space before a letter = +30."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        ids, space = [], False
        for letter in text:
            if letter == " ":
                space = True
            else:
                ids.append(ord(letter) - 96 + 30 * space)
                space = False
        return ids

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"


def test_bad_words_equal_transformers() -> None:
    x = noise(1, 64)
    words = [[1, 2, 3], [31, 2, 3], [3], [33], [2, 2], [32, 2]]
    processor = NoBadWordsLogitsProcessor(words)
    for tail in ([5], [1, 2], [31, 2], [1, 2, 2], [9, 1, 2], [2], [32], [2, 1]):
        output = [7, 8, *tail]  # transformers 5.17 overlooks words that begin with the output
        want = processor(torch.tensor([output]), x)
        got = edited(x, row(output, bad_words=["abc", " c", "bb"]), Letters())
        assert torch.equal(got, want), output
    assert edited(x, row([1, 2], bad_words=["abc"]), Letters())[0, 3] == -torch.inf


def test_bad_words_do_not_reach_into_the_prompt() -> None:
    x = noise(1, 64)
    assert torch.equal(edited(x, row([], prompt=[1, 2], bad_words=["abc"]), Letters()), x)
    assert torch.equal(edited(x, row([2], prompt=[1], bad_words=["abc"]), Letters()), x)


def test_bad_words_never_appear() -> None:
    x = torch.zeros(1, 34)
    r = row(seed=1, prompt=[9], bad_words=["ab"], logit_bias={1: 100.0, 2: 100.0})
    sampler = Sampler(34, Letters())
    for _ in range(200):
        r.sequence.token_ids += sampler(x, [r])[0].token_ids
    text = r.sequence.output_ids
    assert 1 in text and 2 in text
    assert all((a, b) != (1, 2) for a, b in itertools.pairwise(text))


def test_bad_words_without_a_tokenizer_fail_their_request_only() -> None:
    got = Sampler(10)(noise(2, 10), [row(bad_words=["x"]), row(temperature=0)])
    assert isinstance(got[0].error, RequestError) and "logit_bias" in str(got[0].error) and got[0].token_ids == []
    assert got[1].error is None and len(got[1].token_ids) == 1


# --- logits_processors -----------------------------------------------------------------------------------------------


def test_processors_see_what_they_are_promised() -> None:
    seen: list[Any] = []

    def short(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((output, logits.dtype, tuple(logits.shape), float(logits[0])))
        return logits + 1

    def long(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((prompt, output, float(logits[0])))
        logits[8] = 1000.0  # in place
        return logits

    x = noise(1, 10).bfloat16()
    got = one(x, row([5, 6], temperature=0, logits_processors=[short, long], logprobs=0))
    first = float(x[0, 0])
    assert seen == [([5, 6], torch.float32, (10,), first), (PROMPT, [5, 6], pytest.approx(first + 1))]
    assert got.token_ids == [8]
    want = float(x.float().log_softmax(1)[0, 8])
    assert got.logprobs is not None and got.logprobs[0][8].logprob == pytest.approx(want)  # of the raw logits


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda o, x: x, 2),
        (lambda p, o, x: x, 3),
        (lambda o, x, strength=2.0: x, 2),
        (lambda p, o, x, strength=2.0: x, 3),
        (lambda *a: a[-1], 2),
    ],
)
def test_processor_forms(function: Any, arguments: int) -> None:
    from llmapi._runtime.logit_edits import _arity

    assert _arity(function, 0) == arguments
    assert one(noise(1, 10), row(logits_processors=[function])).error is None


class Method:
    def __call__(self, output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([4]), 99.0)


def test_processors_may_be_objects_and_partials() -> None:
    from functools import partial

    def boost(token: int, output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[token] = 200.0
        return logits

    x = noise(1, 10)
    assert one(x, row(temperature=0, logits_processors=[Method()])).token_ids == [4]
    assert one(x, row(temperature=0, logits_processors=[Method(), partial(boost, 6)])).token_ids == [6]


def test_processors_may_keep_what_they_were_given() -> None:
    given: list[torch.Tensor] = []

    def keep(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        given.append(logits)
        return logits

    x = noise(1, 10)
    with torch.inference_mode():
        one(x, row(logits_processors=[keep], logit_bias={1: 5.0}))
    assert torch.equal(given[0], x[0])
    given[0] += 1  # the user's own, not an inference tensor


def boom(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise KeyError("oops")


BROKEN: list[tuple[Any, str]] = [
    (boom, "KeyError"),
    (lambda o, x: None, "NoneType"),
    (lambda o, x: x.tolist(), "list"),
    (lambda o, x: x[:-1], r"\[9\]"),
    (lambda o, x: x[None], r"\[1, 10\]"),
    (lambda o, x: x.argmax(), r"\[\]"),
    (lambda o, x: x > 0, "torch.bool"),
    (lambda o, x: x.long(), "torch.int64"),
    (lambda x: x, "signature"),
    (lambda a, b, c, d: d, "signature"),
    (lambda o, x, *, must: x, "signature"),
    (lambda o, x: x * math.nan, "NaN"),
    (lambda o, x: x - math.inf, "no token is left"),
]


@pytest.mark.parametrize(("function", "message"), BROKEN)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_broken_processor_fails_its_request_only(function: Any, message: str, settings: dict[str, Any]) -> None:
    x = noise(3, 10)
    rows = [row(seed=1, **settings), row(seed=2, logits_processors=[function], logprobs=1, **settings)]
    rows.append(row([1], seed=3, repetition_penalty=1.5, **settings))
    got = Sampler(10)(x, rows)
    assert isinstance(got[1].error, RequestError) and got[1].token_ids == [] and got[1].logprobs is None
    with pytest.raises(RequestError, match=message):
        raise got[1].error
    for i in (0, 2):
        assert got[i].error is None and got[i].token_ids == one(x[i], rows[i]).token_ids


def test_plus_infinity_forces_a_token() -> None:
    def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([6]), torch.inf)

    for settings in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert one(noise(1, 10), row(logits_processors=[force], **settings)).token_ids == [6]


def test_plans_are_forgotten_with_their_params() -> None:
    sampler = Sampler(10)
    for i in range(20):
        sampler(noise(1, 10), [row(seed=i, logit_bias={1: 1.0})])
    gc.collect()
    assert len(sampler._edits._plans) <= 1


# --- bad model output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 1100}], ids=str)
@pytest.mark.parametrize("vocab", [12, 3000])
def test_rows_without_a_distribution_fail_alone(settings: dict[str, Any], vocab: int) -> None:
    x = noise(5, vocab)
    x[0] = torch.nan
    x[1, 5] = torch.nan
    x[2] = -torch.inf
    got = Sampler(vocab)(x, [row(seed=i, logprobs=1, **settings) for i in range(5)])
    assert "NaN" in str(got[0].error) and "float32" in str(got[0].error)
    assert "1 of the model's" in str(got[1].error)
    assert "-inf" in str(got[2].error)
    for i in (3, 4):
        assert got[i].error is None and got[i].token_ids == one(x[i], row(seed=i, **settings)).token_ids


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 10\].*1 rows of 10"):
        Sampler(10)(noise(2, 10), [row()])
    with pytest.raises(ValueError, match="expected"):
        Sampler(11)(noise(1, 10), [row()])
    assert Sampler(11)(noise(0, 11), []) == []


# --- logprobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_distribution(dtype: torch.dtype) -> None:
    x = noise(3, 1000).to(dtype)
    exact = x.double().log_softmax(1)
    rows = [row([4], seed=i, temperature=0.5, top_k=9, repetition_penalty=3.0, logprobs=4) for i in range(3)]
    for i, got in enumerate(Sampler(1000, Letters())(x, rows)):
        assert got.logprobs is not None and got.logits is None
        [entry] = got.logprobs
        [token] = got.token_ids
        assert next(iter(entry)) == token and len(entry) in (4, 5)
        best = exact[i].sort(descending=True).values[:4].tolist()
        for t, v in entry.items():
            assert v.logprob == pytest.approx(float(exact[i, t]), abs=1e-5)
            assert v.rank == int((exact[i] > exact[i, t]).sum()) + 1
            assert v.decoded_token == f"<{t}>"
        assert sorted((v.logprob for v in entry.values()), reverse=True)[:4] == pytest.approx(best, abs=1e-5)


def test_logprobs_zero_gives_the_token_alone() -> None:
    got = one(noise(1, 50), row(logprobs=0, detokenize=False), tokenizer=Letters())
    assert got.logprobs is not None and list(got.logprobs[0]) == got.token_ids
    assert got.logprobs[0][got.token_ids[0]].decoded_token is None


def test_more_logprobs_than_tokens() -> None:
    got = one(torch.zeros(1, 5), row(logprobs=20))
    assert got.logprobs is not None and sorted(got.logprobs[0]) == list(range(5))
    assert {v.rank for v in got.logprobs[0].values()} == {1}
    assert got.logprobs[0][0].logprob == pytest.approx(-math.log(5))


def test_return_logits_are_the_raw_ones() -> None:
    x = noise(2, 50).bfloat16()
    rows = [row([1], return_logits=True, logit_bias={3: 5.0}), row(return_logits="context")]
    with torch.inference_mode():
        got = Sampler(50)(x, rows)
    assert got[0].logits is not None and got[0].logits.dtype == torch.float32
    assert torch.equal(got[0].logits, x[0].float())
    got[0].logits += 1  # the user's own, not an inference tensor
    assert got[1].logits is None


def test_prompt_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(9, 300)
    tokens = [int(t) for t in torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(0))]
    exact = x.double().log_softmax(1)
    whole = prompt_logprobs(x, tokens, 2, str)
    assert len(whole) == 9
    for t, (token, entry) in enumerate(zip(tokens, whole, strict=True)):
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(float(exact[t, token]), abs=1e-5)
        assert entry[token].rank == int((exact[t] > exact[t, token]).sum()) + 1
        assert set(entry) == {token, *exact[t].topk(2).indices.tolist()}
        assert entry[token].decoded_token == str(token)
    monkeypatch.setattr("llmapi._runtime.logprobs._CHUNK", 600)  # two rows at a time
    assert prompt_logprobs(x, tokens, 2, str) == whole
    assert prompt_logprobs(x[:0], [], 2) == []
    with pytest.raises(ValueError, match="9 rows of logits for 8 tokens"):
        prompt_logprobs(x, tokens[:8], 1)
