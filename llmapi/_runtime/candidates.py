"""Candidates: the best continuations of each search of a step, all searches at once, on the logits' device.

The scores are those of transformers' beam search: a log-softmax in float32, changed by the request's edits without
normalizing again, plus the score of the beam. Only the short lists of candidates come to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmapi._runtime.beam import num_candidates
from llmapi._runtime.draw import largest
from llmapi._runtime.logit_edits import Foreseen, LogitEdits
from llmapi._runtime.no_choice import failed, no_choice
from llmapi._runtime.request import Request, Sequence
from llmapi.errors import RequestError

_EXCLUDED = 0  # beside a kernel's reasons: edits left no token


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
    """

    sequences: list[Sequence]
    scores: list[float]
    first_row: int
    count: int
    greedy: bool = False
    carried: int | None = None
    ends: frozenset[int] | None = None


@dataclass(slots=True)
class Found:
    """Candidates of one group, best first: cumulative scores, the beam's row within the group, the token.

    Attributes:
        error: why the request cannot go on; the lists are empty then.
    """

    scores: list[float]
    rows: list[int]
    tokens: list[int]
    error: RequestError | None = None


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
        slots: first place of each such ask, by ask.
    """

    parents: Tensor
    tokens: Tensor
    scores: Tensor
    slots: dict[int, int]


class Chooser(Protocol):
    """Chooses who goes on, on the device.

    Attributes:
        max_rows: the most rows of logits that it finds candidates of.
    """

    max_rows: int

    def fits(self, rows: int, count: int) -> bool:
        """Whether it serves searches of so many beams and candidates."""

    def choose(self, found: Tensor, asks: list[tuple[int, BeamAsk]]) -> Tensor:
        """Queue it.

        Args:
            found: the result of :data:`Select`.
            asks: searches, each after its place there.

        Returns:
            ``[3, R]`` int32: parents, tokens, and scores as the bits of float32, search after search.
        """


Select = Callable[[Tensor, Spans, bool], Tensor]
"""Finds candidates: ``(logits [N, V], spans, normalized) -> [3, R, K]`` int32 on the device of the logits.

``K`` is the largest count. Plane 0 holds scores as the bits of float32, plane 1 tokens, plane 2 rows within the search;
each search's candidates stand best first, equal scores by row and then by token, and what is beyond its count, or its
rows times V, has the score -inf. ``normalized`` says that the logits are log probabilities already (float32). A row's
NaN makes its search's first score NaN; a kernel then says row -1, and why in the token (:func:`no_choice.failed`).
"""


def select(logits: Tensor, spans: Spans, normalized: bool) -> Tensor:
    """:data:`Select` in torch operators: searches of the same shape at once."""
    x = logits if normalized else logits.float().log_softmax(1)
    device, vocab = x.device, x.shape[1]
    x = x + spans.cumulative.to(device, non_blocking=True)[:, None]
    width = max(spans.counts)
    out = torch.zeros(3, len(spans.first), width, dtype=torch.int32, device=device)
    out[0] = torch.full((), -torch.inf).view(torch.int32)
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(zip(spans.rows, spans.counts, strict=True)):
        shapes.setdefault(shape, []).append(i)
    for (rows, count), members in shapes.items():
        starts = torch.tensor([spans.first[i] for i in members], device=device)
        own = x[starts[:, None] + torch.arange(rows, device=device)]  # [members, rows, V]
        keys = _keys(own.flatten(1))
        count = min(count, rows * vocab)
        _, at = largest(keys, count)
        scores = own.flatten(1).gather(1, at)
        found = torch.stack([scores.view(torch.int32), (at % vocab).int(), (at // vocab).int()])
        out[:, torch.tensor(members, device=device), :count] = found
    return out


def _keys(x: Tensor) -> Tensor:
    """Int64 keys that sort as the values do, NaN as largest, equal ones by place: ``[R, M]`` float32 to ``[R, M]``."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ordered = torch.where(x.isnan(), 0x7FFFFFFF, ordered)
    return (ordered << 32) - torch.arange(x.shape[1], device=x.device)


