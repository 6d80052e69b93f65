"""An entry that is open: checked, and held against eviction until it is closed."""

from __future__ import annotations

import logging
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from llmapi._build.store import disk as store_disk, lock as store_lock, staging as store_staging
from llmapi._build.store.disk import Layout, size_text
from llmapi._build.store.manifest import Manifest, seal, unseal
from llmapi.errors import CacheError

log = logging.getLogger(__name__)

HASH_AT_OPEN = 1 << 20
"""Files up to this many bytes are hashed whenever an entry is opened; larger ones only when their time changed."""


class CorruptEntry(Exception):
    """An entry is damaged; the text says how."""


class Entry:
    """A complete entry of the store. As long as it is open, no process removes it.

    Attributes:
        kind: "weights", "engine", ...
        path: its folder. Take files from :meth:`file`.
        manifest: what it was made from and what it holds.

    Keep the object for as long as its files are in use; ``close()``, the end of a ``with`` block, garbage collection
    and the end of the process let go of it.
    """

    def __init__(self, path: Path, manifest: Manifest, hold: int) -> None:
        self.kind = manifest.kind
        self.path = path
        self.manifest = manifest
        self._let_go = weakref.finalize(self, os.close, hold)

    @property
    def digest(self) -> str:
        """The key's digest: 64 hex digits."""
        return self.path.name

    @property
    def closed(self) -> bool:
        """Whether the entry was let go of."""
        return not self._let_go.alive

    def file(self, name: str) -> Path:
        """The path of one of the entry's files.

        Raises:
            CacheError: the entry has no such file, is closed, or was deleted by hand while in use.
        """
        if name not in self.manifest.files:
            raise CacheError(f"{self} has no file {name!r}; it holds {', '.join(self.manifest.files)}")
        if self.closed:
            raise CacheError(f"{self} is closed; open it again with Store.get")
        path = self.path / name
        if not path.is_file():
            raise CacheError(f"{path} was deleted while in use; start again, and the entry is rebuilt")
        return path

    def close(self) -> None:
        """Let go of the entry; harmless when repeated. Files that are mapped stay readable."""
        self._let_go()

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __str__(self) -> str:
        return name_of(self.kind, self.digest, self.manifest.label)

    def __repr__(self) -> str:
        return f"<Entry {self}>"


def name_of(kind: str, digest: str, label: str) -> str:
    """How an entry is called in messages.

    >>> name_of("engine", "ab" * 32, "SmolLM2")
    'engine abababababab (SmolLM2)'
    """
    return f"{kind} {digest[:12]}" + (f" ({label})" if label else "")


def open_entry(layout: Layout, kind: str, digest: str, hashed: Callable[[int], None], *, full: bool = False) -> Entry:
    """Open and check an entry.

    Args:
        hashed: told the bytes of each file that had to be hashed.
        full: hash every file, however large and unchanged.

    Raises:
        FileNotFoundError: there is none.
        CorruptEntry: it is damaged.
    """
    path = layout.entry(kind, digest)
    hold = store_lock.share(path / "manifest.json")
    try:
        try:
            manifest = Manifest.read(path / "manifest.json")
        except CacheError as error:
            raise CorruptEntry(f"manifest.json is damaged: {error}") from None
        if (manifest.kind, manifest.digest) != (kind, digest):
            raise CorruptEntry(f"manifest.json is that of {name_of(manifest.kind, manifest.digest, manifest.label)}")
        _check_files(layout, path, manifest, hashed, full)
        return Entry(path, manifest, hold)
    except BaseException:
        os.close(hold)
        raise


def _check_files(layout: Layout, path: Path, manifest: Manifest, hashed: Callable[[int], None], full: bool) -> None:
    """Compare sizes, and hash what is small or was written to since it was last known to be right."""
    stamps = read_stamps(path)
    fresh = dict(stamps)
    for name, record in manifest.files.items():
        file = path / name
        try:
            info = file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptEntry(f"{name} is missing") from None
        if not stat.S_ISREG(info.st_mode):
            raise CorruptEntry(f"{name} is not a plain file")
        if info.st_size != record.size:
            raise CorruptEntry(f"{name} has {info.st_size} bytes, its manifest says {record.size}")
        changed = not _same_time(stamps.get(name), info.st_mtime_ns)
        if full or changed or record.size <= HASH_AT_OPEN:
            if changed and record.size > HASH_AT_OPEN:
                log.info("%s: its time changed; hashing its %s again", file, size_text(record.size))
            hashed(record.size)
            try:
                digest = store_disk.hash_file(file)
            except OSError as error:
                raise CorruptEntry(f"{name} cannot be read: {error.strerror}") from error
            if digest != record.sha256:
                raise CorruptEntry(f"the content of {name} does not have the digest that its manifest names")
            fresh[name] = info.st_mtime_ns
    if fresh != stamps:
        try:
            store_staging.replace_file(layout, path / "stamps.json", dump_stamps(fresh))
        except OSError as error:
            log.debug("%s: cannot remember the times of its files: %s", path, error)


def _same_time(stamp: int | None, mtime_ns: int) -> bool:
    """Whether a file's time is the one on record; archives and images keep whole seconds only."""
    if stamp is None:
        return False
    return stamp == mtime_ns or (mtime_ns % 10**9 == 0 and stamp // 10**9 == mtime_ns // 10**9)


def dump_stamps(times: dict[str, int]) -> bytes:
    """The file ``stamps.json``: when each file had the content that its manifest names (mtime in nanoseconds)."""
    return seal({"mtime_ns": times})


def read_stamps(path: Path) -> dict[str, int]:
    """What ``stamps.json`` in the folder ``path`` says; nothing where it is missing or damaged."""
    try:
        times = unseal((path / "stamps.json").read_bytes()).get("mtime_ns")
    except (OSError, CacheError):
        return {}
    return {n: t for n, t in times.items() if isinstance(t, int)} if isinstance(times, dict) else {}
