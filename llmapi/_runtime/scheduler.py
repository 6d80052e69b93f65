"""Scheduler: which tokens of which sequences run in the next step.

Invariants, asserted after every operation of the randomized test:
    - A step has at most ``max_num_tokens`` tokens and ``max_batch_size`` entries, at most one for each sequence.
    - A RUNNING sequence owns one reference to each block of its table, and nobody else owns any; its table holds every
      computed token. A WAITING or FINISHED sequence owns none.
    - A block with more than one owner is never written, nor is one that can be found by hash.
    - The oldest running sequence is never preempted, and a step that does not advance it is full of decodes; so every
      sequence ends.
    - Of a lockstep request's sequences, all compute their last token in the same step, or none does. They lose their
      blocks together.

It never sees a probability or a tensor. The loop calls, over and over::

    plan = scheduler.schedule()  # None: nothing to run
    ...                          # run plan.copies, then plan.entries
    scheduler.commit(plan)       # the KV of plan.entries is in the cache
    ...                          # append a token to each sequence that produced logits; fork, finish, add

A plan must be run and committed before the next one is made; between ``schedule`` and ``commit`` a sequence
may be finished or added, and none may be forked. When a plan could not be run, finish its sequences.

A plan may be made before the last tokens of its sequences are known: ``token_ids`` end in a reference then, and the
tokens are put in before ``commit``. A search of which it is not known either which beam goes on from which is planned
as if each beam went on from itself: a beam writes to its own last block, whoever it goes on from. Once that is known,
before ``commit``, :meth:`Scheduler.inherit` says so. What a plan computes for nothing is taken out of it before
``commit``.
"""

from __future__ import annotations

from bisect import insort

from llmapi._runtime.blocks import BlockPool, block_hash
from llmapi._runtime.lockstep import Parked, branch_blocks, inherit, take_over
from llmapi._runtime.plan import Draft, Entry, StepPlan
from llmapi._runtime.request import Request, Sequence, Status
from llmapi._runtime.waiting import WaitingQueue, age

__all__ = ["Entry", "Scheduler", "StepPlan"]


def _hash_next(hashes: list[bytes], token_ids: list[int], size: int) -> bytes:
    """Append the hash of the block after those whose ``hashes`` are known, and return it."""
    start = len(hashes) * size
    digest = block_hash(hashes[-1] if hashes else None, token_ids[start : start + size])
    hashes.append(digest)
    return digest


