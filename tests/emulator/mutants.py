"""Small mistakes in kernel sources, each of which a comparison must notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.emulator import build
from tests.emulator.gpu import EmulationError

Mutant = tuple[str, str, str, str]
"""File, what it says, what it is to say (everywhere), who is to notice."""


def must_be_noticed(mutant: Mutant, compare: Callable[[build.Sources], None]) -> None:
    """Fails where a comparison passes with a mistake in it.

    Args:
        mutant: the mistake.
        compare: runs the comparison on these sources.
    """
    name, old, new, _ = mutant
    texts = build.sources()
    assert old in texts[name], f"{name} no longer says {old!r}: choose another mistake"
    with pytest.raises((AssertionError, EmulationError)):
        compare({**texts, name: texts[name].replace(old, new)})
