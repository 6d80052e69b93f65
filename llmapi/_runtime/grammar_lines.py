"""GrammarLines: one grammar, compiled as often as threads work on it at once.

Copies of a matcher share the states of their lexer behind one lock (llguidance 1.9), so what threads do with them they
do one after the other, and with 64 sequences of one grammar every other thread waits. Matchers that were compiled apart
share nothing. A *line* is one of these and its copies; the second comes when a second sequence follows the grammar, and
then twice as many each time until there are as many as threads.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

THREADS = min(16, len(os.sched_getaffinity(0)))
"""How many work on the masks of a step."""

More = Callable[[int], "Future[list[Any]] | None"]


class GrammarLines:
    """The lines of one grammar. One thread uses it, that of the engine's loop; another may compile meanwhile.

    Args:
        matcher: an ``LLMatcher`` at its beginning; never moved.
        more: begins to compile so many more of them; None where nothing can be compiled any more.
    """

    def __init__(self, matcher: Any, more: More) -> None:
        self._roots = [matcher]
        self._more = more
        self._coming: Future[list[Any]] | None = None
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._roots)

    def number(self) -> int:
        """A number for a new sequence; ``number % len(lines)`` is its line."""
        return next(self._numbers)

    def copy(self, line: int) -> Any:
        """An ``LLMatcher`` at its beginning."""
        return self._roots[line].deep_copy()

    def want(self, sequences: int) -> None:
        """Say how many sequences want their masks at once. More lines come in the background, and are there some
        calls later.
        """
        if self._coming is not None and self._coming.done():
            if not self._coming.cancelled() and self._coming.exception() is None:
                self._roots = [*self._roots, *self._coming.result()]
            self._coming = None
        if self._coming is None and 2 * len(self) <= min(sequences, THREADS):
            self._coming = self._more(len(self))
