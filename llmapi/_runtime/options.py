"""Options: the arguments of LLM, checked and divided into those of the model and those of the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmapi.config import EngineOptions, KvCacheConfig
from llmapi.errors import ConfigError, unknown_name

LOAD_FORMATS = ("auto", "dummy")
TOKENIZER_MODES = ("auto", "slow")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it comes from; the arguments of :class:`llmapi.LLM` of the same names."""

    model: str
    tokenizer: Any = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    hf_token: str | bool | None = None
    load_format: str = "auto"
    refresh: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    seed: int | None = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise ConfigError(
                f"model={self.model!r}: give a Hugging Face id such as 'org/name', a folder, or a .gguf file"
            )
        for name in ("skip_tokenizer_init", "trust_remote_code", "refresh", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.revision is not None and not isinstance(self.revision, str):
            raise ConfigError(f"revision={self.revision!r}: give a branch, tag or commit as a text")
        if self.hf_token is not None and not isinstance(self.hf_token, (str, bool)):
            raise ConfigError("hf_token: give a text, True for the stored login, False for none, or None")
        if self.cache_dir is not None and not isinstance(self.cache_dir, (str, os.PathLike)):
            raise ConfigError(f"cache_dir={self.cache_dir!r}: give a folder, or None")
        if self.tokenizer_mode not in TOKENIZER_MODES:
            raise ConfigError(unknown_name("tokenizer_mode", self.tokenizer_mode, TOKENIZER_MODES))
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(unknown_name("load_format", self.load_format, LOAD_FORMATS))
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ConfigError(f"seed={self.seed!r}: give a whole number from 0, or None")


def split_arguments(model: str | os.PathLike[str], arguments: Mapping[str, Any]) -> tuple[ModelOptions, EngineOptions]:
    """The arguments of LLM as options of the model and of the engine.

    Args:
        model: as for :class:`llmapi.LLM`.
        arguments: the others; what is left out has its default.

    Raises:
        ConfigError: one has a value it cannot have.
    """
    names = {f.name for f in fields(EngineOptions)}
    engine = {name: value for name, value in arguments.items() if name in names}
    rest = {name: value for name, value in arguments.items() if name not in names and name != "kv_cache_config"}
    kv_cache = KvCacheConfig.of(arguments.get("kv_cache_config"))
    name = str(model) if isinstance(model, os.PathLike) else model
    return ModelOptions(name, **rest), EngineOptions(kv_cache=kv_cache, **engine)


def full_path(what: str, path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` filled in.

    Args:
        what: the argument that it was given as.
        path: as given.

    Raises:
        ConfigError: it can be no path.
    """
    if not os.fspath(path):
        raise ConfigError(f"{what} is an empty text: give the path of a folder")
    try:
        if "\0" not in os.fspath(path):
            return Path(path).expanduser()
        why = "a null character"
    except RuntimeError:
        why = "no such user"
    raise ConfigError(f"{what}={os.fspath(path)!r} is no path ({why}): give the full path of a folder")
