"""BlockPool: who owns which KV block, in plain ints.

Invariants, asserted by :meth:`BlockPool.check` after every operation of the randomized tests:
    - Each block is either live (its count is the number of its owners, at least one) or free (count zero), never both;
      free + live = ``num_blocks``.
    - A free block is either empty (no hash) or cached (its contents can still be found by hash).
    - A hash names at most one block, and a block has at most one hash.
    - A block that has a hash is full and is never written again until :meth:`allocate` has taken the hash away.

Every operation takes constant time (with ``spare``, on average). The pool moves no data: it never sees the KV memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmapi._runtime.free_runs import FreeRuns

_ROOT = bytes(16)


def block_hash(parent: bytes | None, token_ids: Sequence[int], salt: bytes = b"") -> bytes:
    """Name the contents of a full block: its own tokens and, through ``parent``, every token before them.

    Args:
        parent: hash of the block before it; None for the first block of a sequence.
        token_ids: the tokens of this block, each from 0 to 2**31 - 1.
        salt: whatever else the KV values depend on. Different salts never share blocks.

    The parts are framed (16 bytes, a count, 4 bytes a token, the rest), so that no two inputs spell the same bytes.
    """
    digest = hashlib.blake2b(parent or _ROOT, digest_size=16)
    digest.update(len(token_ids).to_bytes(4, "little"))
    digest.update(array("i", token_ids).tobytes())
    digest.update(salt)
    return digest.digest()


@dataclass(slots=True)
class CacheStats:
    """What prefix reuse has done so far, in blocks.

    Attributes:
        queries: full blocks of admitted sequences that might have been found (counted by the scheduler on admission,
            so that a sequence which has to wait is counted once).
        hits: how many of them were found.
        evictions: cached blocks that lost their contents to make room.
    """

    queries: int = 0
    hits: int = 0
    evictions: int = 0


class BlockPool:
    """Hands out ``num_blocks`` KV blocks of ``block_size`` tokens and counts their owners.

    Placement is a preference, never a promise: a sequence's blocks mostly lie in one physical run, which attention on a
    CPU reads without gathering.
        - ``allocate(after=b)`` takes ``b + 1`` when that is empty.
        - Otherwise a place with room to grow: inside one of the longest runs of empty blocks, at its middle when
          the block before the run is live (its owner may want to grow on), else at its start.
        - A cached block is taken only when no block is empty, the least recently used first.

    A pool full of cached blocks has no runs left, only the holes that partial blocks leave. ``spare`` is the share of
    the pool that is kept empty for the sake of runs, by evicting early whenever a new place is sought. On a GPU, which
    gathers anyway, leave it at 0.

    ``compact`` places blocks as low as possible instead: for a cache whose blocks are whole sequences, which never grow
    into a second one and are read as one window from the lowest to the highest.

    Attributes:
        counts: by block, how many owners it has; only to be read.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        spare: float = 0.0,
        compact: bool = False,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs a block and a token: num_blocks={num_blocks}, block_size={block_size}")
        if not 0 <= spare <= 1:
            raise ValueError(f"spare={spare} is a share of the pool: give a number in [0, 1]")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = CacheStats()
        self.counts = [0] * num_blocks
        self._empty = FreeRuns(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with a hash; least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._num_free = num_blocks
        self._compact = compact
        self._min_empty = max(1, int(spare * num_blocks))

    @property
    def num_free(self) -> int:
        """How many blocks :meth:`allocate` can still hand out: the empty and the cached ones."""
        return self._num_free

    def count(self, block: int) -> int:
        """How many owners ``block`` has; 0 when it is free."""
        return self.counts[block]

    def hash_of(self, block: int) -> bytes | None:
        """The hash under which ``block`` can be found, if any."""
        return self._hash_of.get(block)

    def allocate(self, after: int | None = None) -> int:
        """Hand out a free block with one owner, the caller; what it held before is lost.

        Args:
            after: a live block of the same owner; the block right after it is preferred. None asks for a place with
                room to grow.

        Raises:
            RuntimeError: no block is free. Callers look at :attr:`num_free` first.
        """
        if not self._num_free:
            raise RuntimeError(f"all {self.num_blocks} KV blocks are in use")
        if after is not None and self._empty.starts_at(after + 1):
            block = after + 1
            self._empty.take(block, block)
        else:
            while self._cached and self._num_free - len(self._cached) < self._min_empty:
                self._evict()
            start, length = self._empty.lowest() if self._compact else self._empty.roomiest()
            at_start = self._compact or start == 0 or not self.counts[start - 1]
            block = start if at_start else start + length // 2
            self._empty.take(start, block)
        self.counts[block] = 1
        self._num_free -= 1
        return block

    def retain(self, block: int) -> None:
        """Add an owner to a live block, or revive a cached one just found by :meth:`lookup`."""
        count = self.counts[block]
        if not count:
            assert block in self._hash_of, f"block {block} is empty: there is nothing to share"
            del self._cached[block]
            self._num_free -= 1
        self.counts[block] = count + 1

    def release(self, block: int) -> None:
        """Take an owner away; without one the block is free, and stays findable while it has a hash.

        Release a sequence's blocks last one first: of two blocks released, the earlier released is evicted first, and a
        block is of no use without those before it.
        """
        count = self.counts[block] - 1
        assert count >= 0, f"block {block} has no owner left to release it"
        self.counts[block] = count
        if not count:
            self._num_free += 1
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._empty.add(block)

    def register(self, block: int, digest: bytes) -> None:
        """Let others find the live, full ``block`` by the hash of its contents.

        Where another block already holds the same contents, that one stays the one to be found. Does nothing when
        prefix caching is off.
        """
        if not self.enable_prefix_caching or digest in self._block_of:
            return
        assert self.counts[block], f"block {block} is free: only its owner may register it"
        assert block not in self._hash_of, f"block {block} is registered already, under another hash"
        self._block_of[digest] = block
        self._hash_of[block] = digest

    def lookup(self, digest: bytes) -> int | None:
        """Return the block, live or cached, that holds these contents.

        It only looks: no count changes and no place in the order of eviction, so that a caller can see what it would
        get before deciding. To keep the block, :meth:`retain` it before anything is allocated.
        """
        return self._block_of.get(digest)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert the invariants at the top of this module; ``owners`` are the block tables of all owners. For tests."""
        expected = Counter(block for table in owners for block in table)
        for block, count in enumerate(self.counts):
            assert count == expected[block], f"block {block} is counted {count} times, owned {expected[block]} times"
        live = {block for block, count in enumerate(self.counts) if count}
        empty, cached = set(self._empty.items()), set(self._cached)
        assert not live & empty and not live & cached, f"free and live: {sorted(live & (empty | cached))}"
        assert not empty & cached, f"empty and cached: {sorted(empty & cached)}"
        assert len(live) + len(empty) + len(cached) == self.num_blocks, "a block is neither free nor live"
        assert self._num_free == len(empty) + len(cached), f"{self._num_free=} but {len(empty)=} {len(cached)=}"
        assert self._hash_of == {block: digest for digest, block in self._block_of.items()}, "hashes are not one to one"
        assert len(self._hash_of) == len(self._block_of), "two hashes name one block"
        assert cached == set(self._hash_of) - live, "a free block with a hash is not cached, or the other way round"

    def _evict(self) -> None:
        """Empty the least recently used cached block."""
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        self._empty.add(block)
        self.stats.evictions += 1
