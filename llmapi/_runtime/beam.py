"""Beam search as policy over plain numbers: which beams go on, which have ended, when a search is over.

The rules are those of transformers' ``generate(num_beams=W)``:

1. Every candidate is a beam that runs and one more token; its score is the sum of the log probabilities of all its
   tokens. The best come in, :func:`num_candidates` of them.
2. A candidate ends where its token ends sequences, or as the limit of tokens is reached. One that ends among the best
   ``W`` joins the finished ones, of which the best ``W`` stay, by ``score / length ** length_penalty``; one that ends
   further down is dropped.
3. The best ``W`` that do not end go on.
4. It is over once ``W`` are finished and ``early_stopping`` is True; or once ``W`` are finished and the best that runs
   cannot beat the worst of them, at a length of now (``early_stopping=False``) or, for ``"never"`` and a positive
   penalty, of the limit; or as none goes on.

Who goes on sits in a row, and stays there as far as possible: see :func:`seats`.

Where scores are equal the order of the candidates decides, and a finished one stays before a new one.

Groups (Vijayakumar et al. 2016, arXiv:1610.02424) are searches of ``W / groups`` beams, one after the other within a
step; ``diversity_penalty`` is taken off a token's score for each beam of an earlier group that goes on with it in the
same step (:func:`diversify`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmapi.outputs import FinishReason

Ending = tuple[FinishReason, int | str | None]
"""Why a candidate ends, and by which stop token or text."""

NEVER = float("-inf")


def num_candidates(width: int, num_ends: int) -> int:
    """How many candidates a search of ``width`` beams looks at: enough for ``width`` that do not end.

    Args:
        width: beams.
        num_ends: how many tokens end a sequence.
    """
    return max(2, 1 + num_ends) * width


def seats(parents: Sequence[int], rows: int) -> tuple[list[int | None], list[int]]:
    """Which row each continuation takes: the first of a beam its row, each further one the next row that nobody takes.

    The kernel ``beam_choose`` does the same (``csrc/beam_reorder.cu``).

    Args:
        parents: by rank, the row of the beam that it continues; rows that are not among the ``rows`` have no seat.
        rows: how many there are.

    Returns:
        By row, the rank of who sits there, or None; and the ranks of those for whom no row is left.
    """
    by_row: list[int | None] = [None] * rows
    late: list[int] = []
    for rank, row in enumerate(parents):
        if row < rows and by_row[row] is None:
            by_row[row] = rank
        else:
            late.append(rank)
    if late:
        free = [row for row, rank in enumerate(by_row) if rank is None]
        for row, rank in zip(free, late, strict=False):
            by_row[row] = rank
        late = late[len(free) :]
    return by_row, late


def normalized(score: float, length: int, length_penalty: float) -> float:
    """``score / length ** length_penalty``, by which finished sequences are compared; ``length`` counts new tokens."""
    return score / math.pow(length, length_penalty)


@dataclass(eq=False, slots=True)
class Finished:
    """A sequence that has ended.

    Attributes:
        score: sum of its log probabilities over its length to the power of the length penalty.
        cumulative: the sum.
        row: the beam that it continued.
        token: its last token.
        reason, stop: why it ended.
        output: for the owner of the tokens: whatever it keeps of this sequence.
    """

    score: float
    cumulative: float
    row: int
    token: int
    reason: FinishReason
    stop: int | str | None
    output: Any = None


@dataclass(frozen=True, slots=True)
class Finishing:
    """How a search ends at one step, for who keeps its books elsewhere: :meth:`Beams.follow` takes them over.

    Attributes:
        norm: what the scores of those that end at this step are divided by.
        settle: what the best that goes on is divided by, to be compared with them.
        last: whether no more tokens may follow.
        always: whether it is over as soon as as many have ended as there are beams.
        worths: what has ended before, best first, as far as it is known here.
    """

    norm: float
    settle: float
    last: bool
    always: bool
    worths: list[float]


@dataclass(slots=True)
class Beams:
    """The search of one group.

    Args:
        width: beams of the group.
        length_penalty: exponent of the length.
        early_stopping: see rule 4.
        max_tokens: limit of new tokens.
        grouped: whether there are other groups. Two things are then as in transformers' ``group-beam-search``: what
            runs is judged by the best candidate, ended or not; and at the limit, what has not ended counts only where
            the search is not over without it.

    Attributes:
        scores: cumulative score of each beam that runs, by row; one zero at the beginning.
        finished: best first, at most ``width``.
        length: new tokens so far.
        over: whether the search has ended.
    """

    width: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    max_tokens: int
    grouped: bool = False
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[Finished] = field(default_factory=list)
    length: int = 0
    over: bool = False

    def advance(
        self,
        scores: Sequence[float],
        rows: Sequence[int],
        tokens: Sequence[int],
        ends: frozenset[int],
        ending: Callable[[int, int], Ending | None] | None = None,
    ) -> tuple[list[int], list[Finished]]:
        """Take in a step's candidates, best first.

        Args:
            scores: cumulative; what has -inf is no candidate.
            rows: the beam that each continues.
            tokens: its token.
            ends: tokens that end a sequence.
            ending: asked of a row and a token that is none of ``ends``: whether this ends the sequence; None: never.

        Returns:
            Ranks of the candidates that go on, or would if it were not over, at most ``width``; and the finished ones
            that are new. :attr:`scores` is not changed: :meth:`go_on` does that.
        """
        self.length += 1
        width = self.width
        last = self.length >= self.max_tokens
        count = len(scores)
        usual = count >= width and not last and ending is None and scores[width - 1] != NEVER
        if usual and ends.isdisjoint(tokens[:width]):  # none of them ends
            self.over = len(self.finished) == width and self._settled(scores[0])
            return list(range(width)), []
        stops = last and self.grouped  # the limit counts after what has ended
        ranks: list[int] = []
        new: list[Finished] = []
        for rank in range(count):
            score = scores[rank]
            if score == NEVER or len(ranks) == width:
                break
            if last and not stops and rank >= width:
                break
            token, row = tokens[rank], rows[rank]
            end: Ending | None = None
            if token in ends:
                end = "stop", token
            elif ending is not None:
                end = ending(row, token)
            if end is None and last and not stops:
                end = "length", None
            if end is None:
                ranks.append(rank)
            elif rank < width:
                worth = normalized(score, self.length, self.length_penalty)
                new.append(Finished(worth, score, row, token, *end))
        new = self._merge(new)
        if not ranks:
            self.over = True
        elif len(self.finished) == width:
            self.over = self._settled(scores[0 if self.grouped else ranks[0]])
        if stops and not self.over:
            over = [normalized(scores[rank], self.length, self.length_penalty) for rank in ranks]
            cut = zip(over, ranks, strict=True)
            new += self._merge([Finished(w, scores[r], rows[r], tokens[r], "length", None) for w, r in cut])
            new = [f for f in new if f in self.finished]
            self.over = True
        return ranks, new

    def finishing(self, later: int) -> Finishing:
        """How it ends.

        Args:
            later: at which step: 0 is the next one.
        """
        length = self.length + 1 + later
        always = self.early_stopping is True or self.width == 1
        norm = math.pow(length, self.length_penalty)
        settle = math.pow(self._judged_at(length), self.length_penalty)
        return Finishing(norm, settle, length >= self.max_tokens, always, [f.score for f in self.finished])

    def follow(
        self,
        record: Sequence[int],
        scores: Sequence[float],
        rows: Sequence[int],
        tokens: Sequence[int],
        ends: frozenset[int],
    ) -> tuple[list[int], list[Finished]]:
        """Take in a step's candidates whose books were kept elsewhere, by the rules of :meth:`advance`.

        Args:
            record: 1 where one that has ended now is among the best, plus 2 where the search is over; how many have
                ended; and where each comes from: its place before, or ``~rank`` of its candidate.
            scores, rows, tokens, ends: as of :meth:`advance`.

        Returns:
            As of :meth:`advance`.
        """
        self.length += 1
        state, count, *sources = record
        new: list[Finished] = []
        finished: list[Finished] = []
        for source in sources[:count]:
            if source >= 0:
                finished.append(self.finished[source])
                continue
            score, row, token = scores[~source], rows[~source], tokens[~source]
            worth = normalized(score, self.length, self.length_penalty)
            end: Ending = ("stop", token) if token in ends else ("length", None)
            new.append(Finished(worth, score, row, token, *end))
            finished.append(new[-1])
        self.finished, self.over = finished, bool(state & 2)
        if self.length >= self.max_tokens:
            return [], new
        able = (rank for rank, token in enumerate(tokens) if token not in ends and scores[rank] > NEVER)
        return list(itertools.islice(able, self.width)), new

    def _merge(self, new: list[Finished]) -> list[Finished]:
        """Keep the best of those that have ended; return the new ones among them."""
        if not new:
            return new
        merged = sorted([*self.finished, *new], key=lambda f: -f.score)  # stable: the older of equals first
        self.finished = merged[: self.width]
        return [f for f in new if f in self.finished]

    def go_on(self, scores: list[float]) -> None:
        """Set the scores of the beams that run, by row."""
        self.scores = scores

    def _settled(self, best: float) -> bool:
        """Whether nothing that runs can beat what is finished; ``width`` are."""
        if self.early_stopping is True or (self.width == 1 and not self.grouped):  # one beam is greedy decoding
            return True
        return normalized(best, self._judged_at(self.length), self.length_penalty) <= self.finished[-1].score

    def _judged_at(self, length: int) -> int:
        """The length at which what runs is compared with what is finished, at a length of now."""
        return self.max_tokens if self.early_stopping == "never" and self.length_penalty > 0 else length


def num_diverse(candidates: int, rows: int, taken: int) -> int:
    """How many candidates :func:`diversify` needs so that ``candidates`` of its result are the best there are.

    Args:
        candidates: wanted.
        rows: beams of the group.
        taken: most beams of earlier groups.
    """
    return candidates + rows * taken


def diversify(
    scores: Sequence[float], rows: Sequence[int], tokens: Sequence[int], taken: Counter[int], penalty: float, count: int
) -> tuple[list[float], list[int], list[int]]:
    """The best ``count`` candidates of a group after each lost ``penalty`` for every earlier beam with its token.

    Args:
        scores, rows, tokens: candidates, best first.
        taken: by token, how many beams of earlier groups go on with it in this step.
        penalty: at least 0.
        count: how many to keep.
    """
    penalized = [score - penalty * taken[token] for score, token in zip(scores, tokens, strict=True)]
    order = sorted(range(len(penalized)), key=lambda i: -penalized[i])[:count]
    return [penalized[i] for i in order], [rows[i] for i in order], [tokens[i] for i in order]
