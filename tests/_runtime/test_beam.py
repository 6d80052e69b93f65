"""The policy of beam search, without torch: small searches whose result is known, and faults that would show."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections import Counter

import pytest

from llmapi._runtime.beam import NEVER, Beams, diversify, normalized, num_candidates, num_diverse, seats

END = 0
ENDS = frozenset([END])
NAN = math.nan


def beams(width: int = 2, **options: object) -> Beams:
    values = {"length_penalty": 1.0, "early_stopping": False, "max_tokens": 10} | options
    return Beams(width, **values)  # type: ignore[arg-type]


def test_it_needs_no_torch() -> None:
    code = "import sys, llmapi._runtime.beam; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_how_many_candidates() -> None:
    """Enough that the beams can go on even where every end token comes first in every row."""
    assert [num_candidates(3, ends) for ends in range(4)] == [6, 6, 9, 12]
    assert num_diverse(8, 4, 12) == 8 + 4 * 12


def test_the_best_that_do_not_end_go_on() -> None:
    own = beams(2)
    ranks, new = own.advance([-1.0, -2.0, -3.0, -4.0], [0, 0, 0, 0], [5, END, 6, 7], ENDS)
    assert ranks == [0, 2] and not own.over and own.length == 1
    assert [(f.score, f.row, f.token, f.reason, f.stop) for f in new] == [(-2.0, 0, END, "stop", END)]
    own.go_on([-1.0, -3.0])
    assert own.scores == [-1.0, -3.0]


def test_what_ends_beyond_the_best_is_dropped() -> None:
    own = beams(2)
    ranks, new = own.advance([-1.0, -2.0, -3.0, -4.0], [0] * 4, [5, 6, END, 7], ENDS)
    assert (ranks, new, own.finished) == ([0, 1], [], [])


def test_scores_are_over_the_length() -> None:
    own = beams(2, length_penalty=2.0)
    own.advance([-1.0, -2.0, -3.0, -4.0], [0] * 4, [5, 6, 7, 8], ENDS)
    own.advance([-2.0, -3.0, -4.0, -5.0], [0, 1, 0, 1], [END, 6, 7, 8], ENDS)
    assert [f.score for f in own.finished] == [-2.0 / 4] and own.finished[0].cumulative == -2.0
    assert normalized(-6.0, 3, 1.0) == -2.0 and normalized(-6.0, 3, 0.0) == -6.0 and normalized(-6.0, 3, -1.0) == -18.0


@pytest.mark.parametrize(("early_stopping", "over"), [(True, True), (False, False), ("never", False)])
def test_early_stopping_ends_with_the_last_that_is_needed(early_stopping: bool | str, over: bool) -> None:
    own = beams(2, early_stopping=early_stopping)
    own.advance([-1.0, -3.0, -3.2, -3.3], [0] * 4, [5, END, 6, 7], ENDS)
    assert not own.over
    own.advance([-2.0, -2.2, -4.0, -4.1], [0, 0, 1, 1], [5, END, 6, 7], ENDS)
    assert [f.score for f in own.finished] == [-1.1, -3.0] and own.over == over


def test_the_heuristic_judges_what_runs_at_its_length_and_never_at_the_limit() -> None:
    """Two finished at -1.5; what runs has -4 after two tokens: -2 now, -0.4 at the limit of ten."""
    for early_stopping, penalty, over in [(False, 1.0, True), ("never", 1.0, False), ("never", 0.0, True)]:
        own = beams(2, early_stopping=early_stopping, length_penalty=penalty)
        own.advance([-1.5, -1.5, -3.0, -3.0], [0] * 4, [END, 1, 5, 6], frozenset([END, 1]))
        assert not own.over or penalty == 0.0 or early_stopping is False
        if not own.over:
            own.advance([-4.0, -4.0, -5.0, -5.0], [0, 1, 0, 1], [5, 6, 7, 8], frozenset([END, 1]))
        assert own.over == over, (early_stopping, penalty)


def test_at_the_limit_the_best_candidates_count_ended_or_not() -> None:
    own = beams(2, max_tokens=1)
    ranks, new = own.advance([-1.0, -2.0, -3.0, -4.0], [0] * 4, [5, END, 6, 7], ENDS)
    assert not ranks and own.over
    assert [(f.token, f.reason) for f in own.finished] == [(5, "length"), (END, "stop")] and new == own.finished


def test_a_better_one_takes_the_place_of_a_worse() -> None:
    own = beams(1, early_stopping="never")
    own.width = 2
    own.advance([-1.0, -2.0, -3.0, -4.0], [0] * 4, [5, END, 6, 7], ENDS)
    own.advance([-1.2, -2.5, -3.0, -4.0], [0] * 4, [END, 5, 6, 7], ENDS)
    assert [f.score for f in own.finished] == [-0.6, -2.0]
    _, new = own.advance([-2.6, -2.7, -4.0, -5.0], [0] * 4, [END, 5, 6, 7], ENDS)
    assert [round(f.score, 4) for f in own.finished] == [-0.6, -0.8667] and new == own.finished[1:]
    _, new = own.advance([-9.0, -9.1, -9.2, -9.3], [0] * 4, [END, 5, 6, 7], ENDS)
    assert new == [] and len(own.finished) == 2


def test_equal_scores_keep_the_order_of_the_candidates_and_the_older_first() -> None:
    own = beams(2, length_penalty=0.0)
    own.advance([-1.0, -1.0, -1.0, -1.0], [0] * 4, [END, 5, 6, 7], ENDS)
    first = own.finished[0]
    own.advance([-1.0, -1.0, -1.0, -1.0], [0, 0, 1, 1], [END, 1, 6, 7], frozenset([END, 1]))
    assert own.finished[0] is first and own.finished[1].token == END and own.finished[1].row == 0


def test_seats() -> None:
    assert seats([0, 1, 2], 3) == ([0, 1, 2], [])
    assert seats([2, 2, 0, 2], 4) == ([2, 1, 0, 3], [])
    assert seats([3, 3, 3, 3], 4) == ([1, 2, 3, 0], [])
    assert seats([1, 1], 3) == ([1, 0, None], [])
    assert seats([0, 0, 0], 1) == ([0], [1, 2]) and seats([0, 0], 0) == ([], [0, 1])


def test_excluded_tokens_are_no_candidates() -> None:
    own = beams(3)
    ranks, _ = own.advance([-1.0, NEVER, NEVER], [0] * 3, [5, 6, 7], ENDS)
    assert ranks == [0] and not own.over
    ranks, _ = own.advance([NEVER, NEVER, NEVER], [0] * 3, [5, 6, 7], ENDS)
    assert ranks == [] and own.over


def test_endings_are_asked_of_what_could_go_on() -> None:
    own, asked = beams(2), []

    def ending(row: int, token: int) -> tuple[str, str] | None:
        asked.append((row, token))
        return ("stop", "x") if token == 6 else None

    ranks, new = own.advance([-1.0, -2.0, -3.0, -4.0], [0] * 4, [5, 6, 7, 8], ENDS, ending)  # type: ignore[arg-type]
    assert ranks == [0, 2] and asked == [(0, 5), (0, 6), (0, 7)] and [f.stop for f in new] == ["x"]


def test_a_width_of_one_is_greedy() -> None:
    own = beams(1, early_stopping="never")
    assert own.advance([-1.0, -1.1], [0, 0], [5, 6], ENDS)[0] == [0]
    own.advance([-1.2, -1.3], [0, 0], [END, 6], ENDS)
    assert own.over and own.finished[0].token == END


def test_diversify_by_definition() -> None:
    rng = random.Random(1)
    for _ in range(200):
        rows, vocab, count = rng.randint(1, 4), 12, rng.randint(1, 8)
        places = itertools.product(range(rows), range(vocab))
        table = sorted(((-3 * rng.random(), r, t) for r, t in places), key=lambda c: -c[0])
        taken = Counter(rng.choices(range(vocab), k=rng.randint(0, 4)))
        penalty = rng.choice([0.3, 2.0])
        wanted = sorted((-(s - penalty * taken[t]), r, t) for s, r, t in table)[:count]
        cut = table[: num_diverse(count, rows, sum(taken.values()))]
        scores, chosen, tokens = diversify(*map(list, zip(*cut, strict=True)), taken, penalty, count)  # type: ignore[arg-type]
        assert sorted(zip((-s for s in scores), chosen, tokens, strict=True)) == wanted


def exhaustive(logp: dict[tuple[int, ...], list[float]], length: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every sequence that ends, or is of full length, by its mean log probability."""
    out = []
    stack: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    while stack:
        total, ids = stack.pop()
        if ids and (ids[-1] == END or len(ids) == length):
            out.append((total / len(ids), ids))
            continue
        stack += [(total + value, (*ids, token)) for token, value in enumerate(logp[ids])]
    return sorted(out, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_beams_for_every_prefix_find_the_best_of_all(seed: int) -> None:
    """With as many beams as there are prefixes nothing is ever cut, so the search is exhaustive."""
    rng, vocab, length = random.Random(seed), 3, 4
    logp: dict[tuple[int, ...], list[float]] = {}
    for size in range(length):
        for ids in itertools.product(range(vocab), repeat=size):
            weights = [rng.random() + 0.01 for _ in range(vocab)]
            logp[ids] = [math.log(w / sum(weights)) for w in weights]
    own = beams(vocab**length, early_stopping="never", max_tokens=length)
    live: list[tuple[int, ...]] = [()]
    ended: dict[int, tuple[int, ...]] = {}
    while not own.over:
        table = sorted(
            ((own.scores[r] + v, r, t) for r, ids in enumerate(live) for t, v in enumerate(logp[ids])), reverse=True
        )
        scores, rows, tokens = map(list, zip(*table, strict=True))
        ranks, new = own.advance(scores, rows, tokens, ENDS)
        for one in new:
            ended[id(one)] = (*live[one.row], one.token)
        live = [(*live[rows[r]], tokens[r]) for r in ranks]
        own.go_on([scores[r] for r in ranks])
    found = [(f.score, ended[id(f)]) for f in own.finished]
    assert [ids for _, ids in found] == [ids for _, ids in exhaustive(logp, length)]
