"""A GPU that is played on the CPU: tokens, candidates and moved beams stay out of the host's sight until it asks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from llmapi import LLM
from llmapi._kernels.beam import move_tables
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.beam import seats
from llmapi._runtime.beam_ask import BeamAsk, Chosen, Spans
from llmapi._runtime.candidates import Candidates, select
from llmapi._runtime.logit_edits import Foreseen
from llmapi._runtime.plan import StepPlan
from llmapi._runtime.request import Request, Sequence, Status
from llmapi._runtime.sampler import Sampler
from tests._runtime.test_overlap import OverlappingEngine, OverlappingSampler


class PlayedChooser:
    """:class:`~llmapi._runtime.candidates_cuda.KernelSelect` in plain code.

    Attributes:
        edited: how many searches had edits made here, by whether their tokens were known to the host.
        booked: likewise, how many had their books kept here.
    """

    max_rows = 64
    edited: ClassVar[Counter[bool]] = Counter()
    booked: ClassVar[Counter[bool]] = Counter()

    def __init__(self) -> None:
        self._histories: dict[Request, list[list[int]]] = {}

    def fits(self, rows: int, count: int) -> bool:
        return True

    def select(self, logits: torch.Tensor, spans: Spans, normalized: bool) -> torch.Tensor:
        for first, rows, place in zip(spans.first, spans.rows, spans.carried, strict=False):
            if place is not None:
                assert spans.before is not None
                spans.cumulative[first : first + rows] = spans.before.scores[place : place + rows]
        if not any(spans.edits):
            return select(logits, spans, normalized)
        assert not normalized
        x = logits.float().log_softmax(1)
        for i, edit in enumerate(spans.edits):
            if edit is not None:
                histories = self._go_on(spans.beams[i], spans.carried[i], spans.before)
                for row, history in enumerate(histories, spans.first[i]):
                    edit_row(x[row], edit, history, spans.beams[i][0].num_prompt)
        return select(x, spans, True)

    def _go_on(self, beams: list[Sequence], place: int | None, before: Chosen | None) -> list[list[int]]:
        """The tokens of each beam, from what was known when it was last asked for, and what was chosen then."""
        request = beams[0].request
        PlayedChooser.edited[place is None] += 1
        if place is None:
            self._histories[request] = [list(beam.token_ids) for beam in beams]
            assert all(token >= 0 for history in self._histories[request] for token in history)
        else:
            assert before is not None
            old, slots = self._histories[request], range(place, place + len(beams))
            going = [(int(before.parents[slot]), int(before.tokens[slot])) for slot in slots]
            self._histories[request] = [[*old[parent], token] for parent, token in going]
        return self._histories[request]

    def choose(
        self, found: torch.Tensor, asks: list[tuple[int, BeamAsk]], before: Chosen | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen: list[tuple[int, int, float]] = []
        worths, records = [], torch.zeros(len(asks), 2 + max(len(ask.sequences) for _, ask in asks), dtype=torch.int32)
        for number, (place, ask) in enumerate(asks):
            scores, (tokens, beams) = found[0, place].view(torch.float32).tolist(), found[1:, place].tolist()
            rows = len(ask.sequences)
            own, record = self._books(scores[: ask.count], tokens, ask, before)
            worths += own
            records[number, : len(record)] = torch.tensor(record, dtype=torch.int32)
            good = _going(scores[: ask.count], tokens, ask)
            if len(good) < rows or scores[0] != scores[0]:
                chosen += [(row, 0, 0.0) for row in range(rows)]
                continue
            by_row, _ = seats([beams[i] for i in good[:rows]], rows)
            chosen += [(beams[i], tokens[i], scores[i]) for i in (good[rank] for rank in by_row if rank is not None)]
        parents, told, values = zip(*chosen, strict=True)
        ints = torch.tensor([parents, told, [0] * len(parents)], dtype=torch.int32)
        ints[2] = torch.tensor(values).view(torch.int32)
        return ints, torch.tensor(worths, dtype=torch.float64), records

    def _books(
        self, scores: list[float], tokens: list[int], ask: BeamAsk, before: Chosen | None
    ) -> tuple[list[float], list[int]]:
        """Who has ended, and the record of it."""
        how, rows = ask.finishing, len(ask.sequences)
        if how is None:
            return [0.0] * rows, []
        PlayedChooser.booked[ask.carried is None] += 1
        known = how.worths
        if ask.carried is not None:
            assert before is not None
            known = before.worths[ask.carried : ask.carried + rows].tolist()
        going = _going(scores, tokens, ask)
        new = [i for i in range(min(rows, len(scores))) if scores[i] > -torch.inf and (how.last or i not in going)]
        entries = [(worth, place) for place, worth in enumerate(known) if worth > -torch.inf]
        entries += [(scores[i] / how.norm, ~i) for i in new]
        best = sorted(entries, key=lambda entry: -entry[0])[:rows]
        over = how.last or not going
        if len(best) == rows and not over:
            over = how.always or scores[going[0]] / how.settle <= best[-1][0]
        joined = any(source < 0 for _, source in best)
        padded = [worth for worth, _ in best] + [-math.inf] * (rows - len(best))
        return padded, [joined + 2 * over, len(best), *(source for _, source in best)]


def _going(scores: list[float], tokens: list[int], ask: BeamAsk) -> list[int]:
    """Candidates that may go on."""
    assert ask.ends is not None
    return [i for i, score in enumerate(scores) if score > -torch.inf and tokens[i] not in ask.ends]


def edit_row(x: torch.Tensor, edit: Foreseen, history: list[int], num_prompt: int) -> None:
    """Change a row of log probabilities, token by token."""
    if edit.bias is not None:
        for token, value in zip(*(part.tolist() for part in edit.bias), strict=True):
            x[token] += value
    for token in edit.banned:
        x[token] = -torch.inf
    if edit.penalties is not None:
        repetition, presence, frequency = edit.penalties
        for token in {token for token in history if token < len(x)}:
            x[token] = x[token] * repetition if x[token] < 0 else x[token] / repetition
        for token, count in Counter(history[num_prompt:]).items():
            x[token] -= presence + frequency * count


class PlayedSampler(OverlappingSampler):
    """Chooses who goes on in a search, too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        chooser = PlayedChooser()
        self.candidates = Candidates(self._vocab, self._edits, chooser.select, chooser)


