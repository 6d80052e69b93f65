"""What searches want of a step, and what the device says of them, as plain records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llmapi._runtime.beam import Finishing
from llmapi._runtime.logit_edits import Foreseen
from llmapi._runtime.request import Sequence


@dataclass(slots=True)
class BeamAsk:
    """What is wanted of the beams of one group.

    Attributes:
        sequences: the beams, one a row.
        scores: cumulative score of each.
        first_row: row of the step's logits that belongs to the first; the others follow.
        count: candidates wanted.
        greedy: edits act on logits, not on log probabilities, as they do in greedy decoding.
        carried: first place of the beams among those that the step before chose, where their scores are then; None:
            they are in ``scores``.
        ends: tokens that end the search's sequences, where the device is to choose who goes on; None where it is not.
        finishing: how the search ends, where the device is to keep its books, too; None where the host does.
    """

    sequences: list[Sequence]
    scores: list[float]
    first_row: int
    count: int
    greedy: bool = False
    carried: int | None = None
    ends: frozenset[int] | None = None
    finishing: Finishing | None = None


@dataclass(slots=True)
class Spans:
    """The searches of a call as arrays on the host; entry ``i`` of each belongs to search ``i``.

    Attributes:
        first, rows, counts: int32: first row of logits, number of rows, candidates wanted.
        cumulative: ``[N]`` float32, the score of the beam of each row of logits.
        carried: as in :class:`BeamAsk`; empty where nothing is carried.
        before: what is carried.
        edits: what is changed in the log probabilities of each search's beams; empty where nothing is.
        beams: the sequences of each search, for penalties; empty where there are no edits.
    """

    first: list[int]
    rows: list[int]
    counts: list[int]
    cumulative: Tensor
    carried: list[int | None] = field(default_factory=list)
    before: Chosen | None = None
    edits: list[Foreseen | None] = field(default_factory=list)
    beams: list[list[Sequence]] = field(default_factory=list)


@dataclass(slots=True)
class Chosen:
    """Who goes on, on the device: for each place, a beam of a search whose continuations were chosen there.

    Attributes:
        parents, tokens: ``[R]`` int32: which beam of its search it goes on from, with which token.
        scores: ``[R]`` float32: its cumulative score.
        worths: ``[R]`` float64: what has ended of its search, best first, then -inf; not that of the beam. Anything
            where the host keeps the books.
        slots: first place of each such ask, by ask.
    """

    parents: Tensor
    tokens: Tensor
    scores: Tensor
    worths: Tensor
    slots: dict[int, int]


class Chooser(Protocol):
    """Chooses who goes on, on the device.

    Attributes:
        max_rows: the most rows of logits that it finds candidates of.
    """

    max_rows: int

    def fits(self, rows: int, count: int) -> bool:
        """Whether it serves searches of so many beams and candidates."""

    def choose(
        self, found: Tensor, asks: list[tuple[int, BeamAsk]], before: Chosen | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queue it.

        Args:
            found: the result of :data:`Select`.
            asks: searches, each after its place there.
            before: what the step before chose; needed where an ask's scores are carried.

        Returns:
            ``[3, R]`` int32: parents, tokens, and scores as the bits of float32, search after search; ``[R]`` float64:
            :attr:`Chosen.worths`; and int32 ``[A, 2 + W]``: for each search a record for
            :meth:`llmapi._runtime.beam.Beams.follow`.
        """


Select = Callable[[Tensor, Spans, bool], Tensor]
"""Finds candidates: ``(logits [N, V], spans, normalized) -> [3, R, K]`` int32 on the device of the logits.

``K`` is the largest count. Plane 0 holds scores as the bits of float32, plane 1 tokens, plane 2 rows within the search;
each search's candidates stand best first, equal scores by row and then by token, and what is beyond its count, or its
rows times V, has the score -inf. ``normalized`` says that the logits are log probabilities already (float32). A row's
NaN makes its search's first score NaN; a kernel then says row -1, and why in the token (:func:`no_choice.failed`).
"""
