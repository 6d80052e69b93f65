"""The store: artifacts on disk, each found by the key of everything that shaped it.

>>> import tempfile
>>> store = Store(Path(tempfile.mkdtemp()) / "cache")
>>> def builder(staging: Staging) -> None:
...     with staging.open("engine.plan") as f:
...         _ = f.write(b"plan")
>>> with store.build("engine", Key.of(max_batch_size=8), "tiny", builder) as entry:
...     entry.file("engine.plan").read_bytes()
b'plan'
>>> store.get("engine", Key.of(max_batch_size=16))
>>> store.snapshot().lines[-1]
'miss: engine: nearest entry differs in max_batch_size: 8 -> 16'

``disk`` draws the layout; an entry is written in a staging folder and renamed into place, manifest last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmapi import _env
from llmapi._build.store import archive as store_archive, evict as store_evict, lock as store_lock, staging as store_staging
from llmapi._build.key import Key, PartDiff
from llmapi._build.store.disk import Layout, size_text
from llmapi._build.store.entry import Entry, name_of
from llmapi._build.store.errors import translated
from llmapi._build.store.evict import EntryInfo, PruneReport
from llmapi._build.store.manifest import Manifest
from llmapi._build.store.open import Damage, find
from llmapi._build.store.publish import publish
from llmapi._build.store.report import CacheReport, Counters
from llmapi._build.store.staging import Staging
from llmapi.errors import CacheError

__all__ = ["CacheReport", "Entry", "EntryInfo", "Manifest", "Problem", "PruneReport", "Staging", "Store"]

log = logging.getLogger(__name__)

_LIST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Problem:
    """An entry that :meth:`Store.verify` found damaged, and how; ``moved`` is where it was set aside."""

    kind: str
    digest: str
    reason: str
    moved: Path | None


class Store:
    """A build cache in a folder, shared by any number of processes and threads.

    Args:
        root: the folder. It is made when the first entry is built; nothing happens before.
        budget_bytes: what the store may hold before it deletes the entries that were not used for longest; default
            ``LLMAPI_CACHE_BYTES``, else a fifth of the disk, and at least 50 GB where the disk allows it.
    """

    LOCAL_KINDS = store_archive.LOCAL_KINDS  # entries of these are never exported or imported

    def __init__(self, root: Path, *, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise CacheError(f"budget_bytes={budget_bytes}: give a number of bytes, 0 or more, or None for the default")
        self.root = Path(root).absolute()
        self._layout = Layout(self.root)
        self._budget = budget_bytes
        self._counters = Counters()
        self._locks_work = False
        # Listing all entries takes a while, and a cold start builds a hundred: after a look at them there is none until
        # this object has built an eighth of what was left, or others have had time to build.
        self._unlisted, self._spare, self._list_at = 0, 0, 0.0

    # ---- finding and building

    def get(self, kind: str, key: Key, *, explain: bool = True) -> Entry | None:
        """Open the entry of ``key``, or None where there is none; a damaged one is set aside and counts as none.

        Files are checked by size; only small ones, and those written to since they were built, are hashed.

        Args:
            kind: "weights", "engine", "graph", ...
            explain: whether the line about a miss says which entry is nearest; that takes a look at all of the kind.
        """
        found = self._find(kind, key.digest)
        if isinstance(found, Entry):
            self._counters.add(f"hit: {found}", hits=1)
            return found
        line = f"miss: {kind}: {found or (self._why(kind, key) if explain else key.digest[:12])}"
        self._counters.add(line, misses=1)
        log.debug("%s", line)
        return None

    def build(
        self,
        kind: str,
        key: Key,
        label: str,
        builder: Callable[[Staging], None],
        *,
        on_wait: Callable[[float], None] | None = None,
        explain: bool = True,
    ) -> Entry:
        """Open the entry of ``key``; where there is none, build it, or wait for the process that is building it.

        Args:
            label: what people call the entry, such as the model's name; no part of the key.
            builder: writes the entry's files. Whatever it raises leaves nothing behind.
            on_wait: called with the seconds waited so far, up to five times a second, while another process builds.
            explain: see :meth:`get`.

        Raises:
            CacheError: the root cannot be written, its disk is full, or its file system has no usable locks.
        """
        with contextlib.suppress(OSError):
            store_staging.sweep(self._layout)
        existing = self.get(kind, key, explain=explain)
        if existing is not None:
            return existing
        label = label.encode("utf-8", "replace").decode()  # it ends up in terminals and logs
        waited = False

        def waiting(seconds: float) -> None:
            nonlocal waited
            if not waited:
                log.info("another process is building %s; waiting for it", name_of(kind, key.digest, label))
            waited = True
            if on_wait is not None:
                on_wait(seconds)

        self._prepare()
        with translated(self.root):
            lock = store_lock.wait_lock(self._layout.key_lock(kind, key.digest), waiting)
        with lock:
            found = self._find(kind, key.digest, lock=lock)
            if isinstance(found, Entry):
                self._counters.add(f"hit: {found}, built by another process meanwhile", waits=1)
                return found
            start = time.monotonic()
            with translated(self.root):
                staging = Staging(self._layout, self._make_room)
            with translated(self.root, lambda: (staging.needed, staging.written)), staging:
                builder(staging)
                entry = publish(
                    self._layout, staging, kind=kind, key=key, label=label, created=time.time(), version=_version()
                )
        size, seconds = entry.manifest.size, time.monotonic() - start
        self._counters.add(f"built: {entry}, {size_text(size)} in {seconds:.1f} s", builds=1, written_bytes=size)
        self._unlisted += size
        if self._unlisted > self._spare or time.monotonic() > self._list_at:
            with contextlib.suppress(OSError):
                self._prune(self.budget())
        return entry

    def nearest(self, kind: str, key: Key) -> tuple[Manifest, list[PartDiff]] | None:
        """The entry whose key differs in the fewest parts, and the differences from it to ``key``; None without any."""
        near: list[tuple[Manifest, list[PartDiff], Path]] = []
        for manifest, path in store_evict.manifests(self._layout, kind):
            diff = manifest.key.diff(key)
            if near and len(diff) < len(near[0][1]):
                near.clear()
            if not near or len(diff) == len(near[0][1]):
                near.append((manifest, diff, path))

        def rank(one: tuple[Manifest, list[PartDiff], Path]) -> tuple[int, int]:
            manifest, diff, path = one
            return sum(len(d.lines()) for d in diff), -store_evict.last_use(path, manifest).tick

        return min(near, key=rank)[:2] if near else None

    def snapshot(self) -> CacheReport:
        """What this object did so far."""
        return self._counters.report

    # ---- keeping house

    def entries(self) -> list[EntryInfo]:
        """Every sound entry, the least recently used first."""
        return store_evict.list_entries(self._layout)

    def in_use(self, entry: EntryInfo) -> bool:
        """Whether any process holds an entry open."""
        return store_evict.in_use(self._layout, entry.kind, entry.digest)

    def show(self, prefix: str) -> EntryInfo:
        """The entry whose digest starts with ``prefix`` (or ``kind/prefix``); CacheError for none or several."""
        kind, _, digits = prefix.rpartition("/")
        found = [e for e in self.entries() if digits and e.digest.startswith(digits) and kind in ("", e.kind)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise CacheError(f"no entry's digest starts with {prefix!r}; llmapi cache ls lists them")
        raise CacheError(f"{prefix!r} fits {', '.join(map(str, found))}; give more digits, or kind/digits")

    def remove(self, prefix: str) -> EntryInfo:
        """Delete the entry whose digest starts with ``prefix``; CacheError where it is in use."""
        entry = self.show(prefix)
        with translated(self.root):
            if store_evict.evict(self._layout, entry.kind, entry.digest):
                return entry
        raise CacheError(f"{entry} is in use; close the LLM or end the process that uses it, then remove it")

    def budget(self) -> int:
        """Bytes the store may hold."""
        if self._budget is not None:
            return self._budget
        given = _env.cache_bytes()
        return store_evict.default_budget(self._layout) if given is None else given

    def prune(self, budget: int | None = None) -> PruneReport:
        """Delete the least recently used entries until at most ``budget`` bytes are left; never one in use.

        Args:
            budget: bytes; default :meth:`budget`.
        """
        with translated(self.root):
            return self._prune(self.budget() if budget is None else budget)

    def verify(self, progress: Callable[[EntryInfo], None] | None = None) -> list[Problem]:
        """Hash every file of every entry; the damaged entries, which are set aside.

        Args:
            progress: told each sound-looking entry before it is hashed.
        """
        known = {(e.kind, e.digest): e for e in self.entries()}
        problems = []
        for kind, digest, path in self._layout.folders():
            if not (path / "manifest.json").exists():
                continue
            if progress is not None and (kind, digest) in known:
                progress(known[kind, digest])
            found = self._find(kind, digest, full=True)
            if isinstance(found, Entry):
                found.close()
            elif found is not None:
                problems.append(Problem(kind, digest, found.reason, found.moved))
        return problems

    # ---- moving entries between machines

    def export(self, prefixes: Iterable[str], archive: Path) -> int:
        """Write entries, named by the first digits of their digests, to one tar file; its size in bytes."""
        with contextlib.ExitStack() as held:
            entries = []
            for info in dict.fromkeys((e.kind, e.digest) for e in map(self.show, prefixes)):
                found = self._find(*info)
                if not isinstance(found, Entry):
                    raise CacheError(f"{name_of(*info, '')} cannot be exported: {found or 'it was removed meanwhile'}")
                entries.append(held.enter_context(found))
            return store_archive.write_archive(Path(archive), entries)

    def import_(self, archive: Path, accept: Callable[[Manifest], str | None] | None = None) -> list[EntryInfo]:
        """Take in the entries of an archive after checking all of it; entries that exist already are kept.

        Args:
            accept: says why this machine cannot use an entry, or None where it can; one reason refuses the archive.

        Raises:
            CacheError: the archive is damaged, hostile or cannot be used here; nothing of it is left then.
        """
        self._prepare()

        def take_in(staging: Staging, m: Manifest) -> Entry:
            with store_lock.wait_lock(self._layout.key_lock(m.kind, m.digest)) as lock:
                found = self._find(m.kind, m.digest, lock=lock)
                if isinstance(found, Entry):
                    return found
                self._counters.add(f"imported: {name_of(m.kind, m.digest, m.label)}", written_bytes=m.size)
                return publish(
                    self._layout, staging, kind=m.kind, key=m.key, label=m.label, created=m.created, version=m.version
                )

        with translated(self.root), contextlib.ExitStack() as held:
            entries = store_archive.read_archive(self._layout, Path(archive), accept, self._make_room, take_in)
            names = {(held.enter_context(e).kind, e.digest) for e in entries}
            return [e for e in self.entries() if (e.kind, e.digest) in names]

    # ---- inside

    def _find(
        self, kind: str, digest: str, *, lock: store_lock.FileLock | None = None, full: bool = False
    ) -> Entry | Damage | None:
        found = find(self._layout, kind, digest, lambda n: self._counters.add(hashed_bytes=n), lock=lock, full=full)
        if isinstance(found, Damage) and found.moved:
            self._counters.add(set_aside=1)
        return found

    def _why(self, kind: str, key: Key) -> str:
        near = self.nearest(kind, key)
        if near is None:
            return "no entry of this kind yet"
        return f"nearest entry differs in {'; '.join(map(str, near[1]))}" if near[1] else "another process moved it"

    def _prepare(self) -> None:
        """Make the folders, and refuse a file system whose locks do not work."""
        with translated(self.root, preparing=True):
            self._layout.prepare()
            if not self._locks_work:
                store_lock.check_locks(self._layout.locks)
                self._locks_work = True

    def _prune(self, budget: int | None, lack: int = 0) -> PruneReport:
        report = store_evict.prune(self._layout, budget, lack=lack)
        if budget is not None:
            self._unlisted, self._spare = 0, (budget - report.left) // 8
            self._list_at = time.monotonic() + _LIST_SECONDS
        for entry in report.removed:
            line = f"evicted: {entry}, {size_text(entry.size)}"
            log.info("%s", line)
            self._counters.add(line, evicted=1, evicted_bytes=entry.size)
        return report

    def _make_room(self, lack: int) -> None:
        with contextlib.suppress(OSError):
            self._prune(None, lack)


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("llmapi")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
