"""Find the tokenizer: the one handed over, the one named, or the model's own; what it takes is kept in the cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from llmapi._build.pipeline import Builder
from llmapi._digests import DigestMemory
from llmapi._frozen_tokenizer import thaw
from llmapi._source import Snapshot, resolve
from llmapi._tokenizer import Tokenizer
from llmapi.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from llmapi._runtime.options import ModelOptions

log = logging.getLogger("llmapi")


def find_tokenizer(
    options: ModelOptions, home: Snapshot | Path | None, builder: Builder, digests: DigestMemory
) -> Tokenizer | None:
    """The tokenizer that an LLM uses.

    Args:
        options: what the user said of it.
        home: where the model's own is: its files, or a folder; None for nowhere.
        builder: converts the tokenizer of a ``.gguf`` file through the cache.
        digests: memory for the digests of files.

    Returns:
        None where it is to be skipped, or where the model has none and only random weights are wanted.

    Raises:
        ConfigError: what was handed over is no tokenizer.
        SourceError: what was named cannot be found.
        CheckpointError: its files are missing or broken.
    """
    given = options.tokenizer
    if options.skip_tokenizer_init:
        return None
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str) and not given.strip():
        raise ConfigError(
            f"tokenizer={given!r}: give a Hugging Face id or a folder, or leave it out for the model's own"
        )
    if isinstance(given, (str, Path)):
        home = _named(given, options, digests)
        builder.report.hub_calls += home.hub_calls if isinstance(home, Snapshot) else 0
    elif given is not None:
        if not all(hasattr(given, name) for name in ("decode", "eos_token_id", "all_special_ids")):
            raise ConfigError(f"tokenizer={given!r}: give a Hugging Face id, a folder or a tokenizer of transformers")
        return Tokenizer(given)
    elif isinstance(home, Snapshot) and options.load_format == "dummy" and not _has_tokenizer(home):
        return None
    return None if home is None else _load(home, options, builder)


def _named(name: str | Path, options: ModelOptions, digests: DigestMemory) -> Snapshot | Path:
    if Path(name).expanduser().is_dir():  # it need not be a whole model
        return Path(name).expanduser()
    return resolve(
        name,
        token=options.hf_token,
        load_format="dummy",
        trust_remote_code=options.trust_remote_code,
        digests=digests,
        progress=options.progress,
    )


def _has_tokenizer(snapshot: Snapshot) -> bool:
    return snapshot.kind == "gguf" or bool(snapshot.tokenizer_files)


def _load(home: Snapshot | Path, options: ModelOptions, builder: Builder) -> Tokenizer:
    mode, trust = options.tokenizer_mode, options.trust_remote_code
    plain = mode == "auto" and not trust
    kept = _keep(home, builder) if isinstance(home, Snapshot) and (home.kind == "gguf" or plain) else None
    folder = home if isinstance(home, Path) else home.path
    if kept is not None and isinstance(home, Snapshot) and home.kind == "gguf":
        folder = kept

    def read() -> Tokenizer:
        return Tokenizer.load(folder, mode=mode, trust_remote_code=trust)  # type: ignore[arg-type]

    with builder.report.phase("tokenizer") as phase:
        frozen = thaw(kept) if kept is not None and plain else None
        phase.note = "read by transformers" if frozen is None else "frozen"
        return read() if frozen is None else Tokenizer.of_frozen(frozen, lambda: read().backend, str(folder))


def _keep(home: Snapshot, builder: Builder) -> Path | None:
    """Folder of the cache with what is kept of a model's tokenizer; None where the cache cannot be written."""

    def convert(target: Path) -> None:
        source = home.path
        if home.kind == "gguf":
            Tokenizer.load(home.path.parent, gguf_file=home.path.name).save(target)
            source = target
        Tokenizer.load(source).freeze(target)

    try:
        return builder.tokenizer(home, convert)
    except CacheError as error:
        if home.kind == "gguf":
            raise
        log.warning("the tokenizer is read anew at each start: %s", error)
        return None
