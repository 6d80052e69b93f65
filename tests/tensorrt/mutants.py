"""Modules with one deliberate mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def mutant(module: Any, old: str, new: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A module with another text in one place.

    Args:
        module: the right one.
        old, new: what stands there once, and what shall.
        patch: keeps the mutant among Python's modules until it is undone.
    """
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module.__name__}"
    found = ModuleType(f"{module.__name__}_mutant")
    patch.setitem(sys.modules, found.__name__, found)
    exec(compile(text.replace(old, new), module.__file__, "exec"), found.__dict__)
    return found
