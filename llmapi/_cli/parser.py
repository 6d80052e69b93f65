"""The argument parser of the verbs: argparse with one-line errors."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias


class UsageError(Exception):
    """The command was not understood; the text says why."""


class Parser(argparse.ArgumentParser):
    """argparse, with three changes.

    An error is one line, options cannot be cut short, and the words of a verb may stand between its options.

    Args:
        intermixed: for a verb that takes any number of words.
        options: of ``ArgumentParser``.
    """

    def __init__(self, *, intermixed: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._intermixed = intermixed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; in two passes, options first, where the words may stand anywhere."""
        if not self._intermixed:
            return super().parse_known_args(args, namespace)
        self._intermixed = False
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = True

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving Python."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Say that these words mean nothing here.

        Args:
            words: what is left over.
        """
        word = next((w for w in words if w.startswith("-")), words[0])
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        name = word.partition("=")[0]
        close = difflib.get_close_matches(name, self._option_string_actions, n=1)
        self.error(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What ``add_subparsers`` returns: the place where a verb adds itself."""
