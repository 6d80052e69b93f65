"""Check: one thing that ``llmapi doctor`` looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: of the thing.
        ok: whether it is as it should be.
        found: what it is, or why not.
        remedy: what to do where it is not ok; empty where nothing can be done.
        needed: whether nothing runs without it.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    needed: bool = False
