"""Find the tokenizer: the one handed over, the one named, or the model's own; GGUF's is converted once and cached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmapi._build.pipeline import Builder
from llmapi._digests import DigestMemory
from llmapi._source import Snapshot, resolve
from llmapi._tokenizer import Tokenizer
from llmapi.errors import ConfigError

if TYPE_CHECKING:
    from llmapi._runtime.start import ModelOptions


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
    if isinstance(given, (str, Path)):
        home = _named(given, options, digests)
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
    if isinstance(home, Path):
        folder = home
    elif home.kind == "gguf":
        file = home.path

        def convert(target: Path) -> None:
            Tokenizer.load(file.parent, gguf_file=file.name).save(target)

        folder = builder.tokenizer(home, convert)
    else:
        folder = home.path
    with builder.report.phase("tokenizer"):
        mode, trust = options.tokenizer_mode, options.trust_remote_code
        return Tokenizer.load(folder, mode=mode, trust_remote_code=trust)  # type: ignore[arg-type]
