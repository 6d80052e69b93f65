"""Flight: a step that was launched and whose tokens are not known on the host yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from llmapi._runtime.candidates import BeamAsk, PendingCandidates
from llmapi._runtime.job import Job
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
    ``row`` of the step launched last. The engine puts the token there before the next step reads it.

    Attributes:
        rows: what is sampled.
        pending: the tokens; None where no row is sampled.
        overlaps: whether the next step may be launched before the tokens are known.
        probed: jobs whose probe took its last row.
        turns: searches that take part.
        candidates: what they wait for; None where there are none.
    """

    rows: list[SampleRow]
    pending: Pending | None
    overlaps: bool
    probed: list[Job] = field(default_factory=list)
    turns: list[BeamTurn] = field(default_factory=list)
    candidates: PendingCandidates | None = None
    _reserved: list[bool] = field(default_factory=list)

    def reserve(self) -> None:
        """Append the references. A sequence that gets its last token gets none: it has nothing more to compute."""
        for index, row in enumerate(self.rows):
            seq = row.sequence
            wanted = not seq.finished and seq.num_output + 1 < seq.request.max_tokens
            if wanted:
                seq.token_ids.append(~index)
            self._reserved.append(wanted)

    def reserved(self) -> list[bool]:
        """For each row, whether a reference stands in its sequence."""
        return self._reserved or [False] * len(self.rows)
