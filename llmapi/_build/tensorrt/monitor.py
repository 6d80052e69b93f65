"""Monitor: TensorRT's own progress as one of llmapi's bars, and the way to stop a build."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger("llmapi")

Result = TypeVar("Result")

_LOOK = 0.1  # seconds between looks at whether the build has ended


class Stop:
    """Asks a build to end. TensorRT looks at it after each step, on threads of its own."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        """End the build at the next step."""
        self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether it was asked to end."""
        return self._asked.is_set()


def run_interruptible(work: Callable[[], Result], stop: Stop) -> Result:
    """Run TensorRT's builder on a thread of its own, so that Ctrl-C is heard at once and the build ends cleanly.

    Args:
        work: the build; returns soon after ``stop`` was asked.
        stop: asked where Ctrl-C is pressed.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, once the build has ended.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    finished = threading.Event()  # a join that Ctrl-C breaks into takes the thread for ended (Python 3.11)

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again on the caller's thread
            errors.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=run, name="llmapi-tensorrt", daemon=True)
    try:
        thread.start()
        while not finished.wait(_LOOK):
            pass
    except BaseException:
        stop.ask()
        log.warning("stopping at TensorRT's next step; the longest takes about as long as half the build")
        while thread.ident is not None and not finished.is_set():
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C changes nothing: it is ending
                finished.wait(_LOOK)
        raise
    if errors:
        raise errors[0]
    return results[0]


def make_monitor(trt: Any, stop: Stop, done: Callable[[int], None], total: int) -> Any:
    """An ``IProgressMonitor`` that moves a bar.

    Args:
        trt: the module; the class is made here because it derives from one of it.
        stop: looked at after each step.
        done: told how much more is done.
        total: what all of it is; TensorRT's phases nest and do not say how many there will be, so each outermost step
            counts what is left by halves, and the caller fills up the rest.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()  # it is called from several threads
            self._steps: dict[str, int] = {}
            self._outer: set[str] = set()
            self._left = total

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._steps[phase_name] = max(1, num_steps)
                if not parent_phase:
                    self._outer.add(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._outer:
                    part = max(1, self._left // (2 * self._steps[phase_name]))
                    part = min(part, self._left)
                    self._left -= part
                    done(part)
            return not stop.asked

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._outer.discard(phase_name)

    return Monitor()
