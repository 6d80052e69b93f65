"""GuidedDecodingParams: what the text of one request must look like."""

from __future__ import annotations

import json as _json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llmapi.errors import ConfigError, not_unicode, unknown_name

KINDS = ("json", "regex", "choice", "grammar", "json_object")

GrammarKey = tuple[str, str, str | None, bool]
"""Kind, text, and the two options of whitespace: equal for equal grammars."""


@dataclass(frozen=True, kw_only=True)
class GuidedDecodingParams:
    """A grammar that the output follows. Exactly one kind is given; all arguments are keywords.

    Args:
        json: a JSON schema as a dict or as JSON text, or a class that gives one (pydantic's ``model_json_schema``).
        regex: a regular expression that the whole output matches, in the syntax of Rust's ``regex`` crate (no
            look-around, no backreferences).
        choice: texts, one of which is the output.
        grammar: a context-free grammar, in GBNF (``root ::= "a" | "b"``) or in Lark's notation (``start: "a" | "b"``).
        json_object: True for any JSON object.
        whitespace_pattern: regular expression of what may stand between the tokens of JSON; None is any whitespace.
        disable_any_whitespace: JSON without whitespace between its tokens.

    Raises:
        ConfigError: an unknown name, no kind or several, or a value that cannot be one.

    Example:
        >>> GuidedDecodingParams(choice=["yes", "no"]).kind
        'choice'
    """

    json: Mapping[str, Any] | str | type | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> GuidedDecodingParams:
        valid = [f.name for f in fields(cls)]
        if args:
            raise ConfigError(f"GuidedDecodingParams takes keyword arguments only, e.g. regex='a+'; got {args[0]!r}")
        for name in kwargs:
            if name not in valid:
                raise ConfigError(unknown_name("GuidedDecodingParams argument", name, valid))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = "nothing" if not given else " and ".join(given)
            raise ConfigError(f"guided_decoding with {what}: give exactly one of {', '.join(KINDS)}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"guided_decoding: {name}={value!r}: give a text")
            _check_unicode(name, value or "")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise ConfigError("guided_decoding: whitespace_pattern and disable_any_whitespace exclude each other")
        kind = given[0]
        if kind not in ("json", "json_object") and (self.whitespace_pattern is not None or self.disable_any_whitespace):
            raise ConfigError(f"guided_decoding: options of whitespace are for JSON, not for {kind}: drop them")
        object.__setattr__(self, "choice", _choices(self.choice))
        key = (kind, self._text(kind), self.whitespace_pattern, self.disable_any_whitespace)
        object.__setattr__(self, "_key", key)

    @classmethod
    def of(cls, value: object) -> GuidedDecodingParams | None:
        """One of these from one, from a dict of its arguments, or from None.

        Raises:
            ConfigError: it is something else.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls(**value)
        raise ConfigError(f"guided_decoding={value!r}: give a GuidedDecodingParams, or a dict of its arguments")

    @property
    def kind(self) -> str:
        """Which kind was given."""
        return self.key[0]

    @property
    def key(self) -> GrammarKey:
        """What tells one grammar from another."""
        found: GrammarKey = self._key  # type: ignore[attr-defined]
        return found

    def _text(self, kind: str) -> str:
        if kind == "json":
            return _schema(self.json)
        if kind == "choice":
            return _json.dumps(self.choice)
        return '{"type": "object"}' if kind == "json_object" else str(getattr(self, kind))


def _choices(values: object) -> tuple[str, ...] | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"guided_decoding: choice={values!r}: give a list of at least one text")
    for value in values:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"guided_decoding: choice holds {value!r}: give texts of at least one character")
        _check_unicode("choice", value)
    return tuple(values)


def _check_unicode(name: str, text: str) -> None:
    if why := not_unicode(text):
        raise ConfigError(f"guided_decoding: {name} {why}")


def _schema(value: Any) -> str:
    """A JSON schema as text."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        try:
            value = _json.loads(value)
        except ValueError as error:
            raise ConfigError(f"guided_decoding: json is no JSON ({error}): give a schema") from error
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"guided_decoding: json={value!r}: give a schema as a dict or as JSON, such as {{'type': 'object'}}"
        )
    try:
        text = _json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"guided_decoding: json cannot be written as JSON ({error}): give plain values") from error
    _check_unicode("json", text)
    return _json.dumps(value)
