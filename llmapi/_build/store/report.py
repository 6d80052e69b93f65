"""What a store did since it was opened: the cache's share of a build report."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Counts of what one :class:`Store` object did.

    Attributes:
        hits: entries opened that existed already.
        misses: entries asked for that did not exist or were damaged.
        builds: entries built.
        waits: entries that another process built while this one waited for it; they count as misses too.
        set_aside: damaged entries moved to quarantine.
        evicted: entries deleted to keep the budget.
        evicted_bytes: their size.
        written_bytes: size of the entries built or imported.
        hashed_bytes: bytes read only to check digests when opening entries.
        lines: one readable line for each of these, such as
            ``miss: engine: nearest entry differs in max_batch_size: 8 -> 16``.
    """

    hits: int = 0
    misses: int = 0
    builds: int = 0
    waits: int = 0
    set_aside: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    written_bytes: int = 0
    hashed_bytes: int = 0
    lines: tuple[str, ...] = ()


class Counters:
    """The counts while they grow; threads may share it."""

    def __init__(self) -> None:
        self._report = CacheReport()
        self._lock = threading.Lock()

    def add(self, line: str | None = None, **counts: int) -> None:
        """Add to counts by name, and one line."""
        with self._lock:
            now = self._report
            fields = {name: getattr(now, name) + n for name, n in counts.items()}
            lines = now.lines if line is None else (*now.lines, line)
            self._report = dataclasses.replace(now, lines=lines, **fields)

    @property
    def report(self) -> CacheReport:
        """The counts now."""
        return self._report
