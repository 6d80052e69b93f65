"""Every exception llmapi raises on purpose.

    LLMAPIError
    ├── ConfigError (ValueError)          an argument has a value it cannot have
    ├── SourceError (OSError)             the model could not be found or fetched
    │   ├── ModelNotFoundError            no such id, revision or folder
    │   ├── GatedModelError               the hub wants a token or an accepted licence
    │   └── OfflineError                  it is not on disk, and the hub cannot be reached
    ├── UnsupportedModelError             the architecture, or an option of it, is not known
    ├── CheckpointError                   the files are there but broken, incomplete or of another shape
    ├── BuildError                        the engine could not be built
    ├── CacheError                        the build cache cannot be used as asked
    ├── RequestError (ValueError)         this request cannot be served; others can
    │   ├── PromptTooLongError            the prompt does not fit max_seq_len
    │   └── CapacityError                 the request can never fit the KV memory
    └── EngineClosedError                 the LLM was closed

Each message names the value, the limit and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LLMAPIError(Exception):
    """Base of every exception that llmapi raises on purpose."""


class ConfigError(LLMAPIError, ValueError):
    """An argument has a value it cannot have, or a name that does not exist."""


class SourceError(LLMAPIError, OSError):
    """The model could not be found or fetched."""


class ModelNotFoundError(SourceError):
    """No such model id, revision, folder or file."""


class GatedModelError(SourceError):
    """The hub asks for a token, or for its licence to be accepted, before it hands out this model."""


class OfflineError(SourceError):
    """The model is not on disk and the hub cannot be reached."""


class UnsupportedModelError(LLMAPIError):
    """The model's architecture, or an option in its config.json, is not supported."""


class CheckpointError(LLMAPIError):
    """The model's files exist but are broken, incomplete or of unexpected shape."""


class BuildError(LLMAPIError):
    """The engine could not be built."""


class CacheError(LLMAPIError):
    """The build cache cannot be used as asked."""


class RequestError(LLMAPIError, ValueError):
    """This request cannot be served; other requests of the same batch can."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room for a single token within ``max_seq_len``."""


class CapacityError(RequestError):
    """The request can never fit the KV-cache memory, even alone."""


class EngineClosedError(LLMAPIError):
    """The LLM was closed; make a new one."""


def not_unicode(text: str) -> str | None:
    """Say that ``text`` is not valid Unicode, and what to do; None where it is.

    >>> not_unicode("a\\ud800")[:52]
    "is not valid Unicode ('\\\\ud800' at character 1): repl"
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"is not valid Unicode ({text[error.start]!r} at character {error.start}): replace lone surrogates, "
            "e.g. text.encode('utf-8', 'replace').decode()"
        )
    return None


def unknown_name(what: str, name: object, valid: Iterable[object]) -> str:
    """Say that ``name`` is not a valid ``what``, list the valid ones and guess what was meant.

    >>> unknown_name("backend", "cdua", ["cpu", "cuda"])
    "unknown backend 'cdua'; did you mean 'cuda'? Valid: cpu, cuda"
    """
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {name!r}{hint} Valid: {', '.join(names)}"
