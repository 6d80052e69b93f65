"""Taking entries out of the store: those least recently used, those named, and those found corrupt.

Whoever moves or deletes an entry holds its key's lock, so nobody publishes it meanwhile; whoever deletes one also owns
its manifest's lock, which every open entry shares, so nobody is using it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmapi._build.store import disk as store_disk, lock as store_lock, staging as store_staging, use as store_use
from llmapi._build.store.disk import RESERVED_FILES, Layout, files_below, new_id
from llmapi._build.store.entry import name_of
from llmapi._build.store.manifest import Manifest
from llmapi.errors import CacheError

log = logging.getLogger(__name__)


DEFAULT_BUDGET = 50_000_000_000
"""Bytes the store may hold at least, where the disk allows it."""


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One line of a listing. Times are seconds since the epoch; sizes are bytes, the manifest not counted.

    ``tick`` orders entries by last use even where the clock went backwards.
    """

    kind: str
    digest: str
    label: str
    size: int
    created: float
    last_used: float
    hits: int
    tick: int
    manifest: Manifest

    def __str__(self) -> str:
        return name_of(self.kind, self.digest, self.label)


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a pruning did: entries removed, bytes freed, bytes left, and entries spared because they are in use."""

    removed: tuple[EntryInfo, ...]
    freed: int
    left: int
    in_use: tuple[EntryInfo, ...]


def list_entries(layout: Layout) -> list[EntryInfo]:
    """Every entry with a sound manifest, least recently used first."""
    found = []
    for m, path in manifests(layout):
        use = last_use(path, m)
        found.append(EntryInfo(m.kind, m.digest, m.label, m.size, m.created, use.time, use.hits, use.tick, m))
    return sorted(found, key=lambda e: (e.tick, e.kind, e.digest))


def manifests(layout: Layout, only: str | None = None) -> Iterator[tuple[Manifest, Path]]:
    """Every sound manifest, of one kind or of all, and its entry's folder."""
    for kind, digest, path in layout.folders(only):
        try:
            manifest = Manifest.read_again(path / "manifest.json")
        except (OSError, CacheError):
            continue
        if (manifest.kind, manifest.digest) == (kind, digest):
            yield manifest, path


def last_use(path: Path, manifest: Manifest) -> store_use.Use:
    """When an entry was used; where nothing tells, when it was made."""
    return store_use.read_use(path) or store_use.Use(0, max(0, int(manifest.created * 1e9)), manifest.created)


def in_use(layout: Layout, kind: str, digest: str) -> bool:
    """Whether any process holds the entry open."""
    manifest = layout.entry(kind, digest) / "manifest.json"
    with contextlib.suppress(OSError):
        fd = store_lock.own(manifest, tries=3)
        if fd is None:
            return manifest.exists()
        os.close(fd)
    return False


def evict(layout: Layout, kind: str, digest: str) -> bool:
    """Delete an entry that nobody uses or moves; whether that was so.

    It leaves in one rename, so no reader sees half of it. Files in its folder that the manifest does not declare stay.
    """
    path = layout.entry(kind, digest)
    with store_lock.try_briefly(layout.key_lock(kind, digest)) or contextlib.nullcontext() as lock:
        if lock is None:
            return False
        owned = store_lock.own(path / "manifest.json", tries=3)
        if owned is None:
            return False
        try:
            declared = {*Manifest.read(path / "manifest.json").files, *RESERVED_FILES}
            if set(files_below(path)) <= declared:
                with store_staging.Staging(layout) as trash:
                    path.replace(trash.path)
                    os.close(owned)  # who opened the manifest before may see now that it is gone
                    owned = None
                    store_disk.fsync_folder(path.parent)
            else:
                _delete_declared(path, declared)
        finally:
            if owned is not None:
                os.close(owned)
    return True


def _delete_declared(path: Path, names: set[str]) -> None:
    """Delete the named files and the folders left empty; the manifest first: without it there is no entry."""
    log.warning("%s holds files that llmapi did not write; they stay", path)
    for name in ["manifest.json", *sorted(names - {"manifest.json"})]:
        (path / name).unlink(missing_ok=True)
    for base, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            Path(base).rmdir()


def set_aside(layout: Layout, kind: str, digest: str) -> Path | None:
    """Move a corrupt entry, or a folder in its place, to quarantine; the caller holds its key's lock.

    Returns:
        where it went, or None where it cannot be moved (a root that may only be read) or is gone.
    """
    target = layout.quarantine / f"{kind}-{digest}-{new_id()}"
    try:
        layout.entry(kind, digest).rename(target)
    except OSError as error:
        log.warning("%s cannot be set aside: %s", layout.entry(kind, digest), error.strerror)
        return None
    return target


def quarantined(layout: Layout) -> list[tuple[Path, int]]:
    """Folders set aside that the store may delete, with their sizes, in the order of their last change.

    One without any manifest may hold somebody else's files, so it is not among them.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in layout.quarantine.iterdir():
            if path.is_dir() and not path.is_symlink() and (path / "manifest.json").is_file():
                with contextlib.suppress(OSError):
                    size = sum((path / n).lstat().st_size for n in files_below(path))
                    found.append((path.stat().st_mtime_ns, path, size))
    return [(path, size) for _, path, size in sorted(found)]


def default_budget(layout: Layout) -> int:
    """A fifth of the disk, and at least 50 GB where nine tenths of what is free or ours would still hold them."""
    held = sum(e.size for e in list_entries(layout))
    place = next(p for p in (layout.root, *layout.root.parents) if p.exists())
    disk = shutil.disk_usage(place)
    return max(disk.total // 5, min(DEFAULT_BUDGET, (disk.free + held) * 9 // 10))


def prune(layout: Layout, budget: int | None = None, *, lack: int = 0) -> PruneReport:
    """Delete until the store holds at most ``budget`` bytes: first what was set aside, then entries by last use.

    Args:
        budget: bytes; None means ``lack`` less than it holds now.
    """
    store_staging.sweep(layout)
    entries, aside = list_entries(layout), quarantined(layout)
    total = sum(e.size for e in entries) + sum(size for _, size in aside)
    budget = total - lack if budget is None else budget
    freed = 0
    for path, size in aside:
        if total - freed > budget:
            shutil.rmtree(path, ignore_errors=True)
            freed += size
    removed, spared = [], []
    for entry in entries:
        if total - freed <= budget:
            break
        if evict(layout, entry.kind, entry.digest):
            removed.append(entry)
            freed += entry.size
        elif (layout.entry(entry.kind, entry.digest) / "manifest.json").exists():
            spared.append(entry)
        else:  # another process was faster
            freed += entry.size
    return PruneReport(tuple(removed), freed, total - freed, tuple(spared))
