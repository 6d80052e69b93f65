"""Prompts from the command line, a file or stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmapi._cli.parser import UsageError
from llmapi.errors import ConfigError, RequestError, unknown_name
from llmapi.sampling import SamplingParams

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
_KEYS = (*_PROMPT_KEYS, "id", "sampling_params")


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        prompt: a text, token ids or a dict, as ``LLM.generate`` takes them; a list of messages where ``chat``.
        chat: whether it is a conversation.
        own: arguments of SamplingParams for this prompt alone.
        id: given back with the output.
    """

    prompt: Any
    chat: bool = False
    own: dict[str, Any] = field(default_factory=dict)
    id: Any = None


def read_prompts(words: Sequence[str], file: str | None, *, jsonl: bool) -> list[Asked]:
    """The prompts of a command.

    Args:
        words: prompts that were typed.
        file: a file to read, ``-`` for stdin; None reads stdin where no prompt was typed.
        jsonl: whether each line is JSON; so it is in a file called ``.jsonl``.

    Raises:
        UsageError: there is no prompt, or there are two sources.
        RequestError: a line cannot be understood.
    """
    if words and file is not None:
        raise UsageError("prompts were given both as words and with --file: give one of them")
    if words and jsonl:
        raise UsageError("--jsonl is for --file and stdin, and prompts were given as words")
    for word in words:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise RequestError(f"prompt {word!r} is not UTF-8 text")
    if words:
        return [Asked(word) for word in words]
    if file is None and sys.stdin.isatty():
        raise UsageError("no prompt: give one after the model, name a --file, or send lines to stdin")
    if file is None or file == "-":
        return _parsed(sys.stdin, "stdin", jsonl)
    with Path(file).open(encoding="utf-8-sig") as lines:
        return _parsed(lines, file, jsonl or file.lower().endswith((".jsonl", ".ndjson")))


def _parsed(lines: Iterable[str], name: str, jsonl: bool) -> list[Asked]:
    try:
        texts = [(i, line.rstrip("\r\n")) for i, line in enumerate(lines, 1)]
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    asked = [_of_json(text, f"{name}, line {i}") if jsonl else Asked(text) for i, text in texts if text.strip()]
    if not asked:
        raise RequestError(f"{name} holds no prompt: give one on each line")
    return asked


def _of_json(text: str, where: str) -> Asked:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON ({error}); without --jsonl each line is a prompt as it is") from error
    if isinstance(data, (str, list)):
        return Asked(data)
    if not isinstance(data, dict):
        raise RequestError(
            f"{where}: give a text, a list of token ids, or an object with one of {_names(_PROMPT_KEYS)}"
        )
    for key in data:
        if key not in _KEYS:
            raise RequestError(f"{where}: {unknown_name('key', key, _KEYS)}")
    given = [key for key in _PROMPT_KEYS if key in data]
    if len(given) != 1:
        raise RequestError(f"{where}: give one of {_names(_PROMPT_KEYS)}; it has {_names(given) or 'none'}")
    chat = given[0] == "messages"
    prompt = data["messages"] if chat else {given[0]: data[given[0]]}
    return Asked(prompt, chat, _own(data.get("sampling_params"), where), data.get("id"))


def _own(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RequestError(f'{where}: sampling_params is {given!r}; give an object such as {{"temperature": 0}}')
    valid = [f.name for f in fields(SamplingParams) if f.name not in ("logits_processors", "return_logits")]
    for name in given:
        if name not in valid:
            raise RequestError(f"{where}: {unknown_name('sampling parameter', name, valid)}")
    own = dict(given)
    if isinstance(own.get("logit_bias"), dict):  # JSON knows no numbers as keys
        own["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in own["logit_bias"].items()}
    try:
        SamplingParams(**own)
    except ConfigError as error:
        raise RequestError(f"{where}: {error}") from error
    return own


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
