"""Which files of a model repository are needed: its configuration, its tokenizer, one set of weights.

The same choice is made for a folder on disk, for the hub's cache and for the hub itself, from names alone. Everything
else (``onnx/``, ``original/``, ``consolidated*``, ``*.gguf``, ``*.h5``, ``*.msgpack``, adapters, optimizer states) is
left where it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from llmapi.errors import CheckpointError

CONFIG = "config.json"
_CONFIGS = (CONFIG, "generation_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "*.tiktoken",
    "chat_template*.jinja",
    "chat_template*.json",
)
_TOKENIZER_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")  # one of these makes a tokenizer
_EXTRA_TEMPLATES = "additional_chat_templates/"
_SERIES = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})(?P<ext>\.safetensors|\.bin)")
_NOT_THE_MODEL = ("consolidated*", "adapter_*", "optimizer*", "training_args*", "scheduler*", "rng_state*")


@dataclass(frozen=True)
class WeightChoice:
    """The one set of weights to read: an index that names the shards, or the files themselves.

    Args:
        index: name of the ``*.index.json``; its shards are known once it is read (``shards_of``). None without one.
        files: the weight files where there is no index. A numbered series is listed whole, with those that are missing.
    """

    index: str | None
    files: tuple[str, ...]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def is_tokenizer(name: str) -> bool:
    """Whether ``name`` is one of the tokenizer's files."""
    extra = name.startswith(_EXTRA_TEMPLATES) and name.endswith(".jinja")
    return extra or ("/" not in name and _matches(name, _TOKENIZER))


def is_tokenizer_core(name: str) -> bool:
    """Whether ``name`` alone is enough to make a tokenizer, e.g. ``tokenizer.json``."""
    return "/" not in name and _matches(name, _TOKENIZER_CORE)


def support_files(names: Iterable[str], *, trust_remote_code: bool = False) -> list[str]:
    """The configuration and tokenizer files among ``names``, and top-level ``*.py`` if the model's code is trusted."""
    return sorted(
        n
        for n in names
        if n in _CONFIGS or is_tokenizer(n) or (trust_remote_code and "/" not in n and n.endswith(".py"))
    )


def choose_weights(names: Collection[str]) -> WeightChoice | None:
    """Choose one set of weights among ``names``: safetensors before ``.bin``; None where there are none.

    >>> choose_weights(["model.safetensors", "pytorch_model.bin"])
    WeightChoice(index=None, files=('model.safetensors',))
    """
    for single, ext in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        if single in names:
            return WeightChoice(None, (single,))
        if f"{single}.index.json" in names:
            return WeightChoice(f"{single}.index.json", ())
        found = [n for n in names if n.endswith(ext) and "/" not in n and not _matches(n, _NOT_THE_MODEL)]
        if series := _series(found):
            return WeightChoice(None, series)
        if ext == ".safetensors" and len(found) == 1:
            return WeightChoice(None, (found[0],))
    return None


def _series(names: list[str]) -> tuple[str, ...]:
    """The whole numbered series that the first numbered name belongs to, present or not; () where none is numbered."""
    for name in sorted(names):
        if (m := _SERIES.fullmatch(name)) and int(m["n"]) > 0:
            return tuple(f"{m['stem']}-{i:05d}-of-{m['n']}{m['ext']}" for i in range(1, int(m["n"]) + 1))
    return ()


def read_index(path: Path) -> dict[str, str]:
    """Read a weights index: tensor name → name of the shard that holds it.

    Raises:
        CheckpointError: the index is not JSON, has no ``weight_map``, or names a shard outside its folder.
    """
    broken = f"{path} is not a usable weights index"
    remedy = "delete it and fetch the model again, or restore it from its origin"
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(k): str(v) for k, v in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{broken} ({type(error).__name__}: {error}); {remedy}") from error
    if not pairs:
        raise CheckpointError(f"{broken}: its weight_map is empty; {remedy}")
    for shard in set(pairs.values()):
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{broken}: the shard {shard!r} is not a plain file name; {remedy}")
    return pairs


def shards_of(path: Path) -> tuple[str, ...]:
    """Names of the shards that the index at ``path`` lists, sorted (see ``read_index``)."""
    return tuple(sorted(set(read_index(path).values())))
