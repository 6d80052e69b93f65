"""ParamsMemo: what is worked out once for the SamplingParams of a request, and forgotten with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from llmapi.sampling import SamplingParams

T = TypeVar("T")


class ParamsMemo(Generic[T]):
    """A function of SamplingParams that is called once for each object.

    Args:
        make: the function.
    """

    def __init__(self, make: Callable[[SamplingParams], T]) -> None:
        self._make = make
        self._kept: dict[int, tuple[weakref.ref[SamplingParams], T]] = {}

    def __call__(self, params: SamplingParams) -> T:
        """What ``make`` gave for these params."""
        key = id(params)
        entry = self._kept.get(key)
        if entry is not None and entry[0]() is params:
            return entry[1]
        kept, value = self._kept, self._make(params)
        kept[key] = weakref.ref(params, lambda _: kept.pop(key, None)), value
        return value

    def __len__(self) -> int:
        return len(self._kept)
