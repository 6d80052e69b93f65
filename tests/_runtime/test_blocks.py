"""BlockPool: counts, placement, prefix cache; each operation of a random run is followed by the invariant check."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from llmapi._runtime.blocks import BlockPool, block_hash
from llmapi._runtime.free_runs import FreeRuns


def take(pool: BlockPool, count: int) -> list[int]:
    """Allocate a sequence of ``count`` blocks, each after the one before."""
    table: list[int] = []
    for _ in range(count):
        table.append(pool.allocate(table[-1] if table else None))
    return table


def cache(pool: BlockPool, table: list[int], name: str) -> list[bytes]:
    """Register every block of ``table`` under hashes of ``name`` and release them, last one first."""
    digests = [f"{name}{i}".encode() for i in range(len(table))]
    for block, digest in zip(table, digests, strict=True):
        pool.register(block, digest)
    for block in reversed(table):
        pool.release(block)
    return digests


def test_blocks_of_one_sequence_are_contiguous() -> None:
    pool = BlockPool(100, 16)
    assert take(pool, 40) == list(range(40))


def test_sequences_that_grow_together_stay_contiguous() -> None:
    pool = BlockPool(256, 16)
    tables = [take(pool, 2) for _ in range(16)]
    for _ in range(6):
        for table in tables:
            table.append(pool.allocate(table[-1]))
    pool.check(tables)
    for table in tables:
        assert table == list(range(table[0], table[0] + 8))


def test_contiguity_is_only_a_preference() -> None:
    pool = BlockPool(8, 16)
    first = take(pool, 3)
    second = take(pool, 2)
    while pool.num_free:
        first.append(pool.allocate(first[-1]))
    assert sorted(first + second) == list(range(8))
    pool.check([first, second])
    with pytest.raises(RuntimeError, match="all 8 KV blocks"):
        pool.allocate()


def test_empty_blocks_are_preferred_over_cached_ones() -> None:
    pool = BlockPool(8, 16)
    old = take(pool, 4)  # 0 1 2 3
    mine = take(pool, 1)
    digests = cache(pool, old[1:], "old")
    # the block after old[0] is cached, and three others are empty
    table = [old[0]] + [pool.allocate(old[0]) for _ in range(3)]
    assert pool.stats.evictions == 0 and all(pool.lookup(d) is not None for d in digests)
    pool.check([table, mine])
    pool.allocate(old[0])
    assert pool.stats.evictions == 1


def test_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(6, 16)
    tables = [take(pool, 2) for _ in range(3)]
    digests = [cache(pool, table, f"s{i}") for i, table in enumerate(tables)]
    assert pool.num_free == 6
    pool.retain(tables[0][0])  # use the first again
    pool.release(tables[0][0])
    order = []
    held = []
    for _ in range(6):
        before = {d for ds in digests for d in ds if pool.lookup(d) is not None}
        held.append(pool.allocate())
        order += [d.decode() for d in before if pool.lookup(d) is None]
        pool.check([held])
    assert order == ["s01", "s11", "s10", "s21", "s20", "s00"]
    assert pool.stats.evictions == 6


def test_spare_keeps_runs_by_evicting_early() -> None:
    for spare, evictions in ((0.0, 10), (0.25, 25)):
        pool = BlockPool(100, 16, spare=spare)
        digests = cache(pool, take(pool, 100), "old")
        table = take(pool, 10)
        pool.check([table])
        assert pool.stats.evictions == evictions
        assert [pool.lookup(d) for d in digests[: 100 - evictions]] == list(range(100 - evictions))
        if spare:
            assert table == list(range(table[0], table[0] + 10))
    with pytest.raises(ValueError, match="a share of the pool"):
        BlockPool(4, 16, spare=2)


def test_counts() -> None:
    pool = BlockPool(4, 16)
    block = pool.allocate()
    pool.retain(block)
    assert pool.count(block) == 2 and pool.num_free == 3
    pool.release(block)
    assert pool.num_free == 3
    pool.release(block)
    assert pool.count(block) == 0 and pool.num_free == 4
    with pytest.raises(AssertionError, match="no owner left"):
        pool.release(block)
    with pytest.raises(AssertionError, match="nothing to share"):
        pool.retain(block)


def test_lookup_only_looks_and_retain_revives() -> None:
    pool = BlockPool(4, 16)
    block = pool.allocate()
    pool.register(block, b"h")
    assert pool.lookup(b"h") == block and pool.count(block) == 1
    pool.release(block)
    assert pool.lookup(b"h") == block and pool.count(block) == 0 and pool.num_free == 4
    pool.retain(block)
    assert pool.count(block) == 1 and pool.num_free == 3 and pool.hash_of(block) == b"h"
    assert pool.lookup(b"other") is None
    pool.check([[block]])


def test_the_first_block_registered_under_a_hash_stays_the_one() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"h")
    pool.register(first, b"h")
    pool.register(second, b"h")
    assert pool.lookup(b"h") == first and pool.hash_of(second) is None
    with pytest.raises(AssertionError, match="another hash"):
        pool.register(first, b"g")
    pool.release(second)
    with pytest.raises(AssertionError, match="is free"):
        pool.register(second, b"g")
    pool.check([[first]])


def test_prefix_caching_can_be_off() -> None:
    pool = BlockPool(4, 16, enable_prefix_caching=False)
    block = pool.allocate()
    pool.register(block, b"h")
    assert pool.lookup(b"h") is None
    pool.release(block)
    pool.check([])


def test_a_hash_names_everything_up_to_the_block() -> None:
    root = block_hash(None, [1, 2])
    assert len(root) == 16 and root == block_hash(None, (1, 2), b"")
    others = [
        block_hash(None, [1, 3]),
        block_hash(None, [2, 1]),
        block_hash(None, [1, 2], b"salt"),
        block_hash(None, [1], (2).to_bytes(4, "little")),
        block_hash(root, [1, 2]),
        block_hash(block_hash(None, [1, 3]), [1, 2]),
    ]
    assert len({root, *others}) == 7


@pytest.mark.parametrize("bad", [(0, 16), (4, 0), (-1, 1)])
def test_sizes_start_at_one(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a pool needs"):
        BlockPool(*bad)


def test_check_names_each_fault() -> None:
    def broken(attribute: str, change: object) -> None:
        pool = BlockPool(8, 16)
        table = take(pool, 2)
        cached = pool.allocate(table[-1])
        pool.register(cached, b"h")
        pool.release(cached)
        pool.check([table])
        change(getattr(pool, attribute))  # type: ignore[operator]
        with pytest.raises(AssertionError):
            pool.check([table])

    broken("counts", lambda counts: counts.__setitem__(0, 2))
    broken("counts", lambda counts: counts.__setitem__(7, 1))
    broken("_cached", lambda cached: cached.clear())
    broken("_cached", lambda cached: cached.__setitem__(0, None))
    broken("_empty", lambda runs: runs.add(0))
    broken("_empty", lambda runs: runs.take(3, 5))
    broken("_block_of", lambda blocks: blocks.__setitem__(b"g", 2))
    broken("_hash_of", lambda hashes: hashes.__setitem__(0, b"h"))
    pool = BlockPool(2, 16)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="owned 2 times"):
        pool.check([[block], [block]])


@pytest.mark.parametrize("seed", range(4))
def test_free_runs_equal_a_set(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, 2, 7, 64])
    runs, free = FreeRuns(size), set(range(size))
    for _ in range(3000):
        if free and rng.random() < 0.5:
            start, length = runs.roomiest()
            assert free.issuperset(range(start, start + length))
            longest = max(len(r) for r in "".join("x" if i in free else " " for i in range(size)).split())
            assert 2 * length > longest
            item = rng.randrange(start, start + length)
            runs.take(start, item)
            free.remove(item)
        elif len(free) < size:
            item = rng.choice([i for i in range(size) if i not in free])
            runs.add(item)
            free.add(item)
        assert runs.items() == sorted(free) and bool(runs) == bool(free)
        assert all(runs.starts_at(i) == (i in free and i - 1 not in free) for i in range(size))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("caching", [True, False])
def test_random_operations_keep_the_invariants(seed: int, caching: bool) -> None:
    rng = random.Random(seed)
    spare = rng.choice([0.0, 0.3, 1.0])
    pool = BlockPool(rng.choice([1, 5, 40, 200]), 4, enable_prefix_caching=caching, spare=spare)
    tables: list[list[int]] = []
    digests: list[bytes] = []
    for step in range(2000):
        action = rng.random()
        if action < 0.45 and pool.num_free:
            if not tables or rng.random() < 0.2:
                tables.append([])
            table = rng.choice(tables)
            table.append(pool.allocate(table[-1] if table else None))
        elif action < 0.6 and tables:
            table = rng.choice(tables)
            for block in table:
                if pool.hash_of(block) is None:
                    digests.append(step.to_bytes(4, "little") + block.to_bytes(4, "little"))
                    pool.register(block, digests[-1])
        elif action < 0.7 and tables:
            parent = rng.choice(tables)
            for block in parent:
                pool.retain(block)
            tables.append(parent.copy())
        elif action < 0.8 and digests:
            found = pool.lookup(rng.choice(digests))
            if found is not None:
                pool.retain(found)
                tables.append([found])
        elif tables:
            for block in reversed(tables.pop(rng.randrange(len(tables)))):
                pool.release(block)
        pool.check(tables)
    for table in tables:
        for block in reversed(table):
            pool.release(block)
    pool.check([])
    assert pool.num_free == pool.num_blocks


def test_operations_take_constant_time() -> None:
    """Cost per operation in a pool of 400k blocks is within a small factor of that in one of 4k."""

    def cost(num_blocks: int) -> float:
        pool = BlockPool(num_blocks, 16)
        best = float("inf")
        for i in range(5):
            began = time.process_time()
            for j in range(40):
                table = take(pool, 100)
                for block in table:
                    pool.register(block, f"{i}.{j}.{block}".encode())
                for block in reversed(table):
                    pool.release(block)
            best = min(best, time.process_time() - began)
        return best

    assert cost(400_000) < 8 * cost(4_000)


def test_modules_do_without_torch() -> None:
    code = "import sys, llmapi._runtime.blocks, llmapi._runtime.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_compact_pool_hands_out_the_lowest_blocks() -> None:
    pool = BlockPool(6, 64, compact=True)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    pool.release(1)
    pool.release(3)
    assert [pool.allocate() for _ in range(3)] == [1, 3, 4]
    pool.check([[0], [1], [2], [3], [4]])
