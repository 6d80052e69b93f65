"""Lockstep: what the scheduler does for sequences of one request that must be in the same steps, the beams of a search.

Invariants, asserted by the scheduler's randomized test:
    - Sequences are parked behind another one of their request that waits or runs, and own no block.
    - A sequence that takes over another's blocks holds one reference to each, and none to those that it had.
    - A sequence whose last block is begun is the only owner of that block once it has written to it; so an heir, which
      has no continuation of its own, has a block for what it inherits.
"""

from __future__ import annotations

from llmapi._runtime.blocks import BlockPool
from llmapi._runtime.request import Request, Sequence, Status


class Parked:
    """Sequences that lost their blocks and wait until the first of their request is computed again."""

    def __init__(self) -> None:
        self._by_request: dict[Request, list[Sequence]] = {}

    def items(self) -> list[Sequence]:
        """Everyone who is parked."""
        return [seq for seqs in self._by_request.values() for seq in seqs]

    def behind(self, seq: Sequence) -> list[Sequence]:
        """Those parked of the request of ``seq``, by index."""
        return self._by_request.get(seq.request, []) if self._by_request else []

    def add(self, seqs: list[Sequence]) -> None:
        """Park sequences of one request, given by index."""
        if seqs:
            assert seqs[0].request not in self._by_request, "parked already"
            self._by_request[seqs[0].request] = seqs

    def release(self, request: Request) -> list[Sequence]:
        """Let all of a request go, by index."""
        return self._by_request.pop(request)

    def leave(self, seq: Sequence) -> Sequence | None:
        """Take a sequence that has ended out. Where others were parked behind it, the first of them is to wait instead.

        Returns:
            That one, or None.
        """
        parked = self._by_request.get(seq.request)
        if parked is None:
            return None
        if seq in parked:
            parked.remove(seq)
            successor = None
        else:
            successor = parked.pop(0)
        if not parked:
            del self._by_request[seq.request]
        return successor


def take_over(pool: BlockPool, heir: Sequence, parent: Sequence) -> tuple[int, int] | None:
    """Give a running sequence a share of another's blocks instead of its own.

    Args:
        pool: counts the owners.
        heir: gives its blocks back; those at the same place in both tables stay as they are.
        parent: of the same request.

    Returns:
        Where only the last, partial blocks differ and nobody else owns the heir's: source and target of the copy that
        makes the heir's, which it keeps, the same as the parent's. The source has one more owner, the copy.
    """
    assert heir.num_computed == parent.num_computed, "they are not in lockstep"
    old, new = heir.block_table, parent.block_table
    last = len(new) - 1
    partial = heir.num_computed % pool.block_size != 0
    if partial and pool.counts[old[last]] == 1 and old[:last] == new[:last]:
        pool.retain(new[last])
        return new[last], old[last]
    same = _common(old, new, min(len(old), len(new)))
    for block in new[same:]:
        pool.retain(block)
    for block in reversed(old[same:]):
        pool.release(block)
    heir.block_table = new.copy()
    heir.block_hashes = parent.block_hashes.copy()
    return None


def inherit(pool: BlockPool, heir: Sequence, parent: Sequence) -> None:
    """:func:`take_over`, where the step that was planned last has moved the blocks on the device already.

    That step computes the next token of both. The heir keeps its last block, to which it writes that token, and which
    got whatever the parent had begun; of the full blocks before it, it gets the parent's.

    Args:
        pool: counts the owners.
        heir, parent: of the same request, with as many computed tokens.
    """
    assert heir.num_computed == parent.num_computed, "they are not in lockstep"
    old, new, full = heir.block_table, parent.block_table, heir.num_computed // pool.block_size
    assert len(old) == len(new) == full + 1 and pool.counts[old[full]] == 1, "the last block is not the heir's own"
    same = _common(old, new, full)
    if same == full:
        return
    for block in new[same:full]:
        pool.retain(block)
    for block in reversed(old[same:full]):
        pool.release(block)
    heir.block_table = [*new[:full], old[full]]
    heir.block_hashes = parent.block_hashes.copy()


def _common(old: list[int], new: list[int], most: int) -> int:
    """How many blocks two tables begin with in common, of the first ``most``; looked for from the end."""
    same = most
    while same and old[same - 1] != new[same - 1]:
        same -= 1
    return same if old[:same] == new[:same] else 0  # found in the prefix cache at different times


def branch_blocks(pool: BlockPool, seq: Sequence, leader: Sequence) -> None:
    """Give a parked sequence a share of the full blocks whose tokens it has in common with ``leader``, which runs."""
    limit = min(leader.num_computed, len(seq.token_ids) - 1)
    ours, theirs, size = seq.token_ids, leader.token_ids, pool.block_size
    blocks = 0
    while (blocks + 1) * size <= limit:
        span = slice(blocks * size, (blocks + 1) * size)
        if ours[span] != theirs[span]:
            break
        blocks += 1
    assert seq.status is Status.WAITING and not seq.block_table
    seq.block_table = leader.block_table[:blocks]
    for block in seq.block_table:
        pool.retain(block)
    seq.block_hashes = leader.block_hashes[:blocks]
    seq.num_computed = blocks * size
