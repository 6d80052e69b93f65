"""Candidates: the best of each search of a batch, against a sort of everything in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from typing import Any

import pytest
import torch

from llmapi._runtime.beam_ask import BeamAsk, Spans
from llmapi._runtime.beam_found import Found
from llmapi._runtime.candidates import Candidates, select
from llmapi._runtime.logit_edits import LogitEdits
from llmapi._runtime.request import Request, Sequence
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams


def search(width: int, output: Rows[int] = (), **options: Any) -> list[Sequence]:
    """The beams of a request, each with the same output so far."""
    params = SamplingParams(use_beam_search=True, beam_width=width, **options)
    request = Request("r", None, [1, 2], params, 0, 50, frozenset([0]), RequestMetrics(0.0))
    request.sequences = [Sequence(request, i, [1, 2, *output], 2) for i in range(width)]
    return request.sequences


def brute(x: torch.Tensor, ask: BeamAsk) -> list[tuple[float, int, int]]:
    """Score, row and token of every continuation, best first; equal ones by row, then token."""
    rows = x[ask.first_row : ask.first_row + len(ask.sequences)]
    every = [
        (-(score + value), row, token)
        for row, score in enumerate(ask.scores)
        for token, value in enumerate(rows[row].tolist())
    ]
    every.sort()
    return [(-s, r, t) for s, r, t in every[: ask.count]]


def check(found: Found, wanted: list[tuple[float, int, int]], *, exact: bool = False) -> None:
    assert found.error is None
    told = [(s, r, t) for s, r, t in zip(found.scores, found.rows, found.tokens, strict=True) if s != -torch.inf]
    wanted = [w for w in wanted if w[0] != -torch.inf]
    assert [s for s, _, _ in told] == pytest.approx([s for s, _, _ in wanted], abs=1e-4)
    if exact:
        assert [t[1:] for t in told] == [w[1:] for w in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_ragged_searches(vocab: int, dtype: torch.dtype) -> None:
    rng = random.Random(vocab)
    torch.manual_seed(vocab)
    for _ in range(6):
        asks, first = [], rng.randint(0, 2)
        for _ in range(rng.randint(1, 6)):
            width = rng.choice([1, 2, 3, 4, 16])
            scores = [-rng.random() * 5 for _ in range(width)]
            asks.append(BeamAsk(search(width), scores, first, 2 * width + rng.randint(0, 3)))
            first += width + rng.randint(0, 2)  # rows of others lie between
        logits = torch.randn(first + 1, vocab).mul(3).to(dtype)
        found = Candidates(vocab, LogitEdits(vocab)).start(logits, asks).result()
        exact = logits.double().log_softmax(1)
        for ask, own in zip(asks, found, strict=True):
            check(own, brute(exact, ask))
            assert len(own.scores) == ask.count


def test_rows_of_others_are_left_alone() -> None:
    """Few beams in a step of many rows: the search sees the beams' alone."""
    seen: list[int] = []

    def watched(x: torch.Tensor, spans: Spans, normalized: bool) -> torch.Tensor:
        seen.append(len(x))
        return select(x, spans, normalized)

    torch.manual_seed(3)
    logits = torch.randn(40, 50)
    asks = [BeamAsk(search(2), [-1.0, -2.0], 30, 4), BeamAsk(search(1), [0.0], 7, 3)]
    for ask, own in zip(asks, Candidates(50, LogitEdits(50), watched).start(logits, asks).result(), strict=True):
        check(own, brute(logits.double().log_softmax(1), ask), exact=True)
    assert seen == [3]


def test_equal_scores_stand_by_row_and_then_by_token() -> None:
    x = torch.zeros(4, 600)
    x[1:3, 17] = 2.0
    spans = Spans([0, 1], [1, 3], [700, 5], torch.tensor([0.0, -1.0, -1.0, 1.0]))
    scores, tokens, rows = select(x, spans, True)
    assert tokens[0, :600].tolist() == list(range(600))
    assert scores.view(torch.float32)[0, 600:].tolist() == [-torch.inf] * 100
    assert list(zip(rows[1, :5].tolist(), tokens[1, :5].tolist(), strict=True)) == [
        (0, 17),
        (1, 17),
        (2, 0),
        (2, 1),
        (2, 2),
    ]


