"""What a disk can answer, as errors that tell what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from llmapi._build.store.disk import free_bytes, size_text
from llmapi.errors import CacheError


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that nothing more can be written. Libraries that write through
    native code report it only in their text."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, OSError) and seen.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return True
        if isinstance(seen, Exception) and "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def disk_full(root: Path, needed: int | None, written: int) -> CacheError:
    """The error for a disk that cannot take an entry of ``needed`` bytes, of which ``written`` were written."""
    want = f"more than {size_text(written)}" if needed is None else size_text(needed)
    return CacheError(
        f"the disk of the cache is full: an entry needs {want}, {size_text(free_bytes(root))} are free at {root}. "
        "Nothing was left behind. Free some space (llmapi cache prune), or point LLMAPI_CACHE_DIR at a larger disk"
    )


@contextlib.contextmanager
def translated(
    root: Path, sizes: Callable[[], tuple[int | None, int]] = lambda: (None, 0), *, preparing: bool = False
) -> Iterator[None]:
    """Turn a full disk, and a root that cannot be written, into :class:`CacheError`; anything else passes.

    Args:
        sizes: bytes needed, where that is known, and bytes written.
        preparing: the block only makes folders, so the root's parents and files in the way are meant too.
    """
    try:
        yield
    except CacheError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(root, *sizes()) from error
        # An error about a path outside the root is the builder's own.
        if isinstance(error, OSError) and (preparing or _inside(root, error.filename)):
            if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
                raise CacheError(
                    f"the cache root {root} cannot be written ({error.strerror}): entries in it can be used, new ones "
                    "cannot be added. Point LLMAPI_CACHE_DIR at a folder you may write"
                ) from error
            if preparing and error.errno in {errno.ENOTDIR, errno.EEXIST}:
                raise CacheError(
                    f"{error.filename} is where the cache needs a folder; move it, or point LLMAPI_CACHE_DIR elsewhere"
                ) from error
            if preparing:
                raise CacheError(
                    f"the cache root {root} cannot be made ({error.strerror}): point LLMAPI_CACHE_DIR at a folder "
                    "you may write"
                ) from error
        raise


def _inside(root: Path, filename: object) -> bool:
    return isinstance(filename, str) and Path(filename).is_relative_to(root)
