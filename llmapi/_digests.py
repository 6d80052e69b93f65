"""The SHA-256 of files, remembered: a file of gigabytes is read once, not at every start.

A digest is remembered under the file's path together with its size, modification time, inode and device; when one of
these changed, the file is read again. Each path has a small JSON file of its own under the root, for the user only. It
is written under one temporary name for each path and renamed: a writer that is killed leaves at most that file, which
the next one overwrites, and what two writers make of it at once is a note that is not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

from llmapi.errors import SourceError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RACY_NS = 2_000_000_000
_CHUNK = 4 << 20


class DigestMemory:
    """Digests of files, remembered in the folder ``root``.

    Args:
        root: folder for the notes, made at the first one. Where it cannot be written, digests are simply computed.

    Attributes:
        hashed_files: files read by this object.
        hashed_bytes: bytes read by this object.
        remembered: answers given without reading the file.

    >>> memory = DigestMemory(Path("digests"))  # doctest: +SKIP
    >>> memory.sha256(Path("model.safetensors"))  # doctest: +SKIP
    'sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08'
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.hashed_files = 0
        self.hashed_bytes = 0
        self.remembered = 0
        self._counting = threading.Lock()

    def sha256(self, path: str | os.PathLike[str]) -> str:
        """``"sha256:<hex>"`` of the file at ``path``, which is read only when nothing true is remembered about it.

        A file of the hub's cache that the hub stores under its SHA-256 is not read at all.

        Raises:
            SourceError: the file cannot be read, or it changes while it is read.
        """
        path = Path(path)
        if (named := _hub_digest(path)) is not None:
            self._count(remembered=1)
            return f"sha256:{named}"
        try:
            real = path.resolve(strict=True)
            known = self._recall(real, _identity(real))
            if known is not None:
                self._count(remembered=1)
                return f"sha256:{known}"
            return f"sha256:{self._hash(real)}"
        except SourceError:
            raise
        except OSError as error:
            why = error.strerror or error
            raise SourceError(f"cannot read {path} ({why}); check that it exists and is readable") from error

    def prune(self) -> int:
        """Forget the files that are gone, and notes that cannot be read; returns how many notes were dropped."""
        dropped = 0
        for note in self.root.glob("??/*.json"):
            try:
                content = json.loads(note.read_text(encoding="utf-8"))
                alive = isinstance(content, dict) and Path(str(content["path"])).exists()
            except (OSError, ValueError, KeyError):
                alive = False
            if not alive:
                note.unlink(missing_ok=True)
                dropped += 1
        for leftover in self.root.glob("??/*.tmp"):  # of a writer that died; a live one needs milliseconds
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 60:
                    leftover.unlink()
        return dropped

    def _hash(self, path: Path) -> str:
        """Read the file; remember its digest unless it was touched so lately that a change could go unseen."""
        digest, size, started = hashlib.sha256(), 0, time.time_ns()
        with path.open("rb") as file:
            before = _identity(path)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
            after = _identity(path)
        self._count(hashed_files=1, hashed_bytes=size)
        if before != after or size != after["size"]:
            raise SourceError(f"{path} changed while it was read; wait until its writer has finished and try again")
        if started - after["mtime_ns"] > _RACY_NS:
            self._remember(path, after, digest.hexdigest())
        return digest.hexdigest()

    def _note(self, path: Path) -> Path:
        key = hashlib.sha256(os.fsencode(path)).hexdigest()
        return self.root / key[:2] / f"{key}.json"

    def _recall(self, path: Path, identity: dict[str, int]) -> str | None:
        try:
            note = json.loads(self._note(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("path") != str(path) or note.get("identity") != identity:
            return None
        value = note.get("sha256")
        return value if isinstance(value, str) and _SHA256.fullmatch(value) else None

    def _remember(self, path: Path, identity: dict[str, int], digest: str) -> None:
        note = self._note(path)
        text = json.dumps({"path": str(path), "identity": identity, "sha256": digest})
        temporary = note.with_suffix(".tmp")
        try:
            self.root.parent.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.root.parent, self.root, note.parent):  # the first is the cache's root
                folder.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, text.encode("utf-8"))
            finally:
                os.close(fd)
            temporary.replace(note)
        except (OSError, ValueError):  # read-only or full: the digest is right all the same
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _count(self, *, remembered: int = 0, hashed_files: int = 0, hashed_bytes: int = 0) -> None:
        with self._counting:
            self.remembered += remembered
            self.hashed_files += hashed_files
            self.hashed_bytes += hashed_bytes


def _identity(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _hub_digest(path: Path) -> str | None:
    """The SHA-256 in the blob's name, for a file of the hub's cache that is kept under it; else None.

    Only the link's first target counts: a blob may itself be a link into a store that is named by another hash.
    """
    if not path.is_symlink():
        return None
    blob = Path(os.path.normpath(path.parent / path.readlink()))
    in_cache = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    if in_cache and "snapshots" in path.parts and _SHA256.fullmatch(blob.name) and blob.is_file():
        return blob.name
    return None
