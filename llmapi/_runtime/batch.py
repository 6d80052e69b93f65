"""StepBatch: a StepPlan as the flat, ragged lists that an engine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmapi._runtime.plan import Entry, StepPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Moves:
    """Searches whose beams go on from beams that only the device knows.

    Attributes:
        searches: of each, its first entry in the step, its beams, and its first place among ``parents``.
        parents: int32 on the engine's device: for each beam, which of its search it goes on from. One that has a
            continuation stays where it is.
    """

    searches: list[tuple[int, int, int]]
    parents: torch.Tensor


@dataclass(slots=True)
class StepBatch:
    """What one step computes; see :meth:`llmapi.models.transformer.Transformer.forward` for the shapes.

    Attributes:
        logits_indices: rows whose logits are wanted, grouped by entry, ascending.
        logits_rows: for each entry, how many of them are its own.
        copies: ``(source, target)`` blocks copied before anything else.
        moves: beams that go on from others. ``block_tables`` are those of the step before, each with a block for the
            new token; the engine makes the step's own of them.
    """

    input_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    block_tables: list[list[int]]
    seq_lens: list[int]
    query_start: list[int]
    logits_indices: list[int]
    logits_rows: list[int]
    copies: list[tuple[int, int]]
    moves: Moves | None = None


def build_batch(plan: StepPlan, block_size: int, prompt_rows_done: Callable[[Entry], int | None]) -> StepBatch:
    """Flatten a plan.

    Args:
        plan: what to run.
        block_size: tokens a block.
        prompt_rows_done: for an entry, how many leading prompt positions already gave their logits; None where the
            request does not want the prompt's logits.
    """
    batch = StepBatch([], [], [], [], [], [0], [], [], plan.copies)
    for entry in plan.entries:
        seq, stop = entry.seq, entry.start + entry.count
        first_row = len(batch.input_ids)
        if entry.count == 1 and seq.num_prompt <= entry.start == len(seq.token_ids) - 1:  # most entries
            start, table = entry.start, seq.block_table
            batch.input_ids.append(seq.token_ids[start])
            batch.positions.append(start)
            batch.slot_mapping.append(table[start // block_size] * block_size + start % block_size)
            batch.block_tables.append(table)
            batch.seq_lens.append(stop)
            batch.query_start.append(first_row + 1)
            batch.logits_indices.append(first_row)
            batch.logits_rows.append(1)
            continue
        batch.input_ids += seq.token_ids[entry.start : stop]
        batch.positions += range(entry.start, stop)
        table = seq.block_table
        batch.slot_mapping += [table[p // block_size] * block_size + p % block_size for p in range(entry.start, stop)]
        batch.block_tables.append(table)
        batch.seq_lens.append(stop)
        batch.query_start.append(len(batch.input_ids))
        wanted = wanted_positions(entry, prompt_rows_done(entry))
        batch.logits_indices += [first_row + p - entry.start for p in wanted]
        batch.logits_rows.append(len(wanted))
    return batch


def wanted_positions(entry: Entry, prompt_rows_done: int | None) -> range:
    """Positions of an entry whose logits are wanted: an ascending run that ends with the entry's last token.

    Args:
        entry: part of a plan.
        prompt_rows_done: see :func:`build_batch`.
    """
    stop = entry.start + entry.count
    last = stop - 1 if entry.produces_logits else stop
    if prompt_rows_done is None or prompt_rows_done >= entry.seq.num_prompt:
        return range(last, stop)
    first = max(entry.start, prompt_rows_done)
    return range(first, stop if entry.produces_logits else min(stop, entry.seq.num_prompt))
