"""Text for people: ages, columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

_STEPS = ((60, "s"), (3600, "min"), (86400, "h"))


def age_text(seconds: float) -> str:
    """How long ago something was.

    >>> age_text(5), age_text(200), age_text(7300), age_text(200_000)
    ('5 s', '3 min', '2 h', '2 days')
    """
    seconds = max(seconds, 0)
    unit_seconds = 1
    for limit, unit in _STEPS:
        if seconds < limit:
            return f"{int(seconds // unit_seconds)} {unit}"
        unit_seconds = limit
    days = int(seconds // 86400)
    return f"{days} day{'s' * (days != 1)}"


def model_text(label: str) -> str:
    """A model's name as a word: the last part of a path, a hub id as it is.

    >>> model_text("/models/tiny.gguf"), model_text("org/name")
    ('tiny.gguf', 'org/name')
    """
    path = PurePath(label)
    return path.name if path.is_absolute() and path.name else label


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns.

    Args:
        rows: of equal length, the head first.
        right: numbers of the columns to align at the right.

    >>> print(columns([("a", "size"), ("bcd", "1")], right=[1]))
    a    size
    bcd     1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
