"""The manifest of an entry: what it was made from and which files it consists of.

It is written last, so a folder with a manifest is complete, and it carries a digest of itself, so a damaged one is
noticed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmapi._build.key import Key
from llmapi._build.store.disk import SCHEMA, check_kind, check_name, is_digest
from llmapi.errors import CacheError

MAX_BYTES = 64 << 20
"""A manifest larger than this is not read."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an entry: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an entry is.

    Attributes:
        kind: "weights", "engine", ...
        key: what the entry was made from; its digest names the entry's folder.
        files: the files, by name relative to the entry.
        label: for people, such as the model's name; no part of the key.
        created: seconds since the epoch by the builder's clock.
        version: version of llmapi that built the entry.
    """

    kind: str
    key: Key
    files: Mapping[str, FileRecord]
    label: str
    created: float
    version: str

    @property
    def digest(self) -> str:
        """The key's digest."""
        return self.key.digest

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(f.size for f in self.files.values())

    def dump(self) -> bytes:
        """The manifest as JSON, with a digest of itself at the end."""
        return seal(
            {
                "schema": SCHEMA,
                "kind": self.kind,
                "digest": self.digest,
                "label": self.label,
                "created": self.created,
                "version": self.version,
                "key": self.key.to_json(),
                "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in self.files.items()},
            }
        )

    @classmethod
    def load(cls, data: bytes) -> Manifest:
        """Read what :meth:`dump` wrote; CacheError with the reason where it is anything else."""
        fields = unseal(data)
        if fields.get("schema") != SCHEMA:
            raise CacheError(f"its schema is {fields.get('schema')!r}, not {SCHEMA}")
        kind, label, created, version = (fields.get(n) for n in ("kind", "label", "created", "version"))
        if not isinstance(kind, str) or not isinstance(label, str) or not isinstance(version, str):
            raise CacheError("kind, label and version must be texts")
        if isinstance(created, bool) or not isinstance(created, int | float):
            raise CacheError("created must be a number")
        key = Key.from_json(fields.get("key"))
        if key.digest != fields.get("digest"):
            raise CacheError("its key does not have the digest that it names")
        return cls(check_kind(kind), key, _files(fields.get("files")), label, float(created), version)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in the file ``path``; CacheError where it is damaged, OSError where it cannot be read."""
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
        return cls.load(data)

    @classmethod
    def read_again(cls, path: Path) -> Manifest:
        """As :meth:`read`, for those who list: what was read before and has not been written to since is not read again.

        A file that changed within the last moments is always read: its times may not tell of one more change.
        """
        stat = path.stat()
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        kept = _KEPT.get(path)
        if kept is not None and kept[0] == seen:
            return kept[1]
        manifest = cls.read(path)
        if time.time_ns() - max(seen[2:]) > _SETTLED_NS:
            if len(_KEPT) >= _MOST_KEPT:
                _KEPT.clear()
            _KEPT[path] = seen, manifest
        return manifest


_KEPT: dict[Path, tuple[tuple[int, int, int, int], Manifest]] = {}
_MOST_KEPT = 4096
_SETTLED_NS = 50_000_000  # file systems' clocks tick every 10 ms or faster


def _files(data: object) -> dict[str, FileRecord]:
    if not isinstance(data, dict) or not data:
        raise CacheError("files must be an object with at least one file")
    files = {}
    for name, record in data.items():
        if not isinstance(record, dict) or set(record) != {"size", "sha256"}:
            raise CacheError(f"file {name!r} must have size and sha256")
        size, digest = record["size"], record["sha256"]
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not is_digest(digest):
            raise CacheError(f"file {name!r} has size {size!r} and sha256 {digest!r}")
        files[check_name(name)] = FileRecord(size, digest)
    for name in files:
        steps = name.split("/")
        for i in range(1, len(steps)):
            if "/".join(steps[:i]) in files:
                raise CacheError(f"{'/'.join(steps[:i])!r} is a file and a folder at once")
    return files


def seal(fields: dict[str, Any]) -> bytes:
    """JSON of ``fields`` with a last field ``check``, the SHA-256 of the rest."""
    text = json.dumps(fields, indent=1)
    check = hashlib.sha256(text.encode("ascii")).hexdigest()
    return json.dumps({**fields, "check": check}, indent=1).encode("ascii")


def unseal(data: bytes) -> dict[str, Any]:
    """The fields that :func:`seal` wrote; CacheError where a single bit differs."""
    if len(data) > MAX_BYTES:
        raise CacheError(f"it has more than {MAX_BYTES} bytes")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"it is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CacheError("it is not a JSON object")
    fields.pop("check", None)
    try:
        same = seal(fields) == data
    except (ValueError, TypeError, RecursionError):
        same = False
    if not same:
        raise CacheError("it does not have the digest that it names: it was damaged or edited")
    return fields
