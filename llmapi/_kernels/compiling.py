"""Compiling: machine code of kernels, several on their way at once, ahead of their first use.

NVRTC compiles a unit on one core in 0.1 to 15 s. The threads are daemons: who leaves Python, or interrupts a start,
does not wait for a compiler, and the cache takes no harm.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from llmapi._kernels.nvrtc import Unit

THREADS = max(1, min(16, os.cpu_count() or 1))
FEW = max(1, THREADS // 4)
"""Threads while there is other work: NVRTC holds no lock of Python's, but a core each."""


class Compiling:
    """The units that one device will need.

    Args:
        compile_: gives the machine code of a unit; called by several threads at once.
    """

    def __init__(self, compile_: Callable[[Unit], bytes]) -> None:
        self._compile = compile_
        self._ready: dict[Unit, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def begin(self, units: Iterable[Unit], *, threads: int = THREADS) -> list[Future[bytes]]:
        """Start on units that were not begun yet.

        Args:
            units: in the order in which they are wanted.
            threads: how many may work on these.

        Returns:
            The code of all that were given, as it comes.
        """
        waiting: deque[Unit] = deque()
        with self._lock:
            wanted = list(dict.fromkeys(units))
            for unit in wanted:
                if unit not in self._ready:
                    self._ready[unit] = Future()
                    waiting.append(unit)
            futures = [self._ready[unit] for unit in wanted]
        for _ in range(min(threads, len(waiting))):
            threading.Thread(target=self._work, args=(waiting,), name="llmapi-nvrtc", daemon=True).start()
        return futures

    def take(self, unit: Unit) -> bytes:
        """The code of a unit: what is there, what comes from the thread that is at it, or what is compiled here.

        Raises:
            BuildError: it does not compile.
        """
        with self._lock:
            future = self._ready.pop(unit, None)
        if future is None or future.cancel():  # nobody has begun
            return self._compile(unit)
        return future.result()

    def close(self) -> None:
        """Begin no more."""
        self._closed = True

    def _work(self, waiting: deque[Unit]) -> None:
        while not self._closed:
            try:
                unit = waiting.popleft()
            except IndexError:
                return
            with self._lock:
                future = self._ready.get(unit)
            if future is not None and future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._compile(unit))
                except BaseException as error:
                    future.set_exception(error)
