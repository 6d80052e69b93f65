"""How callers wait: for a batch, for a stream, for a future; from plain code and from asyncio alike."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from numbers import Real

from llmapi.errors import ConfigError, LLMAPIError
from llmapi.outputs import RequestOutput

Abort = Callable[[], None]
Follow = Callable[[bool], None]

_AHEAD = 16  # states that wait for an iteration to begin


class OutputStream(Iterator[RequestOutput]):
    """The states of one request as they come: an iterator that ends after the final one.

    Ctrl-C, :meth:`close` and garbage collection abort the request, whether or not a state was taken.

    Args:
        abort: ends the request.

    Attributes:
        listen: takes in a state; called on the loop's thread. It does not keep the stream alive.
    """

    def __init__(self, abort: Abort) -> None:
        self._abort = abort
        self._over = False
        self._states: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self.listen: Callable[[RequestOutput], None] = self._states.put

    def __next__(self) -> RequestOutput:
        if self._over:
            raise StopIteration
        try:
            output = self._states.get()
        except BaseException:
            self.close()
            raise
        self._over = output.finished
        raise_error(output)
        return output

    def close(self) -> None:
        """Take no more states, and abort the request unless it has ended."""
        if not self._over:
            self._over = True
            self._abort()

    def __del__(self) -> None:
        self.close()


class RequestFuture:
    """A request in flight: ``await`` it, ``async for`` over it, or call :meth:`result` from plain code.

    Works in any running event loop, a notebook's included, and in several at once. An iteration has a state for each
    token. States cost time and memory, so they are made while somebody iterates, and of the first tokens as long as
    nobody waits for the end; an iteration that begins later finds what it missed in its first state.

    Args:
        request_id: see below.
        abort: ends the request.
        follow: told whether states are wanted; at first they are.

    Attributes:
        request_id: id of the request; None where it was refused before it began.
    """

    def __init__(self, request_id: str | None, abort: Abort, follow: Follow | None = None) -> None:
        self.request_id = request_id
        self._abort = abort
        self._follow: Follow = follow or (lambda wanted: None)
        self._following = 0  # iterations
        self._lock = threading.Lock()
        self._states: queue.SimpleQueue[RequestOutput | LLMAPIError] = queue.SimpleQueue()
        self._listeners: list[Callable[[], None]] = []
        self._final: RequestOutput | LLMAPIError | None = None

    def listen(self, output: RequestOutput) -> None:
        """Take in a state; called on the loop's thread."""
        self._put(output)
        if self._states.qsize() >= _AHEAD:
            self._skip_states()

    def refuse(self, error: LLMAPIError) -> None:
        """End with an error before the request began."""
        self._put(error)

    def _skip_states(self) -> None:
        """Have no more states made, unless somebody iterates."""
        with self._lock:
            if not self._following:
                self._follow(False)

    def _put(self, item: RequestOutput | LLMAPIError) -> None:
        self._states.put(item)
        for notify in list(self._listeners):
            notify()

    def _take(self, item: RequestOutput | LLMAPIError) -> RequestOutput:
        if isinstance(item, LLMAPIError) or item.finished:
            self._final = item
            self._states.put(item)  # for whoever waits in another thread
        if isinstance(item, LLMAPIError):
            raise item
        raise_error(item)
        return item

    def done(self) -> bool:
        """Whether the final output was received."""
        return self._final is not None

    def abort(self) -> None:
        """End the request; its output then has ``finish_reason="abort"``."""
        self._abort()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the final output.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            ConfigError: ``timeout`` is neither a number nor None.
            TimeoutError: it is not there in time; the request goes on.
            LLMAPIError: the request failed.
        """
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, Real) or timeout != timeout):
            raise ConfigError(f"timeout={timeout!r}: give a number of seconds, or None to wait for ever")
        self._skip_states()
        limit = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        while self._final is None:
            try:
                left = None if limit is None else max(0.0, limit - time.monotonic())
                self._take(self._states.get(timeout=left))
            except queue.Empty:
                raise TimeoutError(f"no result within {timeout} s; the request goes on, or call abort()") from None
        return self._take(self._final)

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        with self._lock:
            self._following += 1
            self._follow(True)
        try:
            async with contextlib.aclosing(self._until_final()) as states:
                async for state in states:
                    yield state
        finally:
            with self._lock:
                self._following -= 1

    async def _until_final(self) -> AsyncGenerator[RequestOutput, None]:
        """The states there are, and the final one."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def notify() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # that event loop is closed; nobody waits there any more
                forget()

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(notify)

        self._listeners.append(notify)
        try:
            while self._final is None:
                arrived.clear()
                try:
                    item = self._states.get_nowait()
                except queue.Empty:
                    await arrived.wait()
                    continue
                yield self._take(item)
        finally:
            forget()
            if self._final is None:
                self._abort()

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return self._wait().__await__()

    async def _wait(self) -> RequestOutput:
        self._skip_states()
        async for _ in self._until_final():
            pass
        assert self._final is not None
        return self._take(self._final)


def raise_error(output: RequestOutput) -> None:
    """Raise the error of a request that failed."""
    if output.error is not None:
        raise output.error
