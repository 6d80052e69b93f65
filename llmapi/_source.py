"""A model's files on this machine: a hub id, a local folder or a ``.gguf`` file becomes a ``Snapshot``.

Local first: a revision that is complete in the hub's cache is used without any network traffic.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmapi._digests import DigestMemory
from llmapi._files import CONFIG, choose_weights, is_tokenizer, shards_of, support_files
from llmapi.errors import CheckpointError, ConfigError, ModelNotFoundError, unknown_name

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_HASHERS = 8  # files hashed at a time
_LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class SourceFile:
    """One file of a model.

    Args:
        name: its name within the model, e.g. ``"config.json"``, with ``/`` between folders.
        path: where it lies on this machine.
        size: its size in bytes.
    """

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Snapshot:
    """The files of one model, complete on this machine.

    Args:
        model: the model as the user named it.
        kind: ``"hub"``, ``"folder"`` or ``"gguf"``.
        path: the folder that holds the files, or the ``.gguf`` file itself.
        revision: commit hash on the hub; None for a folder or a ``.gguf`` file.
        files: the files that llmapi reads, sorted by name.
        memory: where the digests of the files are remembered.
        hub_calls: calls of the hub's client that may have used the network to find them.
    """

    model: str
    kind: Literal["hub", "folder", "gguf"]
    path: Path
    revision: str | None
    files: tuple[SourceFile, ...]
    memory: DigestMemory = field(repr=False, compare=False)
    hub_calls: int = field(default=0, repr=False, compare=False)

    def file(self, name: str) -> SourceFile | None:
        """The file called ``name``, or None."""
        return next((f for f in self.files if f.name == name), None)

    @property
    def config_file(self) -> Path | None:
        """``config.json``; None for a ``.gguf`` file, whose metadata takes its place."""
        found = self.file(CONFIG)
        return found.path if found else None

    @property
    def generation_config_file(self) -> Path | None:
        """``generation_config.json``, or None."""
        found = self.file("generation_config.json")
        return found.path if found else None

    @property
    def weight_files(self) -> tuple[SourceFile, ...]:
        """The weight files; () under ``load_format="dummy"`` unless the model is a ``.gguf`` file."""
        return tuple(f for f in self.files if f.name.endswith(_WEIGHT_SUFFIXES))

    @property
    def index_file(self) -> Path | None:
        """The index that says which shard holds which tensor, or None where the weights have none."""
        return next((f.path for f in self.files if f.name.endswith(".index.json")), None)

    @property
    def tokenizer_files(self) -> tuple[SourceFile, ...]:
        """The files the tokenizer is made from; for a ``.gguf`` file, that file."""
        return self.files if self.kind == "gguf" else tuple(f for f in self.files if is_tokenizer(f.name))

    @property
    def code_files(self) -> tuple[SourceFile, ...]:
        """The model's own ``*.py`` files; always () without ``trust_remote_code``."""
        return tuple(f for f in self.files if f.name.endswith(".py"))

    def digests(self, files: Collection[SourceFile] | None = None) -> dict[str, str]:
        """SHA-256 of ``files`` (all of the snapshot's when None): name → ``"sha256:<hex>"``.

        Files in the hub's cache that the hub already names by their SHA-256 are not read, nor are those whose digest
        is remembered; the others are read once, several at a time.
        """
        chosen = self.files if files is None else tuple(files)
        with ThreadPoolExecutor(max(1, min(_HASHERS, len(chosen), os.cpu_count() or 1))) as pool:
            return dict(
                zip((f.name for f in chosen), pool.map(lambda f: self.memory.sha256(f.path), chosen), strict=True)
            )


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    load_format: str = "auto",
    trust_remote_code: bool = False,
    refresh: bool = False,
    digests: DigestMemory,
    progress: bool = True,
    check: Callable[[Path], None] | None = None,
) -> Snapshot:
    """Find the model's files, fetching from the hub what is not on this machine.

    Args:
        model: hub id (``"org/name"``), local folder, or ``.gguf`` file. A folder of that name wins over a hub id.
        revision: branch, tag or commit hash on the hub; the default branch when None.
        token: hub token; True for the stored one, False for none; None leaves it to ``HF_TOKEN`` and the login.
        load_format: ``"auto"`` for the real weights, ``"dummy"`` for ``config.json`` and tokenizer only.
        trust_remote_code: also fetch the repository's own ``*.py`` files.
        refresh: ask the hub again, even where the revision is complete on disk.
        digests: memory for the digests of the files.
        progress: draw the bar ``fetch`` (bytes) while downloading.
        check: called with the path of ``config.json``, before any weight is fetched; what it raises ends the search.

    Raises:
        ConfigError: an argument has a value it cannot have.
        ModelNotFoundError: no such folder, file, id or revision, or no model in it.
        GatedModelError: the hub asks for a token or an accepted licence.
        OfflineError: not complete on disk, and the hub cannot be reached.
        SourceError: the hub or the disk failed in another way.
        CheckpointError: the files are there but incomplete.

    >>> resolve("./empty", digests=DigestMemory(Path("digests")))  # doctest: +SKIP
    Traceback (most recent call last):
    llmapi.errors.ModelNotFoundError: the folder empty holds no files; ...
    """
    if load_format not in _LOAD_FORMATS:
        raise ConfigError(unknown_name("load_format", load_format, _LOAD_FORMATS))
    if not isinstance(model, str | os.PathLike) or not str(model).strip():
        raise ConfigError(f"model={model!r}: give a Hugging Face id such as 'org/name', a folder, or a .gguf file")
    name, dummy = os.fspath(model), load_format == "dummy"
    path = Path(name)
    try:
        path = path.expanduser()
        is_local = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, ~nobody
        is_local = False
    if is_local and revision is not None:
        raise ConfigError(f"revision={revision!r} is for models on the hub, but {name!r} is on this disk; leave it out")
    if is_local and path.is_dir():
        files = _folder_files(path, dummy=dummy, trust_remote_code=trust_remote_code)
        if check is not None and CONFIG in files:
            check(path / CONFIG)
        return Snapshot(name, "folder", path.absolute(), None, source_files(path.absolute(), files), digests)
    if is_local:
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{name} is a file, not a model: give the folder it lies in, or a .gguf file")
        path = path.absolute()
        return Snapshot(name, "gguf", path, None, (SourceFile(path.name, path, path.stat().st_size),), digests)
    _check_id(name)
    from llmapi import _hub

    calls: list[str] = []
    folder, files = _hub.fetch(
        name,
        revision=revision,
        token=token,
        dummy=dummy,
        trust_remote_code=trust_remote_code,
        refresh=refresh,
        progress=progress,
        check=check,
        calls=calls,
    )
    return Snapshot(name, "hub", folder, folder.name, source_files(folder, files), digests, len(calls))


