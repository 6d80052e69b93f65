"""The scheduler under random load, against a model of the KV memory.

The model stores, for each (block, offset), a hash of the whole history that a token's KV depends on. A step first does
its copies, then reads everything an attention kernel would read, then writes. So a wrong prefix hit, a missing copy, a
write to a shared block or a block freed too early shows as a wrong history. The faults at the end prove that it does.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from llmapi._runtime import blocks, lockstep, scheduler
from llmapi._runtime.beam import seats
from llmapi._runtime.blocks import BlockPool
from llmapi._runtime.request import Request, Sequence, Status
from llmapi._runtime.scheduler import Scheduler, StepPlan
from llmapi._runtime.waiting import age
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams


@dataclass(frozen=True)
class Load:
    """Shape of a random run; lengths are in tokens."""

    num_blocks: int
    block_size: int
    max_num_tokens: int
    max_batch_size: int
    max_prompt: int
    max_output: int
    caching: bool = True
    width: int = 4  # most sequences of one request
    beams: bool = False  # forks at any time, children replacing parents
    arrivals: float = 0.5  # chance of a new request before each step
    priorities: int = 1
    lockstep: float = 0.0  # share of requests that are beam searches, reordered after each step
    ahead: float = 0.0  # share of their steps after which the next one is planned before it is known how they go on


LOADS = {
    "roomy": Load(64, 4, 64, 8, 40, 20),
    "tight": Load(14, 4, 24, 8, 30, 24),
    "tiny": Load(6, 2, 3, 4, 6, 6, arrivals=0.7),
    "one token": Load(20, 1, 4, 6, 10, 10),
    "chunks": Load(40, 4, 5, 6, 60, 8),
    "no cache": Load(14, 4, 24, 8, 30, 24, caching=False),
    "beams": Load(24, 4, 32, 12, 20, 24, beams=True),
    "wide": Load(40, 4, 16, 4, 20, 12, width=10),
    "priorities": Load(14, 4, 12, 6, 24, 24, priorities=3),
    "old prefills, young beams": Load(12, 4, 8, 8, 30, 16, beams=True, priorities=4),
    "whole pool": Load(4, 4, 16, 4, 16, 8, width=2),
    "one at a time": Load(10, 4, 8, 1, 24, 12, width=3),
    "large": Load(1100, 2, 32, 8, 60, 20),
    "searches": Load(64, 4, 24, 8, 20, 16, lockstep=1.0),
    "searches and samples": Load(40, 4, 16, 8, 20, 16, lockstep=0.5, priorities=3),
    "tight searches": Load(22, 4, 24, 8, 24, 16, lockstep=0.6),
    "tight searches, no cache": Load(22, 4, 24, 8, 24, 16, lockstep=0.6, caching=False),
    "searches ahead": Load(64, 4, 24, 8, 20, 24, lockstep=1.0, ahead=0.8),
    "tight searches ahead": Load(22, 4, 24, 8, 24, 16, lockstep=0.6, ahead=0.8),
    "tight searches ahead, no cache": Load(22, 4, 24, 8, 24, 16, lockstep=0.6, caching=False, ahead=0.9),
    "wide searches": Load(48, 4, 8, 8, 16, 12, lockstep=0.8, width=8, arrivals=0.3),
}


class World:
    """A scheduler, the loop around it, and what the KV memory would hold."""

    def __init__(self, load: Load, seed: int, pool_type: type[BlockPool], scheduler_type: type[Scheduler]) -> None:
        self.load, self.rng = load, random.Random(seed)
        self.pool = pool_type(
            load.num_blocks, load.block_size, enable_prefix_caching=load.caching, spare=self.rng.choice([0.0, 0.3])
        )
        capacity = load.num_blocks * load.block_size
        self.scheduler = scheduler_type(
            self.pool,
            max_num_tokens=load.max_num_tokens,
            max_batch_size=load.max_batch_size,
            max_seq_len=capacity if self.rng.random() < 0.5 else min(capacity, load.max_prompt + load.max_output),
        )
        self.kv: dict[tuple[int, int], int] = {}
        self.contents_of: dict[bytes, int] = {}  # block hash -> history at the block's end
        self.histories: dict[Sequence, list[int]] = {}
        self.limits: dict[Sequence, int] = {}
        self.live: list[Sequence] = []
        self.prompts: list[list[int]] = []
        self.seen: Counter[str] = Counter()
        self.num_requests = 0
        self.flying: dict[Request, tuple[list[Sequence], list[int], list[int]]] = {}  # beams, parents, tokens by row

    # what the outside does

    def arrive(self) -> None:
        prompt: list[int] = []
        if self.prompts and self.rng.random() < 0.6:  # begin like an earlier one
            prompt = self.rng.choice(self.prompts)
            prompt = prompt[: self.rng.randint(1, len(prompt))]
        length = (
            self.rng.randint(max(1, len(prompt)), self.load.max_prompt) if len(prompt) < self.load.max_prompt else 0
        )
        prompt = prompt + [self.rng.randrange(3) for _ in range(length - len(prompt))]
        limit = len(prompt) + self.rng.randint(1, self.load.max_output)
        limit = min(limit, self.scheduler.capacity_tokens)
        if len(prompt) >= limit:
            return
        assert self.scheduler.fits(limit)
        self.prompts = [*self.prompts[-20:], prompt]
        params = SamplingParams(
            n=self.rng.randint(1, self.load.width) if self.rng.random() < 0.5 else 1,
            prompt_logprobs=0 if self.rng.random() < 0.1 else None,
        )
        if self.rng.random() < self.load.lockstep:
            width, shared = self.rng.randint(2, self.load.width), len(prompt) // self.load.block_size
            params = SamplingParams(use_beam_search=True, beam_width=width)
            each = shared + (self.load.num_blocks - shared) // width
            limit = min(limit, each * self.load.block_size)
            if limit <= len(prompt):
                return
        self.num_requests += 1
        request = Request(
            str(self.num_requests),
            None,
            prompt,
            params,
            0,
            self.load.max_output,
            frozenset(),
            RequestMetrics(arrival_time=0.0),
            self.rng.randrange(self.load.priorities),
        )
        self.scheduler.add(request.sequences[0])
        self.join(request.sequences[0], limit)

    def join(self, seq: Sequence, limit: int) -> None:
        self.live.append(seq)
        self.limits[seq] = limit
        self.histories[seq] = []

    def leave(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.live.remove(seq)
        del self.limits[seq], self.histories[seq]
        assert seq.status is Status.FINISHED
        if seq.request.lockstep:
            seq.request.sequences.remove(seq)

    def fork(self, parent: Sequence) -> Sequence:
        children = parent.request.sequences
        index = next(i for i in range(len(children) + 1) if all(s.index != i for s in children))
        child = Sequence(parent.request, index, parent.token_ids.copy(), parent.num_prompt)
        children.append(child)
        if parent.request.lockstep:
            children.sort(key=lambda s: s.index)
        self.scheduler.fork(parent, child)
        self.join(child, self.limits[parent])
        self.seen["forks"] += 1
        return child

    # one turn of the loop

    def turn(self, arriving: bool) -> None:
        while arriving and self.rng.random() < self.load.arrivals:
            self.arrive()
        if self.live and self.rng.random() < 0.03:
            victim = self.rng.choice(self.live)
            whole = victim.request.lockstep and self.rng.random() < 0.7
            for seq in list(victim.request.sequences) if whole else [victim]:
                self.leave(seq)
            self.seen["aborts"] += 1
            self.check()
        if self.scheduler.parked and self.rng.random() < 0.1:  # the one that the others wait for
            self.leave(self.scheduler.parked[0].request.sequences[0])
            self.check()
        before = self.scheduler.running, self.scheduler.waiting, self.scheduler.parked
        todo = {seq: len(seq.token_ids) - seq.num_computed for seq in self.live}
        plan = self.scheduler.schedule()
        assert (plan is None) == (not self.live), "a step must run something whenever there is something to run"
        if plan is None:
            return
        self.check(copied=False)
        self.check_policy(plan, *before, todo)
        self.land(plan)
        self.run(plan)
        producing = [entry.seq for entry in plan.entries if entry.produces_logits]
        if self.rng.random() < 0.02:  # an abort while the step runs
            victim = self.rng.choice(self.live)
            self.leave(victim)
            producing = [seq for seq in producing if seq is not victim]
        self.scheduler.commit(plan)
        self.check()
        self.decide(producing)
        self.check()

    def decide(self, producing: list[Sequence]) -> None:
        """Append tokens, fork, finish: what sampling or a beam search would do."""
        searches = {seq.request: None for seq in producing if seq.request.lockstep}
        for request in searches:
            self.reorder(request, [seq for seq in producing if seq.request is request])
        for seq in producing:
            if seq.request.lockstep:
                continue
            group = [seq]
            first = seq.num_output == 0 and len(seq.request.sequences) == 1
            if first:
                group += [self.fork(seq) for _ in range(seq.request.params.n - 1)]
            elif self.load.beams and self.rng.random() < 0.3 and len(self.live) < 40:
                group.append(self.fork(seq))
                if self.rng.random() < 0.5:
                    group.append(self.fork(seq))
                    self.leave(group.pop(0))
            for each in group:
                forced = self.load.beams and self.rng.random() < 0.2  # several tokens at once: a short prefill again
                room = self.limits[each] - len(each.token_ids)
                for _ in range(min(room, self.rng.randint(2, 8)) if forced else 1):
                    each.token_ids.append(self.rng.randrange(3))
                if len(each.token_ids) >= self.limits[each] or self.rng.random() < 0.02:
                    self.leave(each)

    def reorder(self, request: Request, seqs: list[Sequence]) -> None:
        """Let random continuations of a search's beams take their places; end beams, and the search, at times."""
        assert seqs == request.sequences, "beams of one search are not in one step, or out of order"
        if len(seqs[0].token_ids) + 1 >= self.limits[seqs[0]] or self.rng.random() < 0.02:
            for seq in list(seqs):
                self.leave(seq)
            return
        if self.load.ahead and len(seqs) == request.params.num_beams and self.rng.random() < self.load.ahead:
            going = [self.rng.randrange(len(seqs)) for _ in seqs]
            by_row, _ = seats(going, len(seqs))
            rows = [going[rank] for rank in by_row if rank is not None]
            self.flying[request] = list(seqs), rows, [self.rng.randrange(3) for _ in seqs]
            for seq in seqs:
                seq.token_ids.append(-1)
            return
        wanted = request.params.num_beams - (self.rng.random() < 0.1)
        parents = [self.rng.choice(seqs) for _ in range(wanted)]
        free = [seq for seq in seqs if seq not in parents]
        going = list(dict.fromkeys(parents))
        for parent in (p for i, p in enumerate(parents) if p in parents[:i]):
            if free:
                heir = free.pop()
                heir.token_ids = parent.token_ids.copy()
                self.histories[heir] = self.histories[parent].copy()
                self.scheduler.adopt(heir, parent)
                self.seen["adoptions"] += 1
            else:
                heir = self.fork(parent)
            going.append(heir)
        for seq in free:
            self.leave(seq)
        for seq in going:
            seq.token_ids.append(self.rng.randrange(3))

    def land(self, plan: StepPlan) -> None:
        """Make known how the searches went on that this plan was made without knowing; those in it have moved."""
        planned, size = {entry.seq.request for entry in plan.entries}, self.load.block_size
        for request, (beams, parents, tokens) in self.flying.items():
            left = [seq for seq in beams if seq.status is not Status.FINISHED]
            for seq in left:
                del seq.token_ids[-1]
                self.histories[seq] = self.histories[seq][: len(seq.token_ids)]
            torn = left != beams  # a beam was aborted: the others stay
            if request in planned and not torn and self.rng.random() < 0.15:
                self.take_back(plan, beams, parents)
                continue
            for row, heir in enumerate(left):
                parent = heir if torn else beams[parents[row]]
                if parent is not heir:
                    heir.token_ids = parent.token_ids.copy()
                    self.histories[heir] = self.histories[parent].copy()
                    if request in planned:
                        begun = heir.num_computed % size
                        source, target = parent.block_table[-1], heir.block_table[-1]
                        self.check_written(target)
                        for offset in range(begun):
                            self.kv[target, offset] = self.kv[source, offset]
                        self.scheduler.inherit(heir, parent)
                        self.seen["inherited"] += 1
                    else:
                        self.scheduler.adopt(heir, parent)
                        self.seen["adopted late"] += heir.status is Status.RUNNING
            for seq, token in zip(beams, tokens, strict=True):
                if seq.status is not Status.FINISHED:
                    seq.token_ids.append(token)
        self.flying.clear()

    def take_back(self, plan: StepPlan, beams: list[Sequence], on_device: list[int]) -> None:
        """Let a search go on otherwise than the device has moved it; the plan's step is nothing to it."""
        plan.entries = [entry for entry in plan.entries if entry.seq.request is not beams[0].request]
        begun = beams[0].num_computed % self.load.block_size
        last = [seq.block_table[-1] for seq in beams]
        held = [[self.kv[block, offset] for offset in range(begun)] for block in last]
        for row, parent in enumerate(on_device):
            for offset, value in enumerate([*held[parent], -1]):
                self.kv[last[row], offset] = value
        going = [self.rng.randrange(len(beams)) for _ in beams]
        by_row, _ = seats(going, len(beams))
        rows = [going[rank] for rank in by_row if rank is not None]
        for heir, parent in zip(beams, rows, strict=True):
            if beams[parent] is not heir:
                heir.token_ids = beams[parent].token_ids.copy()
                self.histories[heir] = self.histories[beams[parent]].copy()
                self.scheduler.adopt(heir, beams[parent])
        for seq, parent in zip(beams, rows, strict=True):
            if on_device[parent] != parent:
                self.scheduler.rewind(seq)
                self.seen["set back"] += 1
            seq.token_ids.append(self.rng.randrange(3))

    def run(self, plan: StepPlan) -> None:
        """Do to the modelled memory what an engine would do to the real one."""
        size = self.load.block_size
        snapshot = {target: [self.kv.get((source, offset)) for offset in range(size)] for source, target in plan.copies}
        sources, targets = [s for s, _ in plan.copies], [t for _, t in plan.copies]
        assert len(set(targets)) == len(targets) and not set(targets) & set(sources), "copies depend on each other"
        for target, values in snapshot.items():
            self.check_written(target)
            for offset, value in enumerate(values):
                self.kv[target, offset] = value  # type: ignore[assignment]
        written: set[tuple[int, int]] = set()
        for entry in plan.entries:
            seq = entry.seq
            self.check_contents(seq, entry.start)
            for position in range(entry.start, entry.start + entry.count):
                block, offset = seq.block_table[position // size], position % size
                self.check_written(block)
                assert (block, offset) not in written, "two sequences write to one place"
                written.add((block, offset))
        for entry in plan.entries:
            history = self.history(entry.seq)
            for position in range(entry.start, entry.start + entry.count):
                self.kv[entry.seq.block_table[position // size], position % size] = history[position]
        self.seen["steps"] += 1
        self.seen["tokens"] += plan.num_tokens
        self.seen["copies"] += len(plan.copies)
        self.seen["preempted"] += len(plan.preempted)
        self.seen["chunks"] += sum(not entry.produces_logits for entry in plan.entries)

    def history(self, seq: Sequence) -> list[int]:
        known = self.histories[seq]
        for position in range(len(known), len(seq.token_ids)):
            known.append(hash((known[-1] if known else None, seq.token_ids[position])))
        return known

    # what must hold

    def check(self, *, copied: bool = True) -> None:
        scheduler, size = self.scheduler, self.load.block_size
        running, waiting = scheduler.running, scheduler.waiting + scheduler.parked
        due = scheduler.copies_due
        self.pool.check([*(seq.block_table for seq in running), *([source] for source in due.values())])
        assert not set(due) & set(due.values()) and set(due) <= {b for seq in running for b in seq.block_table}
        assert sorted(map(id, running + waiting)) == sorted(map(id, self.live)), "a sequence got lost"
        for request in {seq.request for seq in self.live if seq.request.lockstep}:
            assert request.sequences[0] not in scheduler.parked, "nobody is waited for"
            states = [seq.status for seq in request.sequences]
            assert len(set(states)) == 1 or states[1:] == [Status.WAITING] * (len(states) - 1), "torn apart"
        assert running == sorted(running, key=age)
        for seq in running:
            assert seq.status is Status.RUNNING
            assert 0 <= seq.num_computed <= len(seq.token_ids) and len(seq.block_table) * size >= seq.num_computed
            assert len(set(seq.block_table)) == len(seq.block_table)
            assert len(seq.block_hashes) == (seq.num_computed // size if self.load.caching else 0)
            if copied:  # else the copies of the plan are still to be done
                self.check_contents(seq, seq.num_computed)
        for seq in waiting:
            assert seq.status is Status.WAITING
            assert not seq.block_table and not seq.block_hashes and seq.num_computed == 0
        for block in range(self.load.num_blocks):
            digest = self.pool.hash_of(block)
            if digest is not None:
                end = self.kv[block, size - 1]
                assert self.contents_of.setdefault(digest, end) == end, "a block's hash does not tell its contents"

    def check_contents(self, seq: Sequence, count: int) -> None:
        """Every token computed so far is where the block table says, computed from the same history."""
        history, size, due = self.history(seq), self.load.block_size, self.scheduler.copies_due
        for position in range(count):
            block = seq.block_table[position // size]
            found = self.kv.get((due.get(block, block), position % size))
            assert found == history[position], f"token {position} of {count} is not what the block table points at"

    def check_written(self, block: int) -> None:
        assert self.pool.count(block) == 1, f"block {block} is written and has {self.pool.count(block)} owners"
        assert self.pool.hash_of(block) is None, f"block {block} is written and can be found by hash"

    def check_policy(
        self,
        plan: StepPlan,
        running: list[Sequence],
        waiting: list[Sequence],
        parked: list[Sequence],
        todo: dict[Sequence, int],
    ) -> None:
        load = self.load
        counts = {entry.seq: entry.count for entry in plan.entries}
        assert plan.entries and len(counts) == len(plan.entries) <= load.max_batch_size
        assert 0 < plan.num_tokens <= load.max_num_tokens
        full = plan.num_tokens == load.max_num_tokens or len(counts) == load.max_batch_size
        admitted = [seq for seq in waiting if seq.status is Status.RUNNING]
        # preemption takes the youngest, and stops admission
        joined_and_lost = set(plan.preempted) & set(parked)  # they had just got blocks again
        keep = len(running) - len(set(plan.preempted) - joined_and_lost)
        assert set(plan.preempted) <= set(running[keep:]) | {s for s in parked if s.request.lockstep}
        assert set(plan.preempted) >= set(running[keep:]) and (keep or not running)
        assert not (plan.preempted and admitted)
        # admission is first come, first served, and comes last
        assert admitted == waiting[: len(admitted)]
        assert not admitted or len(running) + len(admitted) <= load.max_batch_size
        decoding = [seq for seq in running[:keep] if todo[seq] == 1]
        prefills = [seq for seq in running[:keep] if todo[seq] > 1]
        for request in {seq.request for seq in counts if seq.request.lockstep}:
            deciding = [len(s.token_ids) - s.num_computed == counts.get(s) for s in request.sequences]
            assert all(deciding) or not any(deciding), "a search is cut in two"
        # a beam whose siblings are still being computed has to wait for them
        idle = {s for s in decoding if s.request.lockstep and any(todo[m] != 1 for m in s.request.sequences)}
        idle |= {s for s in decoding if s.request.lockstep and set(s.request.sequences) & set(parked)}
        late = next((seq for seq in decoding if seq not in counts and seq not in idle), None)
        if late is not None:  # decodes come before all else
            room = min(load.max_batch_size - len(counts), load.max_num_tokens - plan.num_tokens)
            size = len(late.request.sequences) if late.request.lockstep else 1
            assert full or plan.preempted or room < size
            assert not admitted
        joined = {seq for seq in parked if seq.status is Status.RUNNING}
        self.seen["joined"] += len(joined)
        assert set(counts) <= set(decoding) | set(prefills) | set(admitted) | joined
        if admitted:
            assert (set(decoding) - idle) | {s for s in prefills if not s.request.lockstep} <= set(counts)
        for seq, count in counts.items():
            left = len(seq.token_ids) - seq.num_computed
            if seq.request.lockstep and len(seq.request.sequences) > 1 and left > 1:
                left -= 1  # the last one is computed beside its siblings'
            assert 0 < count <= left
            assert count == left or full or plan.preempted, "cut for no reason"
        # the oldest moves on, or decodes fill the step
        if keep:
            oldest = running[0].request.sequences if running[0].request.lockstep else running[:1]
            assert any(seq in counts for seq in oldest) or set(counts) <= set(decoding)
        self.seen["admitted"] += len(admitted)
        self.seen["hits"] += sum(bool(seq.num_computed) for seq in admitted)


def play(
    load: Load,
    seed: int,
    turns: int,
    pool_type: type[BlockPool] = BlockPool,
    scheduler_type: type[Scheduler] = Scheduler,
) -> World:
    """Run a random load to its end; every check on the way must hold."""
    world = World(load, seed, pool_type, scheduler_type)
    for _ in range(turns):
        world.turn(arriving=len(world.live) < 30)
    bound = 50 + 4 * sum(world.limits[seq] for seq in world.live) * max(1, len(world.live))
    while world.live:  # nothing new arrives: everyone must come to an end
        world.turn(arriving=False)
        bound -= 1
        assert bound, "starved"
    assert not world.scheduler.has_work and world.pool.num_free == load.num_blocks
    world.pool.check([])
    return world


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOADS)
def test_random_load(name: str, seed: int) -> None:
    world = play(LOADS[name], seed, turns=400)
    seen = world.seen
    assert seen["steps"] > 300 and seen["admitted"] > 10 and seen["forks"] > 10
    assert seen["chunks"] > 0 or name == "whole pool"
    if name in ("tight", "tiny", "one token", "no cache", "beams", "priorities", "old prefills, young beams"):
        assert seen["preempted"] > 0
    if LOADS[name].lockstep:
        assert seen["adoptions"] > 30 or LOADS[name].ahead
    if LOADS[name].ahead:
        assert seen["inherited"] > 100 and seen["set back"] > 10
    if name.startswith("tight searches"):
        assert seen["preempted"] > 10 and seen["joined"] > (0 if LOADS[name].ahead else 10)
    if name != "one token":
        assert seen["copies"] > 0
    assert (seen["hits"] > 0) == LOADS[name].caching


# Each fault must be noticed: the checks above are worth nothing otherwise.

Edit = tuple[str, str]
FAULTS: dict[str, tuple[ModuleType, list[Edit]]] = {
    "copy-on-write off": (scheduler, [("return count > 1 and count - draft.held[block] > 1", "return False")]),
    "copies left out of the plan": (
        scheduler,
        [
            (
                "return StepPlan(list(draft.entries.values()), copies,",
                "return StepPlan(list(draft.entries.values()), [],",
            )
        ],
    ),
    "a copy does not hold its source": (
        scheduler,
        [
            ("draft.held[source] += 1\n        for _ in", "self.pool.release(source)\n        for _ in"),
            ("draft.held[source] -= 1\n                self.pool.release(source)", "pass"),
            ("for source in draft.copies.values():\n            self.pool.release(source)", "pass"),
        ],
    ),
    "a preempted sequence keeps its copy": (scheduler, [("source = draft.copies.pop(target, None)", "source = None")]),
    "a preempted sequence keeps its entry": (
        scheduler,
        [("draft.entries.pop(victim, None)", "draft.entries.get(victim)")],
    ),
    "a preempted sequence counts as computed": (scheduler, [("        seq.num_computed = 0\n", "")]),
    "a preempted sequence keeps its hashes": (scheduler, [("        seq.block_hashes = []\n", "")]),
    "a whole sequence is taken from the cache": (
        scheduler,
        [("len(seq.token_ids) - 1 - bool(self._parked.behind(seq))", "len(seq.token_ids)")],
    ),
    "found blocks are not retained": (scheduler, [("for block in found:\n                pool.retain(block)", "pass")]),
    "found blocks are counted as free": (scheduler, [("pool.num_free - revived - fresh", "pool.num_free - fresh")]),
    "forks own nothing": (
        scheduler,
        [("for block in parent.block_table:\n            self.pool.retain(block)", "pass")],
    ),
    "forks share one table": (scheduler, [("parent.block_table.copy()", "parent.block_table")]),
    "hashes ignore what came before": (scheduler, [("hashes[-1] if hashes else None", "None")]),
    "blocks are registered before they are full": (
        scheduler,
        [("full = seq.num_computed // size", "full = len(seq.block_table)")],
    ),
    "the token budget is ignored": (scheduler, [("draft.tokens -= count", "pass")]),
    "the batch size is ignored": (
        scheduler,
        [("draft.tokens -= count\n        draft.slots -= 1", "draft.tokens -= count")],
    ),
    "the oldest is preempted": (
        scheduler,
        [("victim = self._running[-1]", "victim = self._running[0]"), ("self._running.pop()", "self._running.pop(0)")],
    ),
    "admission after preemption": (scheduler, [("if not (draft.preempted or held):", "if not held:")]),
    "beams sit out one by one": (scheduler, [("held = len(members) > min(draft.tokens, draft.slots)", "held = False")]),
    "beams are preempted one by one": (scheduler, [("while request.lockstep and", "while False and")]),
    "beams decide one by one": (scheduler, [("- seq.num_computed - (not alone)", "- seq.num_computed")]),
    "an heir keeps a block": (
        lockstep,
        [("for block in reversed(old[same:]):\n        pool.release(block)", "pass")],
    ),
    "a copy that is due is forgotten": (scheduler, [("self._copies[copy[1]] = copy[0]", "pass")]),
    "a copy that is due owns nothing": (lockstep, [("pool.retain(new[last])\n", "pass\n")]),
    "an ended heir's copy stays due": (
        scheduler,
        [("if self._copies:\n            self._drop", "if False:\n            self._drop")],
    ),
    "an heir owns nothing": (lockstep, [("for block in new[same:]:\n        pool.retain(block)", "pass")]),
    "an heir keeps its full blocks": (lockstep, [("heir.block_table = [*new[:full], old[full]]", "pass")]),
    "an heir takes the last block, too": (lockstep, [("[*new[:full], old[full]]", "new.copy()")]),
    "an heir's full blocks are not retained": (
        lockstep,
        [("for block in new[same:full]:\n        pool.retain(block)", "pass")],
    ),
    "an heir's old blocks are not released": (
        lockstep,
        [("for block in reversed(old[same:full]):\n        pool.release(block)", "pass")],
    ),
    "an heir shares a table": (lockstep, [("heir.block_table = new.copy()", "heir.block_table = new")]),
    "parked beams take over blocks that differ": (lockstep, [("if ours[span] != theirs[span]:", "if False:")]),
    "parked beams own nothing": (lockstep, [("for block in seq.block_table:\n        pool.retain(block)", "pass")]),
    "parked beams are forgotten": (lockstep, [("successor = parked.pop(0)", "successor = None")]),
    "the watermark is kept when nothing runs": (
        scheduler,
        [("self.watermark if self._running else 0", "self.watermark")],
    ),
    "prefill before decode": (
        scheduler,
        [
            ("            if todo == 1:", "            if todo > 1:"),
            ("self._place(seq, 1, draft)", "self._place(seq, min(todo, draft.tokens), draft)"),
        ],
    ),
    "finish forgets a block": (scheduler, [("reversed(seq.block_table)", "reversed(seq.block_table[1:])")]),
    "evicted contents can still be found": (
        blocks,
        [("del self._block_of[self._hash_of.pop(block)]", "self._hash_of.pop(block)")],
    ),
    "what was overwritten is taken for computed": (
        scheduler,
        [("seq.num_computed -= seq.num_computed % self.pool.block_size", "pass")],
    ),
    "a revived block can be evicted": (blocks, [("del self._cached[block]", "pass")]),
    "a cached block is handed out as empty": (
        blocks,
        [("if block in self._hash_of:\n                self._cached", "if False:\n                self._cached")],
    ),
}


def with_fault(name: str) -> tuple[type[BlockPool], type[Scheduler]]:
    """Both classes, one of them made from its source with the fault in it."""
    module, edits = FAULTS[name]
    source = inspect.getsource(module)
    for right, wrong in edits:
        assert source.count(right) == 1, f"the code has changed, adapt the fault: {right!r}"
        source = source.replace(right, wrong)
    namespace: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    if module is lockstep:
        using: dict[str, Any] = {"__name__": scheduler.__name__}
        exec(compile(inspect.getsource(scheduler), f"<over {name}>", "exec"), using)
        using.update({k: namespace[k] for k in ("Parked", "take_over", "inherit", "branch_blocks")})
        return BlockPool, using["Scheduler"]
    return namespace.get("BlockPool", BlockPool), namespace.get("Scheduler", Scheduler)


FAULT_LOADS = [
    "tight", "beams", "tiny", "old prefills, young beams", "priorities", "whole pool", "tight searches",
    "tight searches, no cache", "searches and samples", "tight searches ahead",
]  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str) -> None:
    pool_type, scheduler_type = with_fault(name)
    with pytest.raises((AssertionError, KeyError, IndexError, RuntimeError)):
        for seed in range(4):
            for load in FAULT_LOADS:
                play(LOADS[load], seed, 150, pool_type, scheduler_type)
