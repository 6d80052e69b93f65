"""What the tests of the command line share."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

from llmapi import SamplingParams

Cli = Callable[..., SimpleNamespace]
"""Run a command with ``stdin``: its ``code``, ``out`` and ``err``."""

PROMPTS = ["the quick brown fox", "hello world, what is", "one two"]
GREEDY = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]
SAMPLING = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def refused(result: SimpleNamespace, code: int, *parts: str) -> None:
    """One line on stderr that holds the parts, nothing on stdout."""
    assert result.code == code
    assert result.out == ""
    assert re.fullmatch(r"llmapi: error: [^\n]+\n", result.err), result.err
    for part in parts:
        assert part in result.err
