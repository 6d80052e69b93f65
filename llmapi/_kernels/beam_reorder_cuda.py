"""Launches of ``csrc/beam_reorder.cu``: the searches of a step go on in the next one without the host."""

from __future__ import annotations

import numpy as np
import torch

from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit

BEAM_CHOICE = np.dtype(
    [
        ("list", "<i4"),
        ("rows", "<i4"),
        ("k", "<i4"),
        ("slot", "<i4"),
        ("ends", "<i4"),
        ("ends_stop", "<i4"),
        ("unused", "<i4", 2),
    ]
)
"""A search whose continuations are chosen, as ``struct Choice``: the row of its candidates, its beams, how many
candidates it has, its first place among the results, and where in the list of ends those of its tokens stand that end
it."""

BEAM_FINISH = np.dtype(
    [("norm", "<f8"), ("settle", "<f8"), ("last", "<i4"), ("always", "<i4"), ("carried", "<i4"), ("unused", "<i4")]
)
"""How a search ends, as ``struct Finish``: what scores of those that end now are divided by, 0 where nothing is to be
done; what the best score that goes on is divided by to be compared with them; whether no more tokens may follow;
whether the search is over as soon as as many have ended as it has beams; and the first place, plus one, of what had
ended before among the results of the step before, 0 where it is given."""

BEAM_MOVE = np.dtype([("row", "<i4"), ("rows", "<i4"), ("slot", "<i4"), ("unused", "<i4")])
"""A search that has moved, as ``struct Move``: its first row in the tables, its beams, its first place among what
:func:`choose_beams` found."""

BEAM_TALLY = np.dtype([("counts", "<u8"), ("rows", "<i4"), ("slot", "<i4")])
"""A search whose counts move, as ``struct Tally``: the address of int32 ``[rows, V]``, its beams, its first place among
what :func:`choose_beams` found."""

_UNIT = Unit.of("beam_reorder.cu")
_THREADS = 256
_TILE = 4096  # numbers that a block has
_ROWS_AT_ONCE = 32  # blocks of threads that share the rows of a search


def units(dtype: str) -> list[Unit]:
    """The one specialization there is, whatever the element type."""
    return [_UNIT]


def choose_beams(
    gpu: Gpu, planes: torch.Tensor, choices: torch.Tensor, ends: torch.Tensor, chosen: torch.Tensor
) -> None:
    """Choose the continuations of searches from their candidates, and the row of each. One launch.

    Of a search's candidates the first as many as it has rows go on, those left out that end it or have a score of -inf.
    They are seated as :func:`llmapi._runtime.beam.seats` says. Where there are too few, and where a search has failed,
    every row stays, with token 0 and score 0.

    Args:
        gpu: where.
        planes: ``[3, Q, K]`` int32, contiguous: scores as the bits of float32, tokens, and rows within the search; best
            first.
        choices: on the device, :data:`BEAM_CHOICE` as bytes, aligned to 16; at most
            :data:`~llmapi._kernels.beam_cuda.MAX_BEAMS` rows each.
        ends: int32: lists of tokens.
        chosen: ``[3, R]`` int32, contiguous, written by slot: the row within the search that each row goes on from; its
            token; its score as the bits of float32.
    """
    count = len(choices) // BEAM_CHOICE.itemsize
    kernel = gpu.kernel(_UNIT, "beam_choose", "pppippppp", overlap=True)
    kernel((count, 1, 1), _THREADS, *planes.unbind(), planes.shape[2], choices, ends, *chosen.unbind())


def finish_beams(
    gpu: Gpu,
    planes: torch.Tensor,
    choices: torch.Tensor,
    ends: torch.Tensor,
    finishes: torch.Tensor,
    *,
    before: torch.Tensor | None,
    given: torch.Tensor | None,
    worths: torch.Tensor,
    records: torch.Tensor,
) -> None:
    """Keep the books of searches: who has ended, and whether they are over. One launch.

    The rules are those of :class:`llmapi._runtime.beam.Beams`, for one group without texts that end it.

    Args:
        gpu: where.
        planes, choices, ends: as of :func:`choose_beams`.
        finishes: on the device, :data:`BEAM_FINISH` as bytes, aligned to 16, one for each choice.
        before: float64: ``worths`` of the step before; needed where anything is carried.
        given: float64 ``[R]``: by slot, the same as the host knows it; needed where anything is not carried.
        worths: ``[R]`` float64, contiguous, written by slot: what has ended, best first, each its score over its
            length to the power of the length penalty; then -inf.
        records: int32 ``[A, 2 + W]``, contiguous, ``W`` at least the most rows of a search: for each search 1 where one
            that has ended now is among the best, plus 2 where the search is over; how many have ended; and where each
            of them comes from: its place before, or ``~rank`` of its candidate.
    """
    count = len(choices) // BEAM_CHOICE.itemsize
    kernel = gpu.kernel(_UNIT, "beam_finish", "ppipppppppi", overlap=True)
    scores, tokens, _ = planes.unbind()
    known = scores, tokens, planes.shape[2], choices, finishes, ends, before, given
    kernel((count, 1, 1), _THREADS, *known, worths, records, records.shape[1])


def move_beams(
    gpu: Gpu,
    table: torch.Tensor,
    caches: torch.Tensor,
    *,
    moves: torch.Tensor,
    most_rows: int,
    parents: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    token_bytes: int,
) -> None:
    """Let the rows of searches go on from their parents: block tables, and the blocks that are begun. Two launches.

    A row has the full blocks of its parent afterwards, and the last block that it had; where its parent is another row
    and has begun its own last block, what that holds is copied.

    Args:
        gpu: where.
        table: ``[B, M]`` int32, contiguous, written in place.
        caches: ``[C]`` int64 addresses of the caches.
        moves: on the device, :data:`BEAM_MOVE` as bytes, aligned to 16.
        most_rows: the most rows of a search.
        parents: ``[R]`` int32, by slot; no row's parent has another parent itself.
        seq_lens: ``[B]`` int32: tokens of each row, the one that the next step computes included. Every row of a search
            has as many, and a last block of its own for the last of them.
        block_size: tokens of a block.
        token_bytes: bytes of a token in a cache, a multiple of 16.
    """
    count, width = len(moves) // BEAM_MOVE.itemsize, table.shape[1]
    shared = (table, width, moves, parents, seq_lens, block_size)
    tables = gpu.kernel(_UNIT, "beam_tables", "pipppi", overlap=True)
    tables((count, -(-width // (_TILE // most_rows)), 1), _THREADS, *shared)
    blocks = gpu.kernel(_UNIT, "beam_blocks", "plpipppi", overlap=True)
    blocks((count, len(caches), min(most_rows, _ROWS_AT_ONCE)), _THREADS, caches, token_bytes, *shared)


def move_counts(
    gpu: Gpu, tallies: torch.Tensor, *, most_rows: int, parents: torch.Tensor, tokens: torch.Tensor, vocab_size: int
) -> None:
    """Let the counts of tokens of searches go on from their parents: each row has its parent's, and its token counted
    once more. One launch.

    Args:
        gpu: where.
        tallies: on the device, :data:`BEAM_TALLY` as bytes, aligned to 16.
        most_rows: the most rows of a search.
        parents, tokens: ``[R]`` int32, by slot, as :func:`choose_beams` gives them.
        vocab_size: ``V``.
    """
    grid = (len(tallies) // BEAM_TALLY.itemsize, -(-vocab_size // (_TILE // most_rows)), 1)
    kernel = gpu.kernel(_UNIT, "beam_counts", "ippp", overlap=True)
    kernel(grid, _THREADS, vocab_size, tallies, parents, tokens)
