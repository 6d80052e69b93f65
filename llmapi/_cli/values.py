"""Values as they are typed: sizes, lists of numbers, biases. Each function is an argparse ``type``."""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str) -> int:
    """A number of bytes.

    >>> size("50GB"), size("1.5 MiB"), size("123")
    (50000000000, 1572864, 123)
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with kB, MB, GB, TB, KiB, MiB, ...")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()])


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no number") from None


def whole_or_none(text: str) -> int | None:
    """A whole number, or ``none``."""
    return None if text.lower() == "none" else whole(text)


def early_stopping(text: str) -> bool | str:
    """``true``, ``false`` or ``never``."""
    return {"true": True, "false": False}.get(text.lower(), text)


def wholes(text: str) -> list[int]:
    """Whole numbers with commas between them.

    >>> wholes("1,4,16")
    [1, 4, 16]
    """
    return [whole(part.strip()) for part in text.split(",")]


def arguments(text: str) -> dict[str, Any]:
    """Arguments, as a JSON object.

    >>> arguments('{"regex": "[0-9]+"}')
    {'regex': '[0-9]+'}
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"{text!r} is no JSON object: give arguments in braces")
    return found


def biases(text: str) -> dict[int, float]:
    """Token ids and values.

    >>> biases("42=-100,7=1.5")
    {42: -100.0, 7: 1.5}
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(separator for _, separator, _ in pairs):
        raise ArgumentTypeError(f"{text!r} is no bias: give ID=VALUE, with commas between several")
    return {whole(key.strip()): number(value) for key, _, value in pairs}


def positive(text: str) -> int:
    """A whole number from 1."""
    value = whole(text)
    if value < 1:
        raise ArgumentTypeError(f"{value} is too small: give a whole number from 1")
    return value


def positives(text: str) -> list[int]:
    """Whole numbers from 1 with commas between them."""
    return [positive(part.strip()) for part in text.split(",")]
