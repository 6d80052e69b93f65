"""Flight: a step that was launched and whose tokens are not known on the host yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from llmapi._runtime.beam_ask import BeamAsk, Chosen
from llmapi._runtime.beam_found import PendingCandidates
from llmapi._runtime.job import Job
from llmapi._runtime.request import Request
from llmapi._runtime.sampler import Sampled, SampleRow


class Pending(Protocol):
    """Tokens on their way."""

    @property
    def ids(self) -> torch.Tensor | None:
        """``[rows]`` int32 on the engine's device, where the next step may take them from; None where it never does."""

    def result(self) -> list[Sampled]:
        """Wait for them."""


@dataclass(slots=True)
class BeamTurn:
    """A search's part of a step.

    Attributes:
        job: whose.
        first_ask: place of its asks among those of the step.
        asks: what it wants to know; see :meth:`llmapi._runtime.beam_run.BeamRun.asks`.
    """

    job: Job
    first_ask: int
    asks: list[BeamAsk]


@dataclass(slots=True)
class Flight:
    """A launched step.

    While it flies, a sequence whose next token is not its last carries a reference in that token's place, ``~row``: row
    ``row`` of the step launched last. The engine puts the token there before the next step reads it. The rows of
    searches for which the device chose who goes on come after those that are sampled. A beam's reference is to the
    token with which the row goes on, whichever beam it goes on from.

    Attributes:
        rows: what is sampled.
        pending: the tokens; None where no row is sampled.
        overlaps: whether the next step may be launched before the tokens are known.
        probed: jobs whose probe took its last row.
        turns: searches that take part.
        candidates: what they wait for; None where there are none.
        step: its number.
        moved: searches whose beams this step moved on the device, as the step before chose there.
        dropped: of these, the ones that the host then moved otherwise: the step computed nothing for them.
    """

    rows: list[SampleRow]
    pending: Pending | None
    overlaps: bool
    probed: list[Job] = field(default_factory=list)
    turns: list[BeamTurn] = field(default_factory=list)
    candidates: PendingCandidates | None = None
    step: int = 0
    moved: set[Request] = field(default_factory=set)
    dropped: set[Request] = field(default_factory=set)
    _reserved: list[bool] = field(default_factory=list)

    @property
    def chosen(self) -> Chosen | None:
        """Who goes on in its searches, on the device."""
        return None if self.candidates is None else self.candidates.chosen

    def slots(self) -> dict[Request, int]:
        """The first place in :attr:`chosen` of each search that is there."""
        chosen = self.chosen
        return {} if chosen is None else {turn.job.request: chosen.slots[turn.first_ask] for turn in self.turns}

    def ids(self) -> torch.Tensor | None:
        """What references stand for."""
        sampled = None if self.pending is None else self.pending.ids
        if self.chosen is None:
            return sampled
        return self.chosen.tokens if sampled is None else torch.cat([sampled, self.chosen.tokens])

    def drop(self) -> None:
        """Take out the searches that are dropped."""
        self.turns = [turn for turn in self.turns if turn.job.request not in self.dropped]

    def reserve(self) -> None:
        """Append the references. A sequence that gets its last token gets none: it has nothing more to compute."""
        for turn in self.turns:
            if not turn.job.request.finished:
                assert turn.job.beams is not None and self.chosen is not None
                turn.job.beams.reserve(len(self.rows) + self.chosen.slots[turn.first_ask])
        for index, row in enumerate(self.rows):
            seq = row.sequence
            wanted = not seq.finished and seq.num_output + 1 < seq.request.max_tokens
            if wanted:
                seq.token_ids.append(~index)
            self._reserved.append(wanted)

    def reserved(self) -> list[bool]:
        """For each row, whether a reference stands in its sequence."""
        return self._reserved or [False] * len(self.rows)