def source_files(folder: Path, names: Collection[str]) -> tuple[SourceFile, ...]:
    """Describe the files ``names`` of ``folder``, sorted by name."""
    return tuple(SourceFile(n, folder / n, (folder / n).stat().st_size) for n in sorted(names))


def listing(folder: Path) -> dict[str, int]:
    """Names and sizes in bytes of the files in ``folder`` and in its ``additional_chat_templates``."""
    found = [p for p in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")] if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in found}


def needed(names: Collection[str], folder: Path | None, *, dummy: bool, trust_remote_code: bool) -> list[str]:
    """The files among ``names`` that a model needs; shards as the index in ``folder`` lists them, once it is there."""
    wanted = support_files(names, trust_remote_code=trust_remote_code)
    choice = None if dummy else choose_weights(names)
    if choice is not None:
        wanted += choice.files
        if choice.index is not None:
            wanted.append(choice.index)
            if folder is not None and (folder / choice.index).is_file():
                wanted += shards_of(folder / choice.index)
    return wanted


def no_model(where: str, names: Collection[str], *, dummy: bool) -> str | None:
    """Why files of these ``names`` make no model, as a sentence with the remedy; None where they do."""
    if not names:
        return (
            f"{where} holds no files; a model has a config.json, tokenizer files and weights (*.safetensors or *.bin)"
        )
    if CONFIG not in names:
        ggufs = sorted(n for n in names if n.endswith(".gguf"))
        if ggufs:
            return f"{where} has no config.json but holds GGUF files; pass the path of one of them, e.g. {ggufs[0]!r}"
        return f"{where} has no config.json, so it is no model in Hugging Face layout; name another or add the file"
    if not dummy and choose_weights(names) is None:
        return (
            f"{where} has no weights llmapi reads (model.safetensors or pytorch_model.bin, whole or in shards); "
            "add them, or pass load_format='dummy' for random ones"
        )
    return None


def _folder_files(folder: Path, *, dummy: bool, trust_remote_code: bool) -> list[str]:
    names: Mapping[str, int] = listing(folder)
    if (why := no_model(f"the folder {folder}", names, dummy=dummy)) is not None:
        raise (CheckpointError if CONFIG in names else ModelNotFoundError)(why)
    wanted = needed(names, folder, dummy=dummy, trust_remote_code=trust_remote_code)
    if missing := [n for n in wanted if n not in names]:
        raise CheckpointError(
            f"the folder {folder} lacks {len(missing)} of its {len(wanted)} files: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; copy or download them again"
        )
    return wanted


def _check_id(name: str) -> None:
    """Raise unless ``name``, which is nothing on this disk, can be a hub id."""
    if name.lower().endswith(".gguf"):
        raise ModelNotFoundError(f"there is no file {name}; give the path of a .gguf file on this machine")
    if name.startswith((".", "/", "~", "\\")) or name.endswith(("/", "\\")) or Path(name).is_absolute():
        raise ModelNotFoundError(f"there is no folder {name}; give an existing folder, or a Hugging Face id 'org/name'")
    if not _ID.fullmatch(name) or "--" in name or ".." in name:
        raise ModelNotFoundError(
            f"{name!r} is neither a folder on this machine nor a Hugging Face id: those are 'org/name' with letters, "
            "digits, '-', '_' and '.'"
        )
