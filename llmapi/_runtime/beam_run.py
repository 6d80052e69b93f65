"""BeamRun: one request's search as the loop sees it: what to ask of a step, and what follows from the answer."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from llmapi._runtime.beam import (
    NEVER,
    Beams,
    Finished,
    diversify,
    normalized,
    num_candidates,
    num_diverse,
    seats,
)
from llmapi._runtime.beam_ask import BeamAsk
from llmapi._runtime.beam_carried import Added, Carried, Heir
from llmapi._runtime.beam_found import Found, PendingCandidates
from llmapi._runtime.beam_output import BeamOutputs
from llmapi._runtime.request import Request, Sequence
from llmapi.outputs import CompletionOutput, FinishReason

if TYPE_CHECKING:
    from llmapi._tokenizer import Tokenizer

Child = tuple[int, int, float]
"""The row that it continues, its token, its score."""

_LOOK = 8  # new tokens between two counts of a request's blocks


class Mover(Protocol):
    """The part of the scheduler that a search needs."""

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """See :meth:`llmapi._runtime.scheduler.Scheduler.fork`."""

    def adopt(self, heir: Sequence, parent: Sequence) -> None:
        """See :meth:`llmapi._runtime.scheduler.Scheduler.adopt`."""

    def inherit(self, heir: Sequence, parent: Sequence) -> None:
        """See :meth:`llmapi._runtime.scheduler.Scheduler.inherit`."""

    def rewind(self, seq: Sequence) -> None:
        """See :meth:`llmapi._runtime.scheduler.Scheduler.rewind`."""

    def finish(self, seq: Sequence) -> None:
        """See :meth:`llmapi._runtime.scheduler.Scheduler.finish`."""


@dataclass(slots=True)
class _Move:
    """What happens to a group: which continuations go on, and what is added to what they carry."""

    group: int
    children: list[Child]
    added: Added = field(default_factory=Added)


class BeamRun:
    """A request's search.

    The beams are the request's sequences. A beam that goes on with one token stays the sequence that it is; each
    further continuation takes the place of a sequence whose beam does not go on (:func:`llmapi._runtime.beam.seats`),
    or is a new one.

    While the host waits for a step's candidates, the next step may have been launched, for which the device chose by
    the same rules, but for stop texts: :meth:`reserve` then puts a reference in the place of each beam's token, and
    :meth:`advance` follows. Where a stop text has ended a beam, that step is not committed. By then the device has
    given rows to other beams whose own the host may want to keep, so these compute again what their last block held.

    Args:
        request: with ``use_beam_search``; its one sequence is the prompt.
        tokenizer: for stop texts and the text of outputs; None where there is none.

    Attributes:
        blocks: the most KV blocks that its beams were seen to hold, shared ones counted once.
        over: whether every group's search has ended.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        p = request.params
        self._request, self._tokenizer = request, tokenizer
        self._size = p.num_beams // p.num_beam_groups
        self._ends = request.stop_token_ids
        self._count = num_candidates(self._size, len(self._ends))
        grouped = p.num_beam_groups > 1
        self._groups = [
            Beams(self._size, p.length_penalty, p.early_stopping, request.max_tokens, grouped)
            for _ in range(p.num_beam_groups)
        ]
        self._rows: list[list[Sequence]] = [[request.sequences[0]]] * p.num_beam_groups
        self._shared = grouped  # whether the groups still share the prompt's one sequence
        self._asked: list[int] = []  # groups of the step in flight
        self._carried = Carried(request, tokenizer)
        self._outputs = BeamOutputs(request, tokenizer)
        self._stopped: FinishReason | None = None
        self._reserved = False  # whether the sequences end in references
        self._bare = self._carried.nothing and not grouped
        # The device can tell who goes on, but for stop texts and ends of grammars, which few steps complete.
        self._ahead = not grouped
        self.blocks = 0
        self.over = False

    # ---- a step

    @property
    def steady(self) -> bool:
        """Whether it has all its beams, and the device can tell which of them go on."""
        return self._ahead and len(self._rows[0]) == self._size

    def asks(self, first_row: int, carried: int | None = None, *, ahead: bool = False) -> list[BeamAsk]:
        """What to ask of a step.

        Args:
            first_row: row of the step's logits that belongs to the request's first sequence; the others follow.
            carried: where the scores of the beams are on the device, if they are not known here yet; see
                :class:`BeamAsk`.
            ahead: whether the next step is to be launched before the candidates are known here.
        """
        if self._ahead:
            self._asked = [0]
            beams = self._groups[0]
            scores = beams.scores if carried is None else []
            ask = BeamAsk(self._rows[0], scores, first_row, self._count, self._size == 1, carried)
            if ahead:
                ask.ends = self._ends
                ask.finishing = None if self._carried.may_end else beams.finishing(int(self._reserved))
            return [ask]
        self._asked = [g for g, beams in enumerate(self._groups) if not beams.over]
        greedy = self._request.params.num_beams == 1
        asks: list[BeamAsk] = []
        taken = 0  # most beams of earlier groups
        for g in self._asked:
            rows = self._rows[g]
            count = num_diverse(self._count, len(rows), taken) if taken else self._count
            asks.append(BeamAsk(rows, self._groups[g].scores, first_row, count, greedy))
            taken += self._size
            if not self._shared:
                first_row += len(rows)
        return asks

    def reserve(self, first: int) -> None:
        """Append the references, unless the step in flight brings the last token.

        Args:
            first: what the first beam's refers to; the others follow.
        """
        beams = self._groups[0]
        if beams.length + 1 < beams.max_tokens:
            self._reserved = True
            for row, seq in enumerate(self._rows[0]):
                seq.token_ids.append(~(first + row))

    def advance(
        self, found: list[Found], pending: PendingCandidates, first_ask: int, scheduler: Mover, moved: bool = False
    ) -> bool:
        """Commit a step's candidates: end, reorder and extend the beams.

        Args:
            found: candidates of each ask of :meth:`asks`.
            pending: where they came from.
            first_ask: place of the first ask there.
            scheduler: moves the sequences' blocks.
            moved: whether the next step was launched, for which the device has moved the beams.

        Returns:
            False where the beams did not move as on the device, because fewer of them go on than there were, or because
            a stop text has ended one: that step is not to be committed for them.

        Raises:
            RequestError: the request cannot go on.
        """
        if self._reserved:
            self._reserved = False
            for seq in self._rows[0]:
                del seq.token_ids[-1]
        if self._bare and self._advance_bare(found[0], scheduler, moved):
            return True
        taken: Counter[int] = Counter()
        penalty = self._request.params.diversity_penalty
        moves: list[_Move] = []
        followed, lost = True, set[int]()
        for place, (g, own) in enumerate(zip(self._asked, found, strict=True)):
            if own.error is not None:
                raise own.error
            beams, seqs = self._groups[g], self._rows[g]
            scores, rows, tokens = own.scores, own.rows, own.tokens
            if scores[0] != scores[0] or (scores[0] == NEVER and not beams.finished):
                raise pending.no_choice(first_ask + place)
            if taken:
                scores, rows, tokens = diversify(scores, rows, tokens, taken, penalty, self._count)
            move = _Move(g, [])
            ending = self._carried.ending(seqs, move.added) if self._carried.may_end else None
            if own.record is not None:
                ranks, new = beams.follow(own.record, scores, rows, tokens, self._ends)
            else:
                ranks, new = beams.advance(scores, rows, tokens, self._ends, ending)
            if penalty:
                taken.update([tokens[rank] for rank in ranks])
            if moved:
                on_device = self._on_device(scores, tokens)
                followed = ranks == on_device
                if not followed:
                    lost = _displaced([rows[rank] for rank in on_device], len(seqs))
            if not beams.over:
                move.children = [(rows[rank], tokens[rank], scores[rank]) for rank in ranks]
            if self._carried.reported:
                chosen = [*((row, token) for row, token, _ in move.children), *((f.row, f.token) for f in new)]
                self._carried.report(chosen, own, move.added)
            for one in new:
                one.output = self._carried.line(seqs[one.row], one.row, one.token, move.added)
            moves.append(move)
        self.over = all(beams.over for beams in self._groups)
        if not beams.length % _LOOK or self.over:
            self._count_blocks()
        if not self.over:
            self._reorder(moves, scheduler, moved and followed, lost)
        return followed or self.over

    def _on_device(self, scores: list[float], tokens: list[int]) -> list[int]:
        """Ranks of the candidates with which the device has gone on; none where they are too few: nobody has moved."""
        able = (rank for rank, token in enumerate(tokens) if token not in self._ends and scores[rank] > NEVER)
        ranks = list(itertools.islice(able, self._size))
        return ranks if len(ranks) == self._size else []

    def _advance_bare(self, found: Found, scheduler: Mover, moved: bool) -> bool:
        """The common case of :meth:`advance`: all beams go on, and they carry nothing but their tokens.

        Returns:
            False where it is another case; nothing was changed then.
        """
        beams, seqs, width = self._groups[0], self._rows[0], self._size
        scores, tokens = found.scores, found.tokens
        if len(seqs) != width or len(scores) < width or not scores[width - 1] > NEVER or scores[0] != scores[0]:
            return False
        ended = bool(beams.finished) if found.record is None else found.record[0]
        if ended or beams.length + 1 >= beams.max_tokens or not self._ends.isdisjoint(tokens[:width]):
            return False
        beams.length += 1
        if not beams.length % _LOOK:
            self._count_blocks()
        move = scheduler.inherit if moved else scheduler.adopt
        by_row, _ = seats(found.rows[:width], width)
        for row, rank in enumerate(by_row):
            assert rank is not None
            if found.rows[rank] != row:
                heir, parent = seqs[row], seqs[found.rows[rank]]
                heir.token_ids = parent.token_ids.copy()
                move(heir, parent)
        going = []
        for seq, rank in zip(seqs, by_row, strict=True):
            assert rank is not None
            seq.token_ids.append(tokens[rank])
            going.append(scores[rank])
        beams.scores = going
        return True

    def _count_blocks(self) -> None:
        held = set().union(*(seq.block_table for seq in self._request.sequences))
        self.blocks = max(self.blocks, len(held))

    def _reorder(self, moves: list[_Move], scheduler: Mover, moved: bool, lost: set[int]) -> None:
        """Turn the beams into their continuations: first who stands where, then the tokens.

        Args:
            moves: of each group.
            scheduler: moves their blocks.
            moved: whether the device has done so.
            lost: rows of beams whose last block the device has given to others, when it should not have.
        """
        take = scheduler.inherit if moved else scheduler.adopt
        extended: list[tuple[Sequence, int]] = []
        heirs: list[Heir] = []
        resized, shared, prompt = False, self._shared, self._rows[moves[0].group]
        for move in moves:
            parents = self._rows[move.group]
            own = parents.copy() if not shared or (prompt and move.children) else []
            if shared and own:
                prompt = []  # the prompt's sequence goes on in this group
            by_row, late = seats([child[0] for child in move.children], len(own))
            taken = [None if rank is None else move.children[rank] for rank in by_row]
            for row, child in enumerate(taken):
                if child is not None and child[0] != row:
                    heir, parent = own[row], parents[child[0]]
                    heir.token_ids = parent.token_ids.copy()
                    take(heir, parent)
            free = [row for row, child in enumerate(taken) if child is None]
            for rank in late:
                child = move.children[rank]
                own.append(self._fork(parents[child[0]], move.group, own, scheduler))
                taken.append(child)
                resized = True
            if not self._bare:
                for seq, child in zip(own, taken, strict=True):
                    if child is not None:
                        heirs.append(self._carried.heir(seq, parents[child[0]], child[0], child[1], move.added))
            for row in free:
                scheduler.finish(own[row])
                resized = True
            if free or len(own) > len(parents) or shared:
                pairs = sorted(((s, c) for s, c in zip(own, taken, strict=True) if c), key=lambda pair: pair[0].index)
                own, taken = [s for s, _ in pairs], [c for _, c in pairs]
            self._rows[move.group] = own
            going = [child for child in taken if child is not None]
            self._groups[move.group].go_on([child[2] for child in going])
            extended += [(seq, child[1]) for seq, child in zip(own, going, strict=True)]
            for seq, child in zip(own, going, strict=True) if lost else ():
                if child[0] in lost:
                    scheduler.rewind(seq)
        for seq, token in extended:
            seq.token_ids.append(token)
        self._carried.settle(heirs)
        self._shared = False
        if resized:
            self._request.sequences = [seq for g in self._asked for seq in self._rows[g]]

    def _fork(self, parent: Sequence, group: int, own: list[Sequence], scheduler: Mover) -> Sequence:
        used = {seq.index for seq in own}
        index = next(i for i in range(group * self._size, (group + 1) * self._size) if i not in used)
        child = Sequence(self._request, index, parent.token_ids.copy(), parent.num_prompt)
        scheduler.fork(parent, child)
        return child

    # ---- what the user sees

    def outputs(self) -> list[CompletionOutput]:
        """The best ``n`` sequences once the search has ended; before that, the beam that leads."""
        if self._stopped is not None or self.over:
            finished = [f for beams in self._groups for f in beams.finished]
            return self._outputs.final(finished, self._stopped)
        score, seq = max(self._running(), key=lambda pair: pair[0])
        ids = seq.output_ids
        worth = normalized(score, len(ids), self._request.params.length_penalty) if ids else None
        return [self._outputs.leading(self._carried.running(seq), worth)]

    def stop(self, reason: FinishReason) -> None:
        """End the search before its time: its beams count as finished."""
        if self._stopped is None and not self.over:
            for beams, seqs in zip(self._groups, self._rows, strict=True):
                for score, seq in zip(beams.scores, seqs, strict=False):
                    ids = seq.output_ids
                    worth = normalized(score, max(1, len(ids)), self._request.params.length_penalty)
                    beams.finished.append(Finished(worth, score, 0, 0, reason, None, self._carried.running(seq)))
        self._stopped = reason

    def _running(self) -> list[tuple[float, Sequence]]:
        return [
            pair
            for beams, seqs in zip(self._groups, self._rows, strict=True)
            if not beams.over
            for pair in zip(beams.scores, seqs, strict=False)
        ]


def _displaced(parents: list[int], rows: int) -> set[int]:
    """Rows that another beam has got.

    Args:
        parents: by rank, the row of the beam that goes on; as many as there are rows, or none.
        rows: how many there are.
    """
    by_row, _ = seats(parents, rows)
    return {row for row, rank in enumerate(by_row) if rank is not None and parents[rank] != row}
