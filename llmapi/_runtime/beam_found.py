"""A step's candidates on their way to the host, with what users want to know of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmapi._runtime.beam_ask import BeamAsk, Chooser, Chosen
from llmapi._runtime.logprobs import Measured, Told, measure
from llmapi._runtime.no_choice import failed, no_choice
from llmapi._runtime.transfer import indices, to_host
from llmapi.errors import RequestError

_EXCLUDED = 0  # beside a kernel's reasons: edits left no token


@dataclass(slots=True)
class Found:
    """Candidates of one group, best first: cumulative scores, the beam's row within the group, the token.

    Attributes:
        error: why the request cannot go on; the lists are empty then.
        record: for :meth:`llmapi._runtime.beam.Beams.follow`, where the device keeps the search's books.
        report: what the user wants to know of them, if anything.
    """

    scores: list[float]
    rows: list[int]
    tokens: list[int]
    error: RequestError | None = None
    record: list[int] | None = None
    report: Report | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a user wants to know of a group's candidates.

    Attributes:
        told: log probabilities under the raw logits, of all groups of a call; None where nobody asks for any.
        first: place of the group's first candidate there.
        first_row: place of its first beam there.
        logits: ``[beams, V]`` float32 on the host, raw; None where they are not asked for.
    """

    told: Told | None
    first: int
    first_row: int
    logits: Tensor | None


