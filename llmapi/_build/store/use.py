"""When an entry was last used, in an order that a clock going backwards cannot break.

Last use is a tick of the store's own clock: the time in nanoseconds, but always at least one more than the tick before,
which the file ``clock`` remembers. Where the system's clock is right, ticks are times; where it jumps back, they still
grow. The times shown to people come from the system's clock as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmapi._build.store import lock as store_lock
from llmapi._build.store.disk import Layout

_LIMIT = 1 << 63  # no honest tick is larger: nanoseconds reach it in the year 2262
_WIDTH = 96  # each record is rewritten in place, which needs no space on a full disk


@dataclass(frozen=True, slots=True)
class Use:
    """How often an entry was opened after its build, the tick of its last use, and the time then (seconds)."""

    hits: int
    tick: int
    time: float


def read_use(folder: Path) -> Use | None:
    """The record in an entry's folder; None where there is none that makes sense."""
    try:
        data = json.loads((folder / "use.json").read_bytes())
        use = Use(data["hits"], data["tick"], data["time"])
        if type(use.hits) is int and type(use.tick) is int and isinstance(use.time, int | float):
            return use if 0 <= use.hits < _LIMIT and 0 <= use.tick < _LIMIT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def first_use(layout: Layout) -> bytes:
    """The record of an entry that is being built."""
    with _ticking(layout) as tick:
        return _dump(Use(0, tick, time.time()))


def touch(layout: Layout, folder: Path) -> None:
    """Count one more use. A root that cannot be written is left as it is: use never fails for its record."""
    with contextlib.suppress(OSError):
        fd = os.open(folder / "use.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            with _ticking(layout) as tick:
                use = read_use(folder)
                data = _dump(Use((use.hits if use else 0) + 1, tick, time.time()))
                os.write(fd, data)
                os.ftruncate(fd, len(data))
        finally:
            os.close(fd)


def _dump(use: Use) -> bytes:
    text = json.dumps({"hits": use.hits, "tick": use.tick, "time": round(use.time, 3)})
    return text.ljust(_WIDTH - 1).encode("ascii") + b"\n"


@contextlib.contextmanager
def _ticking(layout: Layout) -> Iterator[int]:
    """The next tick, with the store's clock locked so that records are written in the order of their ticks."""
    fd = os.open(layout.clock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        store_lock.own_waiting(fd)
        try:
            last = int(os.pread(fd, 32, 0))
        except ValueError:
            last = -1
        if not 0 <= last < _LIMIT - 1:  # new, or damaged: no tick may come before one that is on record
            last = max((use.tick for _, _, f in layout.folders() if (use := read_use(f))), default=0)
        tick = max(time.time_ns(), last + 1)
        os.pwrite(fd, f"{tick:020d}\n".encode(), 0)
        yield tick
    finally:
        os.close(fd)
