"""WaitingQueue: sequences that own no block, oldest first.

Invariants: no sequence is in it twice; :meth:`WaitingQueue.first` is the one with the smallest age; sequences of one
age leave in the order they came.
"""

from __future__ import annotations

import heapq

from llmapi._runtime.request import Sequence


def age(seq: Sequence) -> tuple[int, int, int]:
    """Order in which sequences are served: priority, arrival, position in the request. The largest is the youngest."""
    return seq.request.priority, seq.arrival, seq.index


class WaitingQueue:
    """A queue by :func:`age`; joining and leaving cost the logarithm of its length."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], int, Sequence]] = []  # may still hold sequences that left
        self._members: set[Sequence] = set()
        self._pushes = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._members

    def push(self, seq: Sequence) -> None:
        """Let ``seq`` wait where its age puts it. One that was discarded may not come back."""
        assert seq not in self._members, "it waits already"
        self._pushes += 1
        heapq.heappush(self._heap, (age(seq), self._pushes, seq))
        self._members.add(seq)

    def first(self) -> Sequence | None:
        """Return the oldest, which stays; None when nothing waits."""
        while self._heap and self._heap[0][2] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take the oldest out."""
        seq = self.first()
        assert seq is not None, "nothing waits"
        heapq.heappop(self._heap)
        self._members.remove(seq)
        return seq

    def discard(self, seq: Sequence) -> None:
        """Take ``seq`` out, wherever it stands, if it is there."""
        self._members.discard(seq)
        if not self._members:
            self._heap.clear()

    def items(self) -> list[Sequence]:
        """Everyone who waits, oldest first."""
        return [seq for _, _, seq in sorted(self._heap, key=lambda item: item[:2]) if seq in self._members]
