"""Where the store keeps things on disk, with the few file operations it needs.

    <root>/v1/<kind>/<digest>/     an entry: manifest.json, stamps.json, use.json and its declared files
    <root>/v1/staging/<id>[.lock]  an entry being written, or one being deleted; the lock is held while its owner lives
    <root>/v1/staging/<id>.tmp     one small file being written, itself locked while its owner lives
    <root>/v1/locks/*.lock         one for each key being built, moved or deleted
    <root>/v1/quarantine/*         corrupt entries that were set aside
    <root>/v1/clock                the last tick of the store's own clock

Everything else under the root belongs to somebody else and is never touched, other ``v<n>`` folders included.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmapi.errors import CacheError

SCHEMA = 1
"""Layout of the store and of its manifests. Another schema lives in another folder and never sees this one."""

RESERVED_FILES = frozenset({"manifest.json", "stamps.json", "use.json"})
RESERVED_KINDS = frozenset({"staging", "locks", "quarantine", "clock"})
MAX_NAME = 90  # bytes of a file's name: with its prefix it must fit the 100 bytes of a tar header

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one store."""

    root: Path

    @property
    def top(self) -> Path:
        return self.root / f"v{SCHEMA}"

    @property
    def staging(self) -> Path:
        return self.top / "staging"

    @property
    def locks(self) -> Path:
        return self.top / "locks"

    @property
    def quarantine(self) -> Path:
        return self.top / "quarantine"

    @property
    def clock(self) -> Path:
        return self.top / "clock"

    def entry(self, kind: str, digest: str) -> Path:
        return self.top / check_kind(kind) / digest

    def key_lock(self, kind: str, digest: str) -> Path:
        return self.locks / f"{check_kind(kind)}-{digest}.lock"

    def prepare(self) -> None:
        """Make the folders a writer needs, for the user only."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, self.top, self.staging, self.locks, self.quarantine):
            folder.mkdir(mode=0o700, exist_ok=True)

    def folders(self, only: str | None = None) -> Iterator[tuple[str, str, Path]]:
        """``(kind, digest, path)`` of everything that looks like an entry of this kind, or of any, in a stable order."""
        for kind in _names(self.top) if only is None else [only]:
            if is_kind(kind):
                for digest in _names(self.top / kind):
                    path = self.top / kind / digest
                    if is_digest(digest) and path.is_dir() and not path.is_symlink():
                        yield kind, digest, path


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  (names are all we want)
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_kind(text: str) -> bool:
    return _KIND.fullmatch(text) is not None and text not in RESERVED_KINDS


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def check_kind(kind: str) -> str:
    """``kind`` itself, or CacheError where it cannot name a folder of entries."""
    if not is_kind(kind):
        raise CacheError(
            f"kind {kind!r}: use lower-case letters, digits, - and _, at most 32, other than "
            f"{', '.join(sorted(RESERVED_KINDS))}"
        )
    return kind


def check_name(name: object) -> str:
    """``name`` itself where it may name a file inside an entry: a relative path with ``/``, or CacheError."""
    if isinstance(name, str) and 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME and name.isprintable():
        steps = name.split("/")
        plain = all(s and s == s.rstrip(" .") for s in steps)  # neither empty, ".", ".." nor ambiguous on Windows
        if plain and not set('\\:*?"<>|') & set(name) and steps[0].lower() not in RESERVED_FILES:
            return name
    raise CacheError(
        f"file name {name!r}: an entry takes relative paths of at most {MAX_NAME} printable bytes, without '..' or "
        f"'\\', other than {', '.join(sorted(RESERVED_FILES))}"
    )


def new_id() -> str:
    """A name nobody else uses, also on another host."""
    return uuid.uuid4().hex


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a new, durable file for the user only."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def hash_file(path: Path) -> str:
    """SHA-256 of a file that must not be a link."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(fd, "rb", buffering=0) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Names of everything below ``folder`` that is not a real folder, with ``/``, sorted."""
    found = []
    for base, folders, files in os.walk(folder):
        links = [d for d in folders if (Path(base) / d).is_symlink()]
        found += [(Path(base) / f).relative_to(folder).as_posix() for f in [*files, *links]]
    return sorted(found)


def remove_tree(path: Path) -> None:
    """Delete a folder, or what of it can be deleted; links are removed, never followed."""
    shutil.rmtree(path, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of ``path``, or of the nearest folder above that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def size_text(n: int) -> str:
    """
    >>> size_text(999), size_text(1_500_000), size_text(13_476_000_000)
    ('999 bytes', '1.5 MB', '13.5 GB')
    """
    if n < 1000:
        return f"{n} bytes"
    value = float(n)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"