@dataclass(slots=True)
class PendingCandidates:
    """A step's candidates on their way to the host.

    Attributes:
        logits: of the step.
        asks: what was asked for.
        errors: by ask, why it failed.
        edited: raw and edited logits of an ask's rows, by ask.
        foreseen: asks that are edited where their candidates are found.
        chosen: who goes on, where the device chose for some of the asks.
    """

    logits: Tensor
    asks: list[BeamAsk]
    errors: dict[int, RequestError] = field(default_factory=dict)
    edited: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    chosen: Chosen | None = None
    foreseen: set[int] = field(default_factory=set)
    _reasons: dict[int, int] = field(default_factory=dict)
    _parts: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _records: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _reports: list[_Reports] = field(default_factory=list)
    _arrived: torch.cuda.Event | None = None

    def add(self, members: list[int], found: Tensor) -> None:
        """Take the result of :data:`Select` for some of the asks."""
        self._parts.append((members, found))

    def choose(self, chooser: Chooser, before: Chosen | None) -> None:
        """Queue who goes on and who has ended, for the asks of which it is wanted."""
        parts: list[tuple[Tensor, Tensor]] = []
        slots: dict[int, int] = {}
        count = 0
        for members, found in self._parts:
            wanted = [(place, i) for place, i in enumerate(members) if self.asks[i].ends is not None]
            if not wanted:
                continue
            for _, i in wanted:
                slots[i] = count
                count += len(self.asks[i].sequences)
            *part, records = chooser.choose(found, [(place, self.asks[i]) for place, i in wanted], before)
            parts.append((part[0], part[1]))
            self._records.append(([i for _, i in wanted], records))
        if parts:
            chosen, worths = (torch.cat(each, -1) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
            self.chosen = Chosen(chosen[0], chosen[1], chosen[2].view(torch.float32), worths, slots)

    def send(self) -> None:
        """Begin to copy all to the host, with what users want to know of the candidates."""
        for members, found in self._parts:
            wanted = [place for place, i in enumerate(members) if _reports(self.asks[i])]
            if wanted:
                own = found[1:] if len(wanted) == len(members) else found[1:, indices(wanted, found.device)]
                numbers = [members[place] for place in wanted]
                self._reports.append(_Reports.of(self.logits, numbers, [self.asks[i] for i in numbers], own))
        self._parts = [(members, to_host(found)) for members, found in self._parts]
        self._records = [(members, to_host(records)) for members, records in self._records]
        if self.logits.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> list[Found]:
        """Wait, and give the candidates of each ask."""
        if self._arrived is not None:
            self._arrived.synchronize()
        out: list[Found | None] = [None] * len(self.asks)
        for members, part in self._parts:
            planes = part.numpy()
            scores = planes[0].view(np.float32).tolist()
            tokens, rows = planes[1].tolist(), planes[2].tolist()
            width = planes.shape[2]
            for place, i in enumerate(members):
                count = self.asks[i].count
                if scores[place][0] != scores[place][0] and rows[place][0] < 0:
                    self._reasons[i] = tokens[place][0]
                if count == width:
                    out[i] = Found(scores[place], rows[place], tokens[place])
                else:
                    out[i] = Found(scores[place][:count], rows[place][:count], tokens[place][:count])
        for i, error in self.errors.items():
            out[i] = Found([], [], [], error)
        for members, records in self._records:
            for i, record in zip(members, records.tolist(), strict=True):
                if (own := out[i]) is not None and self.asks[i].finishing is not None:
                    own.record = record
        for reports in self._reports:
            for i, report in reports.lists():
                if (own := out[i]) is not None:
                    own.report = report
        found = [f for f in out if f is not None]
        assert len(found) == len(self.asks)
        return found

    def no_choice(self, ask: int) -> RequestError:
        """Say why nothing can follow an ask's beams; after :meth:`result`."""
        if ask in self._reasons or ask in self.foreseen:  # the logits may have gone
            return failed(self._reasons.get(ask, _EXCLUDED), self.logits.shape[1], self.asks[ask].sequences[0])
        first = self.asks[ask].first_row
        plain = self.logits[first : first + len(self.asks[ask].sequences)]
        raw, edited = self.edited.get(ask, (plain, plain))
        bad = (raw.isnan() | (raw == torch.inf) | edited.isnan()).any(1).nonzero()
        row = int(bad[0, 0]) if len(bad) else 0
        return no_choice(raw[row], edited[row], self.asks[ask].sequences[row])


def _reports(ask: BeamAsk) -> bool:
    """Whether its user wants to know more of the candidates than who they are."""
    params = ask.sequences[0].request.params
    return params.logprobs is not None or params.returns_generation_logits


@dataclass(slots=True)
class _Reports:
    """Reports of some asks on their way to the host.

    Attributes:
        members, asks: whose.
        width: candidates of each.
        measured: of all candidates and all rows; None where nobody asks for log probabilities.
        logits: by place, raw logits where they are asked for.
    """

    members: list[int]
    asks: list[BeamAsk]
    width: int
    measured: Measured | None
    logits: dict[int, Tensor]

    @classmethod
    def of(cls, logits: Tensor, members: list[int], asks: list[BeamAsk], found: Tensor) -> _Reports:
        """Begin to make them.

        Args:
            logits: of the step.
            members: numbers of the asks.
            asks: the asks.
            found: ``[2, A, K]``: tokens and rows of their candidates.
        """
        device = logits.device
        rows = [ask.first_row + row for ask in asks for row in range(len(ask.sequences))]
        x = logits[indices(rows, device)]
        starts = list(itertools.accumulate((len(ask.sequences) for ask in asks), initial=0))
        params = [ask.sequences[0].request.params for ask in asks]
        counts = [p.logprobs for p in params if p.logprobs is not None]
        measured = None
        if counts:
            tokens, own = found.long().clamp(min=0)  # -1 where a search has fewer
            tokens = tokens.clamp(max=x.shape[1] - 1)  # a reason where it failed
            own += indices(starts[:-1], device)[:, None]
            measured = measure(x, own.flatten(), tokens.flatten(), min(max(counts), x.shape[1])).to_host()
        kept = {
            place: to_host(x[starts[place] : starts[place + 1]].float())
            for place, p in enumerate(params)
            if p.returns_generation_logits
        }
        return cls(members, asks, found.shape[2], measured, kept)

    def lists(self) -> list[tuple[int, Report]]:
        """What has come, by ask."""
        told = None if self.measured is None else self.measured.lists()
        out, first_row = [], 0
        for place, (member, ask) in enumerate(zip(self.members, self.asks, strict=True)):
            out.append((member, Report(told, place * self.width, first_row, self.logits.get(place))))
            first_row += len(ask.sequences)
        return out