class PlayedEngine(OverlappingEngine):
    """Moves beams as the GPU does.

    Attributes:
        tables: block tables of the last step, by entry.
        moves: how many searches were moved.
        mask: changes logits, given the batch.
    """

    moves_beams = True
    tables: list[list[int]]
    moves = 0
    mask: Callable[[StepBatch, torch.Tensor], None] | None = None

    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        if batch.copies:
            self._copy_blocks(batch.copies)
            batch.copies = []
        batch.block_tables = [list(table) for table in batch.block_tables]
        for row, rows, slot in batch.moves.searches if batch.moves is not None else ():
            assert batch.moves is not None
            PlayedEngine.moves += 1
            length = batch.seq_lens[row] - 1
            table = torch.tensor(batch.block_tables[row : row + rows], dtype=torch.int32)
            parents = batch.moves.parents[slot : slot + rows].tolist()
            for source, target in move_tables(table, parents, length, self.config.block_size):
                for cache in self._caches.values():
                    cache[target, : length % self.config.block_size] = cache[source, : length % self.config.block_size]
            batch.block_tables[row : row + rows] = table.tolist()
        self.tables = batch.block_tables
        logits = super().step(batch, sampled)
        if PlayedEngine.mask is not None:
            logits = logits.clone()
            PlayedEngine.mask(batch, logits)
        return logits

    def sampler(self, tokenizer: Any) -> Sampler:
        return PlayedSampler(self.spec.vocab_size, tokenizer)


def watch_tables(llm: LLM, table_of: Callable[[int], list[int]]) -> Callable[[], int]:
    """Compare the device's block tables with the host's whenever a step has been launched and the one before landed.

    Args:
        llm: whose.
        table_of: the device's table of an entry of the step launched last.

    Returns:
        Tells how many tables of searches that fly were compared.
    """
    loop, scheduler = llm._loop, llm._loop._scheduler
    launch, commit = loop._launch, scheduler.commit
    entries: list[Any] = []
    compared = 0

    def watched_launch(plan: StepPlan) -> Any:
        entries[:] = plan.entries
        return launch(plan)

    def watched_commit(plan: StepPlan) -> None:
        nonlocal compared
        going = set(map(id, plan.entries))
        for row, entry in enumerate(entries):
            seq = entry.seq
            if id(entry) in going and seq.status is Status.RUNNING:
                assert table_of(row)[: len(seq.block_table)] == seq.block_table, f"row {row}, {entry}"
                compared += seq.request.lockstep
        commit(plan)

    loop._launch, scheduler.commit = watched_launch, watched_commit  # type: ignore[method-assign]
    return lambda: compared


def watch_dropped(llm: LLM) -> list[Any]:
    """Grows by each search whose step was launched ahead and not committed."""
    dropped: list[Any] = []
    land = llm._loop._landing._land_beams

    def watched(flight: Any, found: Any, following: Any) -> None:
        land(flight, found, following)
        dropped.extend(following.dropped if following is not None else ())

    llm._loop._landing._land_beams = watched  # type: ignore[method-assign]
    return dropped