class Candidates:
    """Finds the candidates of a step.

    Args:
        vocab_size: width of the logits.
        edits: of the requests.
        select: how they are found.
        chooser: chooses who goes on; None where the device cannot.
    """

    def __init__(
        self, vocab_size: int, edits: LogitEdits, select: Select = select, chooser: Chooser | None = None
    ) -> None:
        self._vocab = vocab_size
        self._edits = edits
        self._select = select
        self._chooser = chooser

    def chooses(self, request: Request) -> bool:
        """Whether the device can choose who goes on in a search of one group."""
        width = request.params.num_beams
        if self._chooser is None or not self._chooser.fits(width, num_candidates(width, len(request.stop_token_ids))):
            return False
        if width == 1 and self._edits.wanted(request.sequences[0]):
            return False  # as in greedy decoding: logits are edited, not log probabilities
        return self._edits.foreseeable(request.params)

    @torch.no_grad()
    def start(self, logits: Tensor, asks: list[BeamAsk], before: Chosen | None = None) -> PendingCandidates:
        """Begin to find candidates.

        Args:
            logits: ``[N, V]`` of the step, of any float dtype; kept until :meth:`PendingCandidates.result`.
            asks: what is wanted.
            before: what the step before chose; needed where an ask's scores are carried.
        """
        pending = PendingCandidates(logits, asks)
        plain: list[int] = []
        edited: list[int] = []
        there: list[int] = []
        for i, ask in enumerate(asks):
            if ask.carried is not None or ask.ends is not None:
                there.append(i)
            elif not any(map(self._edits.wanted, ask.sequences)):
                plain.append(i)
            else:
                (there if self._edits_there(ask) else edited).append(i)
        if there:
            self._start_there(pending, there, before)
        if plain:
            x, own = _own_rows(logits, [asks[i] for i in plain])
            pending.add(plain, self._select(x, _spans(own, len(x)), False))
        greedy = [i for i in edited if asks[i].greedy]
        scored = [i for i in edited if not asks[i].greedy]
        for members, on_logits in ((greedy, True), (scored, False)):
            if members:
                self._start_edited(pending, members, on_logits)
        pending.seal()
        return pending

    def _edits_there(self, ask: BeamAsk) -> bool:
        """Whether an ask's edits are made where its candidates are found.

        Penalties are not, where the host knows the beams: their tokens would have to be counted anew for each search.
        """
        params = ask.sequences[0].request.params
        if self._chooser is None or ask.greedy or params.num_beam_groups > 1:
            return False
        if not self._chooser.fits(len(ask.sequences), ask.count) or not self._edits.foreseeable(params):
            return False
        edit = self._edits.foreseen(ask.sequences[0])
        return edit is not None and edit.penalties is None

    def _start_there(self, pending: PendingCandidates, members: list[int], before: Chosen | None) -> None:
        """Find candidates of searches that the device edits, or that the host has not caught up with, or need not."""
        assert self._chooser is not None
        x, own = _own_rows(pending.logits, [pending.asks[i] for i in members], self._chooser.max_rows)
        spans = _spans(own, len(x))
        spans.carried, spans.before = [ask.carried for ask in own], before
        edits = [self._edits.foreseen(ask.sequences[0]) for ask in own]
        if any(edits):
            spans.edits, spans.beams = edits, [ask.sequences for ask in own]
            pending.foreseen = {i for i, edit in zip(members, edits, strict=True) if edit is not None}
        found = self._select(x, spans, False)
        wanted = [(place, ask) for place, ask in enumerate(own) if ask.ends is not None]
        if wanted:
            slots, at = {}, 0
            for place, ask in wanted:
                slots[members[place]] = at
                at += len(ask.sequences)
            parents, tokens, scores = self._chooser.choose(found, wanted)
            pending.chosen = Chosen(parents, tokens, scores.view(torch.float32), slots)
        pending.add(members, found)

    def _start_edited(self, pending: PendingCandidates, members: list[int], on_logits: bool) -> None:
        asks = [pending.asks[i] for i in members]
        rows = [ask.first_row + row for ask in asks for row in range(len(ask.sequences))]
        x = pending.logits[torch.tensor(rows, device=pending.logits.device)].float().contiguous()
        if not on_logits:
            x = x.log_softmax(1)
        sequences = [seq for ask in asks for seq in ask.sequences]
        errors = self._edits.apply(x, sequences)
        certain = [i for i, seq in enumerate(sequences) if seq.request.params.logits_processors]
        if certain:  # +inf stands for certainty
            own = x[certain]
            sure = (own == torch.inf).any(1, keepdim=True)
            x[certain] = torch.where(sure, torch.where(own == torch.inf, 0.0, -torch.inf), own)
        packed, at = [], 0
        for i, ask in zip(members, asks, strict=True):
            packed.append(BeamAsk(ask.sequences, ask.scores, at, ask.count))
            pending.edited[i] = x[at : at + len(ask.sequences)]
            failed = next((e for e in errors[at : at + len(ask.sequences)] if e is not None), None)
            if failed is not None:
                pending.errors[i] = failed
            at += len(ask.sequences)
        pending.add(members, self._select(x, _spans(packed, len(x)), not on_logits))


