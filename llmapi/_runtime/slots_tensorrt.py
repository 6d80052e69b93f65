"""Slots: a ragged step as runs of a TensorRT network, each over neighbouring rows of the linear cache.

A sequence's one block is its row. Rows that decode run together, one new token each, over the window of rows from the
first of them to the last, widened to a bucket; a prompt, or a chunk of one, runs alone over its own row. So no run
computes another row's prompt, and none needs a copy: the cache's address is that of the window's first row.

A row of the window that has nothing to do writes to its last place, and looks at its first. The last place is free:
the last token that fits is chosen but never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmapi._build.tensorrt.shapes import DECODE, PREFILL, decode_bucket, prefill_bucket
from llmapi._runtime.batch import StepBatch


@dataclass(frozen=True)
class Run:
    """One execution of the network.

    Attributes:
        profile: which of the plan's profiles.
        first_row: of the cache.
        input_ids, positions: ``[rows][tokens]``.
        write_index, kv_lengths: ``[rows]``.
        logits_indices: rows of the run, counted through all tokens, whose logits are wanted.
        places: where these logits go among the step's.
    """

    profile: int
    first_row: int
    input_ids: list[list[int]]
    positions: list[list[int]]
    write_index: list[int]
    kv_lengths: list[int]
    logits_indices: list[int]
    places: list[int]


def runs_of(batch: StepBatch, *, slots: int, capacity: int, max_batch: int, max_tokens: int) -> Iterator[Run]:
    """The runs of a step.

    Args:
        batch: the step; each block table holds one block, the row.
        slots: rows of the cache.
        capacity: tokens of a row.
        max_batch: most rows of a run.
        max_tokens: most tokens of a run of one row.
    """
    decodes: list[_Part] = []
    for part in _parts(batch):
        if part.count == 1:
            decodes.append(part)
        else:
            yield _prefill(batch, part, capacity, max_tokens)
    decodes.sort(key=lambda part: part.row)
    while decodes:
        first = decodes[0].row
        inside = [part for part in decodes if part.row < first + max_batch]
        yield _decode(batch, inside, slots, capacity, max_batch)
        decodes = decodes[len(inside) :]


@dataclass(frozen=True)
class _Part:
    """Rows ``begin`` to ``begin + count`` of the step: new tokens of the sequence in cache row ``row``."""

    row: int
    begin: int
    count: int
    wanted: list[int]  # rows of the step whose logits are wanted
    places: list[int]


def _parts(batch: StepBatch) -> Iterator[_Part]:
    place = 0
    for i, table in enumerate(batch.block_tables):
        begin, end = batch.query_start[i], batch.query_start[i + 1]
        places = list(range(place, place + batch.logits_rows[i]))
        place += batch.logits_rows[i]
        yield _Part(table[0], begin, end - begin, [batch.logits_indices[p] for p in places], places)


def _prefill(batch: StepBatch, part: _Part, capacity: int, max_tokens: int) -> Run:
    start = batch.positions[part.begin]
    length = prefill_bucket(part.count, capacity - start, max_tokens)
    ids = batch.input_ids[part.begin : part.begin + part.count] + [0] * (length - part.count)
    wanted = [row - part.begin for row in part.wanted]
    positions = list(range(start, start + length))
    return Run(PREFILL, part.row, [ids], [positions], [start], [start + length], wanted, part.places)


def _decode(batch: StepBatch, parts: list[_Part], slots: int, capacity: int, max_batch: int) -> Run:
    span = parts[-1].row - parts[0].row + 1
    width = min(decode_bucket(span, max_batch), slots)
    first = min(parts[0].row, slots - width)
    idle = capacity - 1
    ids, starts, lengths = [[0] for _ in range(width)], [idle] * width, [1] * width
    wanted: list[int] = []
    places: list[int] = []
    for part in parts:
        row = part.row - first
        start = batch.positions[part.begin]
        ids[row], starts[row], lengths[row] = [batch.input_ids[part.begin]], start, start + 1
        if part.wanted:
            wanted.append(row)
            places += part.places
    return Run(DECODE, first, ids, [[s] for s in starts], starts, lengths, wanted, places)
