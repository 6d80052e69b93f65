"""Saved engines: a folder with everything an LLM needs, so that ``LLM(folder)`` starts with no source and no cache."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmapi._build.artifact_keys import graph_recipe_key
from llmapi._build.graph import Graph
from llmapi._build.names import CONSTANTS_FILE, GRAPH_FILE, WEIGHTS_FILE
from llmapi._build.store.disk import free_bytes, size_text
from llmapi._build.store.errors import is_disk_full
from llmapi.config import EngineConfig, EngineOptions
from llmapi.errors import CheckpointError, ConfigError
from llmapi.models.spec import TransformerSpec

MARKER = "llmapi.json"
_SCHEMA = 1
_LIMITS = ("backend", "dtype", "max_seq_len", "max_batch_size", "max_num_tokens", "block_size")


@dataclass(frozen=True)
class SavedEngine:
    """What a saved folder says of itself.

    Attributes:
        path: the folder.
        model: name of the model it was made from.
        spec: its architecture.
        limits: the engine's options as it was saved, offered as defaults.
        stop_token_ids: ids that end a sequence.
        engine_digest: key of the compiled step it holds.
        graph_recipe, graph_digest: key of the recipe of its graph, and the graph it led to: saves an export.
        has_tokenizer: whether the folder holds one.
    """

    path: Path
    model: str
    spec: TransformerSpec
    limits: dict[str, Any]
    stop_token_ids: tuple[int, ...]
    engine_digest: str
    graph_recipe: str
    graph_digest: str
    has_tokenizer: bool

    def defaults(self, asked: EngineOptions) -> EngineOptions:
        """What was asked for, with the saved limits where nothing was.

        Args:
            asked: the user's options.
        """
        filled: dict[str, Any] = {}
        for name in ("max_seq_len", "max_batch_size", "max_num_tokens"):
            if getattr(asked, name) is None:
                filled[name] = self.limits[name]
        for name in ("backend", "dtype"):
            if getattr(asked, name) == "auto":
                filled[name] = self.limits[name]
        linear = "tensorrt" in (asked.backend, filled.get("backend"))  # a block is a whole sequence there
        if asked.kv_cache.block_size == "auto" and self.limits["backend"] != "tensorrt" and not linear:
            filled["kv_cache"] = replace(asked.kv_cache, block_size=self.limits["block_size"])
        return replace(asked, **filled)

    @property
    def weights(self) -> Path:
        """Folder of the canonical weights."""
        return self.path / "weights"

    @property
    def engine(self) -> Path:
        """Folder of the compiled step."""
        return self.path / "engine"


def is_saved(path: Path) -> bool:
    """Whether a folder is a saved engine."""
    return (path / MARKER).is_file()


def load_saved(path: Path) -> SavedEngine:
    """Read a saved engine's description.

    Args:
        path: the folder.

    Raises:
        CheckpointError: a file is missing, cut short, or of a newer version.
    """
    try:
        data = json.loads((path / MARKER).read_text(encoding="utf-8"))
        if data["schema"] != _SCHEMA:
            raise CheckpointError(
                f"{path} was saved in format {data['schema']}, this llmapi reads format {_SCHEMA}: save it again"
            )
        for name, size in data["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise CheckpointError(f"{path / name} is missing or not {size} bytes long: save the engine again")
        return SavedEngine(
            path,
            data["model"],
            TransformerSpec.from_json(data["spec"]),
            {name: data["limits"][name] for name in _LIMITS},
            tuple(data["stop_token_ids"]),
            data["engine_digest"],
            data["graph_recipe"],
            data["graph_digest"],
            data["has_tokenizer"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MARKER} cannot be read ({error!r}): save the engine again") from error


def save_engine(
    folder: Path,
    *,
    model: str,
    spec: TransformerSpec,
    config: EngineConfig,
    stop_token_ids: tuple[int, ...],
    engine_digest: str,
    weights: Path,
    engine: Path,
    tokenizer: Any,
) -> None:
    """Write a saved engine; the folder appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        model, spec, config, stop_token_ids, engine_digest: what to note.
        weights, engine: artifact folders to copy.
        tokenizer: written beside them; None for none.

    Raises:
        ConfigError: the folder exists and is not empty, cannot be made, or its disk is full.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: give a new one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}: {error.filename}): give a folder in a place you may write"
        ) from error
    try:
        (staging / "weights").mkdir()
        shutil.copyfile(weights / WEIGHTS_FILE, staging / "weights" / WEIGHTS_FILE)
        (staging / "engine").mkdir()
        for file in (GRAPH_FILE, CONSTANTS_FILE):
            shutil.copyfile(engine / file, staging / "engine" / file)
        if tokenizer is not None:
            tokenizer.save(staging)
        files = {f.relative_to(staging).as_posix(): f.stat().st_size for f in sorted(staging.rglob("*")) if f.is_file()}
        data = {
            "schema": _SCHEMA,
            "model": model,
            "spec": spec.to_json(),
            "limits": {name: getattr(config, name) for name in _LIMITS},
            "stop_token_ids": list(stop_token_ids),
            "engine_digest": engine_digest,
            "graph_recipe": graph_recipe_key(spec).digest,
            "graph_digest": Graph.parse((engine / GRAPH_FILE).read_text(encoding="utf-8")).digest,
            "has_tokenizer": tokenizer is not None,
            "files": files,
        }
        (staging / MARKER).write_text(json.dumps(data, indent=1), encoding="utf-8")
        staging.chmod(0o755)
        os.replace(staging, folder) if not folder.exists() else _replace_empty(staging, folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not is_disk_full(error):
            raise
        needed = size_text((weights / WEIGHTS_FILE).stat().st_size)
        raise ConfigError(
            f"{folder} cannot be written: its disk is full. The weights alone take {needed}, and "
            f"{size_text(free_bytes(folder.parent))} are free: free some space, or give a folder on a larger disk"
        ) from error


def _replace_empty(staging: Path, folder: Path) -> None:
    folder.rmdir()
    staging.rename(folder)
