"""Finding an entry: open it, or set it aside where it is damaged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmapi._build.store import lock as store_lock, use as store_use
from llmapi._build.store.disk import Layout
from llmapi._build.store.entry import CorruptEntry, Entry, name_of, open_entry
from llmapi._build.store.evict import set_aside
from llmapi.errors import CacheError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Damage:
    """Why an entry that exists cannot be used, and where it was moved, if it was."""

    reason: str
    moved: Path | None = None

    def __str__(self) -> str:
        then = f"; it was set aside as {self.moved.name}" if self.moved else ""
        return f"the entry cannot be used: {self.reason}{then}"


def find(
    layout: Layout,
    kind: str,
    digest: str,
    hashed: Callable[[int], None],
    *,
    lock: store_lock.FileLock | None = None,
    full: bool = False,
) -> Entry | Damage | None:
    """Open an entry and note its use; None where there is none.

    Args:
        hashed: told the bytes of each file that had to be hashed.
        lock: the lock of the entry's key, where the caller holds it.
        full: hash every file; this does not count as a use.
    """
    found = _open(layout, kind, digest, hashed, full)
    if isinstance(found, Damage):
        with contextlib.ExitStack() as stack:
            if lock is None:
                own = None
                with contextlib.suppress(OSError):  # a root that may only be read
                    own = store_lock.try_briefly(layout.key_lock(kind, digest))
                if own is None:
                    return found
                stack.enter_context(own)
                # Another process may have replaced it before the lock was ours.
                again = _open(layout, kind, digest, hashed, full)
                if not isinstance(again, Damage):
                    return again
            moved = set_aside(layout, kind, digest)
            found = Damage(found.reason, moved)
            log.warning("%s: %s", name_of(kind, digest, ""), found)
    elif found is not None and not full:
        store_use.touch(layout, found.path)
    return found


def _open(layout: Layout, kind: str, digest: str, hashed: Callable[[int], None], full: bool) -> Entry | Damage | None:
    try:
        return open_entry(layout, kind, digest, hashed, full=full)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise CacheError(
            f"{layout.root} cannot be used as cache: {_file_in_the_way(error.filename)} is a file, not a folder; point LLMAPI_CACHE_DIR elsewhere"
        ) from error
    except OSError as error:
        return Damage(f"{error.filename} cannot be read ({error.strerror})")
    except CorruptEntry as error:
        return Damage(str(error))


def _file_in_the_way(path: str) -> Path:
    """The part of a path that is a file where a folder is needed."""
    return next((p for p in reversed(Path(path).parents) if p.is_file()), Path(path))
