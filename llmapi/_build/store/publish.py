"""Publishing: from a filled staging folder to an entry, in one rename."""

from __future__ import annotations

import errno
import os

from llmapi._build.store import disk as store_disk, lock as store_lock, use as store_use
from llmapi._build.key import Key
from llmapi._build.store.disk import Layout
from llmapi._build.store.entry import Entry, dump_stamps
from llmapi._build.store.evict import set_aside
from llmapi._build.store.manifest import Manifest
from llmapi._build.store.staging import Staging
from llmapi.errors import CacheError


def publish(
    layout: Layout, staging: Staging, *, kind: str, key: Key, label: str, created: float, version: str
) -> Entry:
    """Make everything in ``staging`` durable, move it into place and open it; the caller holds the key's lock.

    A power cut leaves either the whole entry or none: files first, then the manifest, then the folder's name.
    """
    records, times = staging.finish()
    manifest = Manifest(kind, key, records, label, created, version)
    store_disk.write_file(staging.path / "stamps.json", dump_stamps(times))
    store_disk.write_file(staging.path / "use.json", store_use.first_use(layout))
    store_disk.write_file(staging.path / "manifest.json", manifest.dump())
    store_disk.fsync_folder(staging.path)
    # Held before it has its name: nobody can evict it between its publication and its first use.
    hold = store_lock.share(staging.path / "manifest.json")
    try:
        target = layout.entry(kind, key.digest)
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            store_disk.fsync_folder(layout.top)
        try:
            staging.path.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            # No sound entry is there, or it would have been used: it is damaged, or somebody else's files.
            if set_aside(layout, kind, key.digest) is None:
                raise CacheError(f"{target} is in the way of a new entry and cannot be moved; delete it") from error
            staging.path.rename(target)
        store_disk.fsync_folder(target.parent)
        return Entry(target, manifest, hold)
    except BaseException:
        os.close(hold)
        raise