def test_nan_comes_first_and_minus_infinity_last() -> None:
    x = torch.tensor([[0.0, torch.nan, 1.0], [-torch.inf, 5.0, -torch.inf]])
    out = select(x, Spans([0, 1], [1, 1], [3, 3], torch.zeros(2)), True)
    scores = out[0].view(torch.float32)
    assert scores[0].isnan().tolist() == [True, False, False] and out[1, 0].tolist() == [1, 2, 0]
    assert scores[1].tolist() == [5.0, -torch.inf, -torch.inf] and out[1, 1, 0] == 1


def test_edits_act_on_log_probabilities_without_normalizing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    plain = BeamAsk(search(2), [-1.0, -2.0], 0, 6)
    edited = search(3, [5, 5, 9], repetition_penalty=1.5, presence_penalty=0.5, logit_bias={7: 3.0}, min_tokens=9)
    ask = BeamAsk(edited, [0.0, -0.5, -1.0], 2, 8)
    exact = logits.double().log_softmax(1)
    changed = exact.clone()
    changed[2:5, 7] += 3.0
    changed[2:5, 0] = -torch.inf
    for token in (1, 2, 5, 9):
        changed[2:5, token] *= 1.5  # all log probabilities are negative
    for token in (5, 9):
        changed[2:5, token] -= 0.5
    first, second = Candidates(40, LogitEdits(40)).start(logits, [plain, ask]).result()
    check(first, brute(exact, plain), exact=True)
    check(second, brute(changed, ask), exact=True)


def test_greedy_asks_edit_logits() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 40)
    ask = BeamAsk(search(1, repetition_penalty=2.0), [0.0], 0, 4, greedy=True)
    changed = logits.clone()
    for token in (1, 2):
        changed[0, token] = torch.where(logits[0, token] < 0, logits[0, token] * 2, logits[0, token] / 2)
    [found] = Candidates(40, LogitEdits(40)).start(logits, [ask]).result()
    check(found, brute(changed.double().log_softmax(1), ask), exact=True)


def test_a_failing_processor_is_its_own_requests_error() -> None:
    def broken(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("no")

    def certain(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[3] = torch.inf
        return logits

    torch.manual_seed(2)
    logits = torch.randn(5, 40)
    asks = [
        BeamAsk(search(2, logits_processors=[broken]), [0.0, 0.0], 0, 4),
        BeamAsk(search(2), [0.0, 0.0], 2, 4),
        BeamAsk(search(1, logits_processors=[certain]), [-1.0], 4, 2),
    ]
    bad, good, sure = Candidates(40, LogitEdits(40)).start(logits, asks).result()
    assert bad.error is not None and "KeyError: 'no'" in str(bad.error)
    check(good, brute(logits.double().log_softmax(1), asks[1]), exact=True)
    assert (sure.scores, sure.tokens[0]) == ([-1.0, -torch.inf], 3)


def test_what_has_no_choice_says_why() -> None:
    logits = torch.randn(2, 8)
    logits[1, 3] = torch.nan
    pending = Candidates(8, LogitEdits(8)).start(logits, [BeamAsk(search(2), [0.0, 0.0], 0, 4)])
    [found] = pending.result()
    assert found.scores[0] != found.scores[0]
    assert "1 of the model's 8 logits are NaN" in str(pending.no_choice(0))
    logits[1, 3] = torch.inf
    pending = Candidates(8, LogitEdits(8)).start(logits, [BeamAsk(search(2), [0.0, 0.0], 0, 4)])
    assert pending.result()[0].scores[0] != pending.result()[0].scores[0]
    assert "1 of the model's 8 logits are +inf" in str(pending.no_choice(0))
    ask = BeamAsk(search(1, logits_processors=[lambda output, x: x - torch.inf]), [0.0], 0, 2)
    pending = Candidates(8, LogitEdits(8)).start(torch.zeros(1, 8), [ask])
    assert pending.result()[0].scores[0] == -torch.inf
    assert "no token is left of 8" in str(pending.no_choice(0))