def _own_rows(logits: Tensor, asks: list[BeamAsk], most: int | None = None) -> tuple[Tensor, list[BeamAsk]]:
    """The logits without rows that nobody asks for, where those are most, as in a step that computes prompts; or where
    there are more than ``most``."""
    rows = sorted({ask.first_row + row for ask in asks for row in range(len(ask.sequences))})
    if 2 * len(rows) >= len(logits) and (most is None or len(logits) <= most or len(rows) == len(logits)):
        return logits, asks
    place = {row: i for i, row in enumerate(rows)}
    moved = [replace(ask, first_row=place[ask.first_row]) for ask in asks]
    return logits[torch.tensor(rows, device=logits.device)], moved


def _spans(asks: list[BeamAsk], total: int) -> Spans:
    cumulative = np.zeros(total, dtype=np.float32)
    for ask in asks:
        cumulative[ask.first_row : ask.first_row + len(ask.scores)] = ask.scores
    first = [ask.first_row for ask in asks]
    rows = [len(ask.sequences) for ask in asks]
    return Spans(first, rows, [ask.count for ask in asks], torch.from_numpy(cumulative))


@dataclass(slots=True)
class PendingCandidates:
    """A step's candidates on their way to the host.

    Attributes:
        logits: of the step.
        asks: what was asked for.
        errors: by ask, why it failed.
        edited: edited logits of an ask's rows, by ask.
        foreseen: asks that are edited where their candidates are found.
        chosen: who goes on, where the device chose for some of the asks.
    """

    logits: Tensor
    asks: list[BeamAsk]
    errors: dict[int, RequestError] = field(default_factory=dict)
    edited: dict[int, Tensor] = field(default_factory=dict)
    chosen: Chosen | None = None
    foreseen: set[int] = field(default_factory=set)
    _reasons: dict[int, int] = field(default_factory=dict)
    _parts: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _arrived: torch.cuda.Event | None = None

    def add(self, members: list[int], found: Tensor) -> None:
        """Begin to copy the result of :data:`Select` for some of the asks."""
        if found.is_cuda:
            found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        self._parts.append((members, found))

    def seal(self) -> None:
        """Mark the last copy."""
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
        found = [f for f in out if f is not None]
        assert len(found) == len(self.asks)
        return found

    def rows_of(self, ask: int) -> Tensor:
        """The raw logits of an ask's beams, ``[rows, V]``; valid until the next step."""
        first = self.asks[ask].first_row
        return self.logits[first : first + len(self.asks[ask].sequences)]

    def no_choice(self, ask: int) -> RequestError:
        """Say why nothing can follow an ask's beams; after :meth:`result`."""
        if ask in self._reasons or ask in self.foreseen:  # the logits may have gone
            return failed(self._reasons.get(ask, _EXCLUDED), self.logits.shape[1], self.asks[ask].sequences[0])
        raw = self.rows_of(ask)
        edited = self.edited.get(ask, raw)
        bad = (raw.isnan() | (raw == torch.inf) | edited.isnan()).any(1).nonzero()
        row = int(bad[0, 0]) if len(bad) else 0
        return no_choice(raw[row], edited[row], self.asks[ask].sequences[row])
