"""A staging folder: an entry while it is being written, on the file system where it will live.

Its lock is taken before the folder is made and given back after the folder is gone, so a folder whose lock is free
belongs to nobody alive, on any host, and :func:`sweep` may delete it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from llmapi._build.store import disk as store_disk, errors as store_errors, lock as store_lock
from llmapi._build.store.disk import Layout, check_name
from llmapi._build.store.hashing_file import HashingFile
from llmapi._build.store.manifest import FileRecord
from llmapi.errors import CacheError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_OURS = re.compile(r"([0-9a-f]{32})(\.lock|\.tmp)?")
_OUR_LOCKS = re.compile(r"([a-z][a-z0-9_-]{0,31}-[0-9a-f]{64}|probe-[0-9a-f]{32}|prune)\.lock")


class Staging:
    """The folder a builder fills.

    Attributes:
        path: write files here, directly or with :meth:`open`.

    Example, as a builder::

        def builder(staging: Staging) -> None:
            staging.need(len(plan))
            with staging.open("engine.plan") as f:
                f.write(plan)
            safetensors.torch.save_file(tensors, staging.path / "tables.safetensors")
    """

    def __init__(self, layout: Layout, make_room: Callable[[int], None] | None = None) -> None:
        self._layout = layout
        self._make_room = make_room
        self._known: dict[str, tuple[FileRecord, int]] = {}  # the record, and the file's mtime when it was taken
        self._open: dict[str, HashingFile] = {}
        self._written = 0
        self.needed: int | None = None
        lock = None
        while lock is None:  # a sweeper may hold the fresh file for a moment
            self.path = layout.staging / store_disk.new_id()
            lock = store_lock.try_lock(self.path.with_suffix(".lock"))
        self._lock = lock

    def open(self, name: str) -> HashingFile:
        """A new file of the entry, hashed while it is written; folders in ``name`` are made.

        Raises:
            CacheError: the name cannot be in an entry, see ``check_name``.
            FileExistsError: it was written before.
        """
        file = HashingFile(self.file(name), lambda record: self._note(name, record))
        self._open[name] = file
        return file

    def write(self, name: str, data: Buffer) -> None:
        """A new file of the entry with the content ``data``."""
        with self.open(name) as f:
            f.write(data)

    def file(self, name: str) -> Path:
        """The path of ``name`` for code that opens files itself; folders in ``name`` are made."""
        path = self.path / check_name(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def need(self, size: int) -> None:
        """Say that ``size`` bytes in all are about to be written, before the work that makes them.

        Old entries make room where the disk is short of it.

        Raises:
            CacheError: the disk cannot take them.
        """
        self.needed = size
        lack = size - store_disk.free_bytes(self.path)
        if lack > 0 and self._make_room is not None:
            self._make_room(lack)
            lack = size - store_disk.free_bytes(self.path)
        if lack > 0:
            raise store_errors.disk_full(self._layout.root, size, self.written)

    @property
    def written(self) -> int:
        """Bytes in the folder now, or when it was given up."""
        with contextlib.suppress(OSError):
            now = sum((self.path / n).lstat().st_size for n in store_disk.files_below(self.path))
            self._written = max(now, self._written)
        return self._written

    def _note(self, name: str, record: FileRecord) -> None:
        self._known[name] = (record, (self.path / name).stat().st_mtime_ns)

    def finish(self) -> tuple[dict[str, FileRecord], dict[str, int]]:
        """Make every file durable and private; its record and its mtime, by name.

        Raises:
            CacheError: the builder left a link, a device or an open file, or wrote nothing.
        """
        names = store_disk.files_below(self.path)
        if not names:
            raise CacheError("the builder wrote no file, and an entry needs at least one")
        for name, file in self._open.items():
            if not file.closed:
                raise CacheError(f"the builder left {name!r} open; close it, best with a with statement")
        records, times = {}, {}
        for name in names:
            path = self.path / check_name(name)
            info = path.lstat()
            if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
                raise CacheError(f"the builder left {name!r}, which is a link or no plain file; write a copy")
            path.chmod(0o600)
            known = self._known.get(name)
            if known is None or known[0].size != info.st_size or known[1] != info.st_mtime_ns:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                with os.fdopen(fd, "rb", buffering=0) as f:
                    os.fsync(fd)
                    known = (FileRecord(info.st_size, hashlib.file_digest(f, "sha256").hexdigest()), info.st_mtime_ns)
            records[name], times[name] = known[0], path.lstat().st_mtime_ns
        for base, folders, _ in os.walk(self.path):
            for folder in folders:
                (Path(base) / folder).chmod(0o700)
                store_disk.fsync_folder(Path(base) / folder)
        return records, times

    def close(self) -> None:
        """Delete whatever is left in the folder and free its lock."""
        if not self._lock.mine:  # a forked child: the folder is its parent's
            return
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.abandon()
        try:
            _ = self.written
            store_disk.remove_tree(self.path)
        finally:
            self._lock.release(keep_file=self.path.exists())

    def __enter__(self) -> Staging:
        try:
            self.path.mkdir(mode=0o700)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def replace_file(layout: Layout, target: Path, data: bytes) -> None:
    """Write ``target`` so that every reader sees either the old file or the new one."""
    while True:
        temporary = layout.staging / f"{store_disk.new_id()}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as f:
            if not store_lock.own_open_file(fd, temporary):  # a sweeper was faster: start over
                continue
            try:
                f.write(data)
                f.flush()
                os.fsync(fd)
                temporary.replace(target)
                return
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def sweep(layout: Layout) -> int:
    """Delete what dead processes left behind in staging and locks; how many things that was.

    Only names that the store gives are looked at, and only those whose lock is free.
    """
    swept = 0
    for stem in {m[1] for p in _list(layout.staging) if (m := _OURS.fullmatch(p.name)) and m[2] != ".tmp"}:
        lock = store_lock.try_lock(layout.staging / f"{stem}.lock")
        if lock is not None:
            store_disk.remove_tree(layout.staging / stem)
            lock.release(keep_file=(layout.staging / stem).exists())
            swept += 1
    for path in _list(layout.staging):
        if (m := _OURS.fullmatch(path.name)) and m[2] == ".tmp" and (fd := store_lock.own(path)) is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)
            swept += 1
    for path in _list(layout.locks):
        if _OUR_LOCKS.fullmatch(path.name) and (lock := store_lock.try_lock(path)) is not None:
            lock.release()
            swept += 1
    return swept


def _list(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
