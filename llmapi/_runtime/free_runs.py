"""FreeRuns: the maximal runs of consecutive free ids in ``range(size)``.

Invariants: runs neither overlap nor touch; each run sits in exactly one bucket, that of its length's bit length; a
bucket's bit is set in the mask exactly when it holds a run. Every operation takes constant time: a run is found from
either of its ends, and one of the longest (within a factor of two) from the mask.
"""

from __future__ import annotations


class FreeRuns:
    """A set of free ids that knows how they lie next to each other; all of them are free at first."""

    def __init__(self, size: int) -> None:
        self._length: dict[int, int] = {}  # start of a run -> its length
        self._start: dict[int, int] = {}  # end of a run (exclusive) -> its start
        self._buckets: list[dict[int, None]] = [{} for _ in range(size.bit_length() + 1)]
        self._mask = 0
        if size:
            self._insert(0, size)

    def __bool__(self) -> bool:
        return self._mask != 0

    def add(self, item: int) -> None:
        """Make ``item`` free; it joins the runs that touch it."""
        start, end = item, item + 1
        if item in self._start:
            start = self._start[item]
            self._remove(start)
        if end in self._length:
            end += self._remove(end)
        self._insert(start, end - start)

    def starts_at(self, item: int) -> bool:
        """Whether ``item`` is the first of a run. A free id right after one that is not free always is."""
        return item in self._length

    def roomiest(self) -> tuple[int, int]:
        """Start and length of a run at least half as long as the longest; there must be a run."""
        bucket = self._buckets[self._mask.bit_length() - 1]
        start, _ = bucket.popitem()  # the last one: constant time, where peeking at the first is not
        bucket[start] = None
        return start, self._length[start]

    def lowest(self) -> tuple[int, int]:
        """Start and length of the first run; there must be one. Time grows with the number of runs."""
        start = min(self._length)
        return start, self._length[start]

    def take(self, start: int, item: int) -> None:
        """Take ``item`` out of the run that begins at ``start``."""
        end = start + self._remove(start)
        assert start <= item < end, f"{item} is not in the run [{start}, {end})"
        if start < item:
            self._insert(start, item - start)
        if item + 1 < end:
            self._insert(item + 1, end - item - 1)

    def items(self) -> list[int]:
        """Every free id, ascending; asserts the invariants. For tests: time grows with the size."""
        found: list[int] = []
        last_end = -1
        for start, length in sorted(self._length.items()):
            assert start > last_end, f"runs overlap or touch at {start}"
            assert length > 0 and self._start[start + length] == start, f"run at {start} has a wrong end"
            assert start in self._buckets[length.bit_length()], f"run at {start} is in the wrong bucket"
            last_end = start + length
            found.extend(range(start, last_end))
        assert len(self._start) == len(self._length) == sum(map(len, self._buckets)), "a run is known at one end only"
        assert self._mask == sum(1 << i for i, bucket in enumerate(self._buckets) if bucket), "the mask is stale"
        return found

    def _insert(self, start: int, length: int) -> None:
        size_class = length.bit_length()
        self._length[start] = length
        self._start[start + length] = start
        self._buckets[size_class][start] = None
        self._mask |= 1 << size_class

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start[start + length]
        size_class = length.bit_length()
        bucket = self._buckets[size_class]
        del bucket[start]
        if not bucket:
            self._mask ^= 1 << size_class
        return length