class Scheduler:
    """Plans steps over one pool. Policy, in order:

    1. Decode first: running sequences with one token to compute, oldest first.
    2. Then running sequences in prefill, oldest first, each cut to what is left of the token budget.
    3. Then, unless something was preempted, waiting sequences by (priority, arrival). The first that must wait makes
       all behind it wait. A sequence is admitted when the blocks for all its tokens, less those of a prefix that is
       found, are free and ``watermark`` blocks are left over, so that the next decode steps of those who run do not
       throw out the one just admitted: 1/64 of the pool, at least one; none when nothing runs, nor where a block
       holds a whole sequence.
    4. Where a running sequence finds no block, the youngest running one (possibly itself) gives up its own and waits,
       in arrival order, to be recomputed. What it had registered stays in the prefix cache as long as there is room.

    The sequences of a lockstep request (the beams of a search) count as one: they decode together or sit out together,
    and are admitted where all of them find room. Preempted ones are parked until the first of them is computed again;
    the others then go on from what they have in common with it.

    Blocks are taken as tokens need them. Forks may let more sequences run than a step has entries; the youngest sit
    out. A running sequence with nothing to compute (its next token is not appended yet) sits out and keeps its blocks.

    Args:
        pool: the blocks; the scheduler must be its only user.
        max_num_tokens: tokens per step.
        max_batch_size: entries per step; no sequence is admitted while this many run.
        max_seq_len: tokens per sequence.
    """

    def __init__(self, pool: BlockPool, *, max_num_tokens: int, max_batch_size: int, max_seq_len: int) -> None:
        if min(max_num_tokens, max_batch_size, max_seq_len) < 1:
            raise ValueError(f"limits start at 1: {max_num_tokens=} {max_batch_size=} {max_seq_len=}")
        self.pool = pool
        self.max_num_tokens = max_num_tokens
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        grows = pool.block_size < max_seq_len  # else a sequence has all it can need from the start
        self.watermark = max(1, pool.num_blocks // 64) if grows else 0
        self._running: list[Sequence] = []  # oldest first
        self._waiting = WaitingQueue()
        self._parked = Parked()
        self._copies: dict[int, int] = {}  # target -> source, due before the next step; each owns its source
        self._arrivals = 0
        self._hashed: Sequence | None = None  # the waiting sequence whose prefix hashes are kept in _hashes
        self._hashes: list[bytes] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self._running or self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """Sequences that own blocks, oldest first."""
        return self._running.copy()

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences to be admitted, next one first."""
        return self._waiting.items()

    @property
    def parked(self) -> list[Sequence]:
        """Sequences that lost their blocks and wait for another one of their request."""
        return self._parked.items()

    @property
    def copies_due(self) -> dict[int, int]:
        """Blocks whose contents the next step copies from another before it writes: target to source."""
        return self._copies.copy()

    @property
    def capacity_tokens(self) -> int:
        """Most tokens that one sequence, alone, can have."""
        return min(self.max_seq_len, self.pool.num_blocks * self.pool.block_size)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence can grow to this many tokens, prompt included. Ask before :meth:`add`."""
        return num_tokens <= self.capacity_tokens

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. It must have a token, and fit."""
        assert seq.status is Status.WAITING and not seq.block_table, "added before"
        assert seq.token_ids and self.fits(len(seq.token_ids)), f"{len(seq.token_ids)} tokens do not fit"
        seq.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.push(seq)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` go on from what ``parent`` has computed, sharing every block, the partial tail included.

        ``child`` must be new and begin with the parent's first ``num_computed`` tokens. Whoever writes to the shared
        tail gets a copy of it first; the last owner left writes in place. When the parent has lost its blocks, the
        child waits as it does.
        """
        assert child.status is Status.WAITING and not child.block_table and child not in self._waiting, "added before"
        assert parent.status is not Status.FINISHED, "a finished sequence has nothing to share: fork first"
        assert len(child.token_ids) >= max(1, parent.num_computed), "a fork begins with what its parent has computed"
        child.arrival = parent.arrival
        child.num_cached = parent.num_cached
        if parent.status is Status.WAITING:
            self._waiting.push(child)
            return
        for block in parent.block_table:
            self.pool.retain(block)
        child.block_table = parent.block_table.copy()
        child.block_hashes = parent.block_hashes.copy()
        child.num_computed = parent.num_computed
        self._run(child)

    def adopt(self, heir: Sequence, parent: Sequence) -> None:
        """Let ``heir`` drop what it has computed, and go on from what ``parent`` has as a fork does.

        They belong to one request. The blocks that both have already cost nothing; where they have lost their blocks
        since, there is nothing to do.
        """
        assert heir.request is parent.request and heir is not parent
        if not self._both_run(heir, parent):
            return
        copy = take_over(self.pool, heir, parent)
        if copy is not None:
            self._copies[copy[1]] = copy[0]

    def inherit(self, heir: Sequence, parent: Sequence) -> None:
        """:meth:`adopt` between a plan and its ``commit``, where the step has moved the blocks on the device.

        Of a beam and those who inherit from it, it must itself stay where it is.
        """
        assert heir.request is parent.request and heir is not parent
        assert self._both_run(heir, parent), "a plan has no place for sequences without blocks"
        inherit(self.pool, heir, parent)

    def rewind(self, seq: Sequence) -> None:
        """Let ``seq`` compute again what it has begun of its last block: that was overwritten."""
        if seq.status is Status.RUNNING:
            seq.num_computed -= seq.num_computed % self.pool.block_size

    def _both_run(self, heir: Sequence, parent: Sequence) -> bool:
        runs = heir.status is Status.RUNNING
        assert runs == (parent.status is Status.RUNNING), "the beams of a search lose their blocks together"
        return runs

    def finish(self, seq: Sequence) -> None:
        """Give back the blocks of a running sequence, or take a waiting one out of the queue. Twice is once."""
        if seq.status is Status.RUNNING:
            self._running.remove(seq)
            self._free_blocks(seq)
        self._waiting.discard(seq)
        seq.status = Status.FINISHED
        successor = self._parked.leave(seq)
        if successor is not None:
            self._waiting.push(successor)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no sequence has a token to compute."""
        draft = Draft(self.max_num_tokens, self.max_batch_size)
        self._take_copies(draft)
        running, prefills = self._running, []
        at, held = 0, False
        while at < len(running):  # preemption shortens the list from its end only
            seq = running[at]
            todo = len(seq.token_ids) - seq.num_computed
            if seq.request.lockstep:
                members = self._assemble(seq)
                at += len(members)
                if any(len(m.token_ids) - m.num_computed != 1 for m in members) or self._parked.behind(seq):
                    prefills += members
                    continue
                held = len(members) > min(draft.tokens, draft.slots)
                if held:
                    break
                self._place_beams(members, draft)
                continue
            at += 1
            if todo == 1:
                if draft.full:
                    break
                self._place(seq, 1, draft)
            elif todo:
                prefills.append(seq)
        for seq in prefills:
            if seq.status is Status.RUNNING and not draft.full:
                count = min(self._todo(seq), draft.tokens)
                if count > 0:
                    self._place(seq, count, draft)
        if not (draft.preempted or held):
            self._admit(draft)
        if not draft.entries:
            self._copies = draft.copies
            return None
        for source in draft.copies.values():
            self.pool.release(source)
        copies = [(source, target) for target, source in draft.copies.items()]
        return StepPlan(list(draft.entries.values()), copies, draft.preempted)

    def commit(self, plan: StepPlan) -> None:
        """Record that the plan has run: advance its sequences and register the blocks that became full."""
        size, caching = self.pool.block_size, self.pool.enable_prefix_caching
        for entry in plan.entries:
            seq = entry.seq
            if seq.status is not Status.RUNNING:
                continue  # finished since
            assert seq.num_computed == entry.start, "committed twice, or out of order"
            seq.num_computed = entry.start + entry.count
            full = seq.num_computed // size
            while caching and len(seq.block_hashes) < full:
                block = seq.block_table[len(seq.block_hashes)]
                self.pool.register(block, _hash_next(seq.block_hashes, seq.token_ids, size))

    def _todo(self, seq: Sequence) -> int:
        """How many tokens of ``seq`` may be computed before its next decode."""
        alone = not seq.request.lockstep or len(seq.request.sequences) == 1
        return len(seq.token_ids) - seq.num_computed - (not alone)

    def _assemble(self, first: Sequence) -> list[Sequence]:
        """The running sequences of a lockstep request; those parked behind ``first`` join once it is computed."""
        request = first.request
        if not self._parked.behind(first):
            return request.sequences
        if self._todo(first):
            return [first]
        for seq in self._parked.release(request):
            branch_blocks(self.pool, seq, first)
            self._run(seq)
        return request.sequences

    def _place_beams(self, members: list[Sequence], draft: Draft) -> None:
        """Plan a token of each of these, which all have computed as many."""
        start, counts, entries = members[0].num_computed, self.pool.counts, draft.entries
        whole = not start % self.pool.block_size  # they need a new block
        for seq in members:
            if whole or counts[seq.block_table[-1]] > 1:
                self._take_blocks(seq, 1, draft)
                if seq.status is not Status.RUNNING:  # nor is any other of them
                    return
            entries[seq] = Entry(seq, start, 1)
            draft.tokens -= 1
            draft.slots -= 1

    def _place(self, seq: Sequence, count: int, draft: Draft) -> None:
        """Plan ``count`` tokens of a running ``seq``, unless the blocks they need cost it its own."""
        start, size = seq.num_computed, self.pool.block_size
        used = start % size  # of the last block; most decodes write to it, need no other and share it with nobody
        if not used or used + count > size or self.pool.count(seq.block_table[-1]) > 1:
            self._take_blocks(seq, count, draft)
            if seq.status is not Status.RUNNING:
                return
        draft.entries[seq] = Entry(seq, start, count)
        draft.tokens -= count
        draft.slots -= 1

    def _take_blocks(self, seq: Sequence, count: int, draft: Draft) -> None:
        """Give ``seq`` the blocks to write ``count`` tokens to; preempt it when it is the youngest and none is left.

        What it needs is found before anything is taken, and again after each preemption, which may also end a sharing.
        """
        pool, table, start = self.pool, seq.block_table, seq.num_computed
        first = start // pool.block_size  # index of the first block to be written
        fresh = (start + count - 1) // pool.block_size + 1 - len(table)
        while True:
            copied = first < len(table) and self._is_shared(table[first], draft)
            if fresh + copied <= pool.num_free:
                break
            self._preempt(draft)
            if seq.status is not Status.RUNNING:
                return
        if copied:
            source = table[first]
            table[first] = target = pool.allocate(table[first - 1] if first else None)
            draft.copies[target] = source  # the reference that seq had is now the copy's
            draft.held[source] += 1
        for _ in range(fresh):
            table.append(pool.allocate(table[-1] if table else None))

    def _is_shared(self, block: int, draft: Draft) -> bool:
        """Whether a sequence other than the one that asks owns ``block``."""
        count = self.pool.count(block)
        return count > 1 and count - draft.held[block] > 1

    def _preempt(self, draft: Draft) -> None:
        """Take the blocks of the youngest running sequence, and whatever this step had planned for it.

        Those in lockstep with it lose theirs, too.
        """
        victim = self._running[-1]
        request, lost = victim.request, [victim]
        while request.lockstep and len(self._running) > len(lost) and self._running[-1 - len(lost)].request is request:
            lost.append(self._running[-1 - len(lost)])
        if len(lost) == len(self._running):
            raise RuntimeError(
                f"internal error: a sequence of {len(victim.token_ids)} tokens, alone, needs more than all "
                f"{self.pool.num_blocks} blocks of {self.pool.block_size} tokens"
                + (f"; it is one of {len(lost)} beams" if len(lost) > 1 else "")
            )
        for seq in lost:
            self._running.pop()
            self._take_back(seq, draft)
        first = lost.pop()
        self._waiting.push(first)
        self._parked.add(lost[::-1])

    def _take_back(self, victim: Sequence, draft: Draft) -> None:
        entry = draft.entries.pop(victim, None)
        if entry is not None:
            draft.tokens += entry.count
            draft.slots += 1
        for target in victim.block_table if draft.copies else ():
            source = draft.copies.pop(target, None)
            if source is not None:
                draft.held[source] -= 1
                self.pool.release(source)
        self._free_blocks(victim)
        victim.preemptions += 1
        draft.preempted.append(victim)

    def _admit(self, draft: Draft) -> None:
        """Let waiting sequences run, oldest first, while the step and the pool have room for the next one."""
        pool = self.pool
        while not draft.full and len(self._running) < self.max_batch_size:
            seq = self._waiting.first()
            reserve = self.watermark if self._running else 0
            if seq is None or pool.num_free <= reserve:  # at least one block is always needed
                return
            if seq.request.lockstep and not self._has_slots(seq.request):
                return
            found = self._find_prefix(seq)
            fresh = -(-len(seq.token_ids) // pool.block_size) - len(found) + self._branches(seq)
            revived = sum(not pool.count(block) for block in found)  # free until now
            if pool.num_free - revived - fresh < reserve:
                return
            pool.stats.queries += self._num_findable(seq)
            pool.stats.hits += len(found)
            self._waiting.pop()
            for block in found:
                pool.retain(block)
            seq.block_table = found
            seq.block_hashes = self._hashes[: len(found)]
            seq.num_computed = len(found) * pool.block_size
            if not seq.preemptions:
                seq.num_cached = seq.num_computed
            self._hashed, self._hashes = None, []
            self._run(seq)
            self._place(seq, min(self._todo(seq), draft.tokens), draft)
            assert not draft.preempted, "admitted without room"

    def _has_slots(self, request: Request) -> bool:
        """Whether all beams of a search may run beside those that run and those that these will grow to."""
        growing = [s.request for s in self._running if s.request.lockstep and len(s.request.sequences) == 1]
        taken = len(self._running) + sum(r.params.num_beams - 1 for r in growing)
        return not taken or taken + max(request.params.num_beams, len(request.sequences)) <= self.max_batch_size

    def _branches(self, seq: Sequence) -> int:
        """Blocks that the others in lockstep with a waiting ``seq`` will need as soon as it is computed."""
        parked = self._parked.behind(seq)
        own = -(-len(seq.token_ids) // self.pool.block_size) - seq.num_prompt // self.pool.block_size
        if not seq.request.lockstep:
            return 0
        return len(parked) * own if parked else seq.request.params.num_beams - 1

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """Find blocks that hold the beginning of ``seq``, always leaving a token to compute.

        The hashes are kept while the sequence is first in the queue: one that must wait asks again in every step.
        """
        if self._hashed is not seq:
            self._hashed, self._hashes = seq, []
        found: list[int] = []
        for i in range(self._num_findable(seq)):
            if i == len(self._hashes):
                _hash_next(self._hashes, seq.token_ids, self.pool.block_size)
            block = self.pool.lookup(self._hashes[i])
            if block is None:
                break
            found.append(block)
        return found

    def _num_findable(self, seq: Sequence) -> int:
        """How many blocks of a waiting ``seq`` may come from the prefix cache."""
        if not self.pool.enable_prefix_caching:
            return 0
        wanted, last = seq.request.first_wanted_row, len(seq.token_ids) - 1 - bool(self._parked.behind(seq))
        return (last if wanted is None else min(wanted, last)) // self.pool.block_size

    def _run(self, seq: Sequence) -> None:
        insort(self._running, seq, key=age)
        seq.status = Status.RUNNING

    def _take_copies(self, draft: Draft) -> None:
        """Plan the copies that adoptions left."""
        draft.copies, self._copies = self._copies, {}
        for source in draft.copies.values():
            draft.held[source] += 1

    def _drop_copies(self, seq: Sequence) -> None:
        """Forget a copy that was to be the last block of ``seq``."""
        source = self._copies.pop(seq.block_table[-1], None) if seq.block_table else None
        if source is not None:
            self.pool.release(source)

    def _free_blocks(self, seq: Sequence) -> None:
        if self._copies:
            self._drop_copies(seq)
        for block in reversed(seq.block_table):
            self.pool.release(block)
        seq.block_table = []
        seq.block_hashes = []
        seq.num_computed = 0
        seq.status = Status.WAITING
