"""Scheduler: one test for each sentence of its policy. The randomized test is next door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmapi._runtime.blocks import BlockPool
from llmapi._runtime.request import Request, Sequence, Status
from llmapi._runtime.scheduler import Scheduler, StepPlan
from llmapi._runtime.waiting import WaitingQueue
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams


def make(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    caching: bool = True,
    max_num_tokens: int = 64,
    max_batch_size: int = 8,
    max_seq_len: int = 1000,
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size, enable_prefix_caching=caching)
    return Scheduler(pool, max_num_tokens=max_num_tokens, max_batch_size=max_batch_size, max_seq_len=max_seq_len)


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def request(prompt: list[int], *, priority: int = 0, params: SamplingParams | None = None) -> Sequence:
    params = params or SamplingParams()
    metrics = RequestMetrics(arrival_time=0.0)
    return Request("r", None, prompt, params, 0, 100, frozenset(), metrics, priority).sequences[0]


def sibling(seq: Sequence) -> Sequence:
    child = Sequence(seq.request, len(seq.request.sequences), seq.token_ids.copy(), seq.num_prompt)
    seq.request.sequences.append(child)
    return child


def add(scheduler: Scheduler, *prompts: int) -> list[Sequence]:
    """Add sequences with prompts of these lengths that have no token in common."""
    seqs = [request(tokens(count, 1000 * i)) for i, count in enumerate(prompts)]
    for seq in seqs:
        scheduler.add(seq)
    return seqs


def step(scheduler: Scheduler) -> StepPlan:
    """Run one step and append a token wherever logits came out."""
    plan = scheduler.schedule()
    assert plan is not None
    producing = [entry.seq for entry in plan.entries if entry.produces_logits]
    scheduler.commit(plan)
    for seq in producing:
        seq.token_ids.append(7)
    scheduler.pool.check(seq.block_table for seq in scheduler.running)
    return plan


def shape(plan: StepPlan) -> list[tuple[Sequence, int, int]]:
    return [(entry.seq, entry.start, entry.count) for entry in plan.entries]


def steps(scheduler: Scheduler) -> Iterator[StepPlan]:
    while scheduler.has_work:
        yield step(scheduler)


def test_prefill_then_decode() -> None:
    scheduler = make()
    (seq,) = add(scheduler, 10)
    assert shape(step(scheduler)) == [(seq, 0, 10)]
    assert len(seq.token_ids) == 11 and seq.num_computed == 10 and seq.status is Status.RUNNING
    assert shape(step(scheduler)) == [(seq, 10, 1)]
    scheduler.finish(seq)
    assert not scheduler.has_work and scheduler.schedule() is None and scheduler.pool.num_free == 64
    assert seq.status is Status.FINISHED and not seq.block_table and seq.num_computed == 0


def test_decode_comes_first_then_prefill_in_chunks_then_new_ones() -> None:
    scheduler = make(max_num_tokens=8)
    old, long, new = add(scheduler, 4, 20, 2)
    assert shape(step(scheduler)) == [(old, 0, 4), (long, 0, 4)]
    assert shape(step(scheduler)) == [(old, 4, 1), (long, 4, 7)]
    assert shape(step(scheduler)) == [(old, 5, 1), (long, 11, 7)]
    plan = step(scheduler)
    assert shape(plan) == [(old, 6, 1), (long, 18, 2), (new, 0, 2)] and plan.num_tokens == 5
    assert shape(step(scheduler)) == [(old, 7, 1), (long, 20, 1), (new, 2, 1)]


def test_logits_come_out_where_the_last_token_is_computed() -> None:
    scheduler = make(max_num_tokens=8)
    seqs = add(scheduler, 5, 10)
    seen = []
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        producing = [entry.seq for entry in plan.entries if entry.produces_logits]
        seen.append([seqs.index(seq) for seq in producing])
        scheduler.commit(plan)
        for seq in producing:
            seq.token_ids.append(7)
    assert seen == [[0], [0, 1], [0, 1]]


def test_decode_goes_before_an_older_prefill() -> None:
    scheduler = make(max_num_tokens=4)
    (young,) = add(scheduler, 2)
    step(scheduler)
    first = request(tokens(9), priority=-1)
    scheduler.add(first)
    assert shape(step(scheduler)) == [(young, 2, 1), (first, 0, 3)]
    assert scheduler.running == [first, young]
    assert shape(step(scheduler)) == [(young, 3, 1), (first, 3, 3)]


def test_blocks_are_taken_as_tokens_need_them() -> None:
    scheduler = make(max_num_tokens=6)
    (seq,) = add(scheduler, 13)
    held = []
    for _ in range(8):
        step(scheduler)
        held.append(len(seq.block_table))
    assert held == [2, 3, 4, 4, 4, 4, 5, 5]
    assert seq.block_table == [0, 1, 2, 3, 4]


def test_batch_size_limits_admission() -> None:
    scheduler = make(max_batch_size=2)
    a, b, c = add(scheduler, 3, 3, 3)
    assert [entry.seq for entry in step(scheduler).entries] == [a, b]
    assert scheduler.waiting == [c]
    scheduler.finish(a)
    assert [entry.seq for entry in step(scheduler).entries] == [b, c]


def test_admission_is_by_priority_then_arrival() -> None:
    scheduler = make(max_batch_size=1)
    low, mid, late, high = (request([i], priority=p) for i, p in enumerate([5, 3, 3, 1]))
    for seq in (low, mid, late, high):
        scheduler.add(seq)
    assert scheduler.waiting == [high, mid, late, low]
    for seq in (high, mid, late, low):
        assert [entry.seq for entry in step(scheduler).entries] == [seq]
        scheduler.finish(seq)


def test_the_first_that_must_wait_makes_all_behind_it_wait() -> None:
    scheduler = make(num_blocks=8)
    running, big, small = add(scheduler, 12, 20, 1)
    assert [entry.seq for entry in step(scheduler).entries] == [running]
    for _ in range(3):
        assert [entry.seq for entry in step(scheduler).entries] == [running]
    assert scheduler.waiting == [big, small]
    scheduler.finish(running)
    assert [entry.seq for entry in step(scheduler).entries] == [big, small]


def test_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    scheduler = make(num_blocks=8, caching=False)
    assert scheduler.watermark == 1 and make(num_blocks=640).watermark == 10
    alone, other = add(scheduler, 16, 16)
    step(scheduler)
    assert scheduler.waiting == [other]  # it would take the last of 8 blocks
    scheduler.finish(alone)
    (full,) = add(scheduler, 32)
    step(scheduler)
    assert scheduler.running == [other] and scheduler.waiting == [full]
    scheduler.finish(other)
    assert shape(step(scheduler)) == [(full, 0, 32)]


def test_a_prompt_is_admitted_only_when_all_of_it_fits() -> None:
    scheduler = make(num_blocks=8, max_num_tokens=4)
    first, second = add(scheduler, 8, 24)
    step(scheduler)
    step(scheduler)
    assert scheduler.running == [first] and scheduler.waiting == [second]


def test_the_youngest_is_preempted_and_waits_in_front() -> None:
    scheduler = make(num_blocks=7, caching=False)
    a, b, c = add(scheduler, 8, 8, 1)
    step(scheduler)
    assert scheduler.running == [a, b, c] and scheduler.pool.num_free == 2
    (late,) = add(scheduler, 1)
    assert step(scheduler).preempted == []  # a and b begin a new block each; late does not fit the watermark
    assert scheduler.pool.num_free == 0
    step(scheduler)
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == [c] and c.preemptions == 1  # c needs its second block and is itself the youngest
    assert [entry.seq for entry in plan.entries] == [a, b]
    assert c.status is Status.WAITING and c.num_computed == 0 and not c.block_table and not c.block_hashes
    assert scheduler.waiting == [c, late] and len(c.token_ids) == 5
    plan = step(scheduler)  # now a takes the block c gave up, and b gives way
    assert plan.preempted == [b] and scheduler.waiting == [b, c, late]
    scheduler.finish(a)
    assert shape(step(scheduler)) == [(b, 0, 13), (c, 0, 5)] and scheduler.waiting == [late]


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = make(num_blocks=6, caching=False)
    a, b = add(scheduler, 11, 11)
    step(scheduler)  # the watermark holds b back
    assert scheduler.running == [a]
    (c,) = add(scheduler, 1)
    assert scheduler.waiting == [b, c]
    scheduler.finish(b)
    step(scheduler)
    assert scheduler.running == [a, c]
    for _ in range(40):
        plan = step(scheduler)
        if plan.preempted:
            assert plan.preempted == [c] and [entry.seq for entry in plan.entries] == [a]
            break
    else:
        pytest.fail("nothing was preempted")


def test_an_older_prefill_takes_back_what_the_step_gave_a_younger_decode() -> None:
    scheduler = make(num_blocks=7, max_num_tokens=2, caching=False)
    (young,) = add(scheduler, 2)
    step(scheduler)
    old = request(tokens(16, 500), priority=-1)
    scheduler.add(old)
    while not young.preemptions:
        before = young.num_computed
        plan = step(scheduler)
    assert before % 4 != 0  # young needed no block: it was planned first, and taken out for old's sake
    assert plan.preempted == [young] and shape(plan) == [(old, 12, 1)] and scheduler.waiting == [young]


def test_a_sequence_too_large_for_the_pool_is_an_internal_error() -> None:
    scheduler = make(num_blocks=2)
    assert scheduler.capacity_tokens == 8 and scheduler.fits(8) and not scheduler.fits(9)
    (seq,) = add(scheduler, 8)
    step(scheduler)
    with pytest.raises(RuntimeError, match="internal error: a sequence of 9 tokens, alone"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="do not fit"):
        add(scheduler, 9)
    assert make(max_seq_len=5).capacity_tokens == 5
    assert seq.status is Status.RUNNING


def test_prefix_reuse() -> None:
    scheduler = make(block_size=4)
    first = request(tokens(10))
    scheduler.add(first)
    step(scheduler)
    second, other = request([*tokens(8), 99, 98]), request([*tokens(4), 97, *tokens(5, 5)])
    scheduler.add(second)
    scheduler.add(other)
    assert shape(step(scheduler)) == [(first, 10, 1), (second, 8, 2), (other, 4, 6)]
    assert second.num_cached == 8 and second.block_table[:2] == first.block_table[:2]
    assert other.num_cached == 4 and other.block_table[0] == first.block_table[0]
    assert scheduler.pool.count(first.block_table[0]) == 3
    assert scheduler.pool.stats.queries == 6 and scheduler.pool.stats.hits == 3
    for seq in (first, second, other):
        scheduler.finish(seq)
    third = request(tokens(10))
    scheduler.add(third)
    assert shape(step(scheduler)) == [(third, 8, 2)]  # found after its owners ended


def test_prefix_reuse_leaves_a_token_to_compute() -> None:
    scheduler = make(block_size=4)
    for count, start in [(8, 0), (8, 4), (9, 8), (4, 0), (5, 4)]:
        seq = request(tokens(count))
        scheduler.add(seq)
        assert shape(step(scheduler)) == [(seq, start, count - start)]
        scheduler.finish(seq)


def test_generated_blocks_are_reused_too() -> None:
    scheduler = make(block_size=4)
    (seq,) = add(scheduler, 3)
    for _ in range(6):
        step(scheduler)
    chat = request([*seq.token_ids, 1, 2])
    scheduler.finish(seq)
    scheduler.add(chat)
    assert shape(step(scheduler)) == [(chat, 8, 3)]


def test_prompt_logits_want_the_whole_prompt_computed() -> None:
    scheduler = make(block_size=4)
    for _ in range(2):
        seq = request(tokens(10), params=SamplingParams(prompt_logprobs=0))
        scheduler.add(seq)
        assert shape(step(scheduler)) == [(seq, 0, 10)] and seq.num_cached == 0
        scheduler.finish(seq)
    assert scheduler.pool.stats.queries == 0


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=7)
    a, b = add(scheduler, 11, 8)
    while not b.preemptions:
        step(scheduler)
    assert scheduler.running == [a]
    scheduler.finish(a)
    plan = step(scheduler)
    assert shape(plan) == [(b, 12, 1)] and len(b.token_ids) == 14 and b.num_cached == 0


def test_reviving_a_cached_prefix_counts_as_taking_blocks() -> None:
    scheduler = make(num_blocks=8)
    (gone,) = add(scheduler, 16)
    step(scheduler)
    scheduler.finish(gone)
    running = request(tokens(14, 500))
    scheduler.add(running)
    step(scheduler)
    again = request([*gone.token_ids[:16], 3])
    scheduler.add(again)  # 4 cached blocks, all free, and one more: leaves less than the watermark
    assert [entry.seq for entry in step(scheduler).entries] == [running]
    assert scheduler.pool.stats.queries == 4 + 3 - 1 and again.num_computed == 0


def test_forks_copy_the_tail_all_but_once() -> None:
    scheduler = make(caching=False)
    (seq,) = add(scheduler, 10)
    step(scheduler)
    children = [sibling(seq) for _ in range(3)]
    for child in children:
        scheduler.fork(seq, child)
    free = scheduler.pool.num_free
    tail = seq.block_table[2]
    assert all(child.block_table == seq.block_table for child in children) and scheduler.pool.count(tail) == 4
    plan = step(scheduler)
    assert [source for source, _ in plan.copies] == [tail] * 3
    assert sorted(s.block_table[2] for s in scheduler.running) == sorted([tail, *(t for _, t in plan.copies)])
    assert all(s.block_table[:2] == seq.block_table[:2] for s in scheduler.running)
    assert scheduler.pool.num_free == free - 3
    assert step(scheduler).copies == []


def test_forks_at_a_block_boundary_copy_nothing() -> None:
    scheduler = make()
    (seq,) = add(scheduler, 8)
    step(scheduler)
    child = sibling(seq)
    scheduler.fork(seq, child)
    plan = step(scheduler)
    assert plan.copies == [] and len(plan.entries) == 2
    assert seq.block_table[:2] == child.block_table[:2] and seq.block_table[2] != child.block_table[2]
    assert child.block_hashes == seq.block_hashes and child.arrival == seq.arrival


def test_a_fork_whose_parent_ends_writes_in_place() -> None:
    scheduler = make()
    (seq,) = add(scheduler, 6)
    step(scheduler)
    child = sibling(seq)
    scheduler.fork(seq, child)
    table = seq.block_table
    scheduler.finish(seq)
    assert step(scheduler).copies == [] and child.block_table == table


def test_a_fork_of_a_waiting_sequence_waits() -> None:
    scheduler = make()
    (seq,) = add(scheduler, 6)
    child = sibling(seq)
    scheduler.fork(seq, child)
    assert scheduler.waiting == [seq, child]
    assert shape(step(scheduler)) == [(seq, 0, 6), (child, 0, 6)]


def test_forks_beyond_the_batch_size_take_turns() -> None:
    scheduler = make(max_batch_size=2)
    (seq,) = add(scheduler, 3)
    step(scheduler)
    for _ in range(4):
        scheduler.fork(seq, sibling(seq))
    seqs = seq.request.sequences
    assert [entry.seq for entry in step(scheduler).entries] == seqs[:2]
    scheduler.finish(seqs[0])
    assert [entry.seq for entry in step(scheduler).entries] == seqs[1:3]
    (other,) = add(scheduler, 3)
    step(scheduler)
    assert scheduler.waiting == [other]


def test_a_copy_keeps_its_source_when_the_last_owner_is_preempted() -> None:
    """A block that a planned copy reads is not handed out again in the same step."""
    scheduler = make(num_blocks=5, caching=False)
    (old,) = add(scheduler, 4)
    step(scheduler)
    seq = request(tokens(6, 100))
    scheduler.add(seq)
    plan = scheduler.schedule()
    assert plan is not None and len(plan.entries) == 2
    scheduler.commit(plan)
    child = sibling(seq)
    scheduler.fork(seq, child)
    for each in (old, seq, child):
        each.token_ids += [1] * (4 if each is old else 1)
    # One block is free. seq takes it as its copy of the tail, and child becomes the tail's only owner. Then old, in
    # prefill, needs a block: child gives up its own, but that is still to be read, so seq has to go too.
    tail = seq.block_table[1]
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.preempted == [child, seq] and plan.copies == [] and shape(plan) == [(old, 5, 4)]
    assert scheduler.pool.count(tail) == (tail in old.block_table)
    scheduler.pool.check([old.block_table])


def test_a_sequence_without_its_next_token_sits_out() -> None:
    scheduler = make()
    (seq,) = add(scheduler, 3)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan)
    assert scheduler.schedule() is None and scheduler.has_work
    seq.token_ids.append(1)
    assert scheduler.schedule() is not None


def test_finishing_waiting_running_and_finished_sequences() -> None:
    scheduler = make(max_batch_size=1)
    running, waiting, last = add(scheduler, 3, 3, 3)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.finish(waiting)
    scheduler.finish(running)  # between schedule and commit: an abort while the step runs
    scheduler.finish(running)
    scheduler.commit(plan)
    assert running.num_computed == 0 and scheduler.pool.num_free == 64
    assert scheduler.waiting == [last]
    step(scheduler)
    scheduler.finish(last)
    assert not scheduler.has_work


def test_misuse_is_caught() -> None:
    scheduler = make()
    (seq,) = add(scheduler, 3)
    with pytest.raises(AssertionError, match="waits already"):
        scheduler.add(seq)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan)
    with pytest.raises(AssertionError, match="committed twice"):
        scheduler.commit(plan)
    with pytest.raises(AssertionError, match="added before"):
        scheduler.add(seq)
    scheduler.finish(seq)
    with pytest.raises(AssertionError, match="fork first"):
        scheduler.fork(seq, sibling(seq))
    with pytest.raises(ValueError, match="limits start at 1"):
        make(max_num_tokens=0)


def test_waiting_queue_orders_by_age_and_forgets() -> None:
    queue = WaitingQueue()
    seqs = [request([1], priority=p) for p in (2, 1, 2, 0)]
    for seq in seqs:
        queue.push(seq)
    assert queue.items() == [seqs[3], seqs[1], seqs[0], seqs[2]]
    queue.discard(seqs[3])
    assert queue.first() is seqs[1] and seqs[3] not in queue and len(queue) == 3
    assert [queue.pop() for _ in range(3)] == [seqs[1], seqs[0], seqs[2]]
    assert queue.first() is None
