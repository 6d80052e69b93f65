"""Locks that die with their owner, on files, between processes, threads and hosts.

All of them are ``flock`` locks: the kernel frees them however their process ends, network file systems included, so a
lock never has to be judged by its age. ``filelock`` is not used because the store also needs shared locks, and because
it falls back to mere existence of a file, which outlives a killed builder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from llmapi._build.store.disk import new_id
from llmapi.errors import CacheError

if sys.platform != "win32":
    import fcntl

_CONTENTION = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.ESTALE}
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

_LOCAL_LOCKS = {
    *("fuse.sshfs", "fuse.s3fs", "fuse.goofys", "fuse.mount-s3", "fuse.gcsfuse"),
    *("fuse.rclone", "fuse.blobfuse", "fuse.blobfuse2", "vboxsf"),
}
"""File systems that several hosts may share and whose ``flock`` the kernel answers on each host alone."""

_held: set[int] = set()
_fork_guard = threading.Lock()
_fork_guarded = False


def _flock(fd: int, *, shared: bool = False, block: bool = False) -> bool:
    """Lock an open file; False where somebody else holds it."""
    if sys.platform == "win32":
        raise CacheError("the build cache needs POSIX file locks, which Windows lacks; use Linux or WSL")
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if block else fcntl.LOCK_NB)
    try:
        fcntl.flock(fd, operation)
    except OSError as error:
        if error.errno in _CONTENTION:
            return False
        raise
    return True


def no_locks(error: OSError) -> bool:
    """Whether ``error`` means that this file system has no locks at all."""
    return error.errno in _NO_LOCKS


def _same_file(fd: int, path: Path) -> bool:
    """Whether ``path`` still names the open file: its owner may have unlinked or replaced it meanwhile."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))  # noqa: PTH116  (pairs with fstat)
    except FileNotFoundError:
        return False


def _forget_after_fork() -> None:
    """Let go in a forked child, which must not keep the locks of a parent that dies."""
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


class FileLock:
    """An exclusive lock on a file, held from :func:`try_lock` or :func:`wait_lock` until :meth:`release`.

    The file is removed on release, while the lock is still held; who waited on it notices and starts over. A forked
    child does not own its parent's lock and cannot release it.
    """

    def __init__(self, path: Path, fd: int) -> None:
        global _fork_guarded
        self.path = path
        self._fd: int | None = fd
        self._pid = os.getpid()
        with _fork_guard:
            _held.add(fd)
            if not _fork_guarded and hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_forget_after_fork)
                _fork_guarded = True

    @property
    def mine(self) -> bool:
        """Whether this process holds the lock."""
        return self._fd is not None and self._pid == os.getpid()

    def release(self, *, keep_file: bool = False) -> None:
        """Free the lock; harmless when repeated."""
        if not self.mine:
            return
        assert self._fd is not None
        fd, self._fd = self._fd, None
        try:
            if not keep_file:
                with contextlib.suppress(OSError):
                    self.path.unlink()
        finally:
            _held.discard(fd)
            # Unlock first: a child that is between fork and exec still shares the open file.
            with contextlib.suppress(OSError):
                if sys.platform != "win32":
                    fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()  # Ctrl-C between taking the lock and entering its block must not hold it for ever


def try_lock(path: Path) -> FileLock | None:
    """Lock ``path``, made for the user only where it is missing; None while somebody else holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise
    try:
        if _flock(fd) and _same_file(fd, path):
            return FileLock(path, fd)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def try_briefly(path: Path, seconds: float = 1.0) -> FileLock | None:
    """Lock ``path``, waiting out those who hold it for a moment only, as sweepers do."""
    end = time.monotonic() + seconds
    while (lock := try_lock(path)) is None and time.monotonic() < end:
        time.sleep(0.002)
    return lock


def wait_lock(path: Path, on_wait: Callable[[float], None] | None = None) -> FileLock:
    """Lock ``path`` however long it takes; Ctrl-C ends the wait.

    Args:
        on_wait: called with the seconds waited so far, first when the lock turns out to be held, then at each look,
            up to five times a second. What it raises ends the wait.
    """
    start = time.monotonic()
    pause = 0.005
    while (lock := try_lock(path)) is None:
        if on_wait is not None:
            on_wait(time.monotonic() - start)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    return lock


def share(path: Path) -> int:
    """Hold ``path`` shared: a file descriptor whose life is the hold. Any number may share; none may own.

    Raises:
        FileNotFoundError: it does not exist, or was removed meanwhile.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    try:
        held = True
        try:
            held = _flock(fd, shared=True, block=True)
        except OSError as error:
            # A disk mounted read-only may refuse locks. Nobody can remove anything through it, so none is needed.
            if not _mounted_read_only(fd):
                raise CacheError(no_lock_text(path, str(error.strerror))) from error
        if not held or not _same_file(fd, path):
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def own(path: Path, tries: int = 1) -> int | None:
    """Own an existing file alone: a file descriptor to close, or None where anybody shares it or it is gone.

    Args:
        tries: how often to try, two milliseconds apart: listings own a manifest for microseconds.
    """
    for left in reversed(range(tries)):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return None
        try:
            if _flock(fd) and _same_file(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if left:
            time.sleep(0.002)
    return None


def own_waiting(fd: int) -> None:
    """Own an open file, once nobody else does. For holds of microseconds only."""
    _flock(fd, block=True)


def own_open_file(fd: int, path: Path) -> bool:
    """Own a file that was just made at ``path``; False where a sweeper was faster."""
    return _flock(fd) and _same_file(fd, path)


def _mounted_read_only(fd: int) -> bool:
    return hasattr(os, "fstatvfs") and bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def check_locks(folder: Path) -> None:
    """Refuse a folder on a file system where locks fail, do nothing, or hold on this host only though others share it.

    Raises:
        CacheError: with the reason and the remedy.
    """
    if reason := _mount_refusal(folder):
        raise CacheError(no_lock_text(folder, reason))
    for _ in range(50):
        path = folder / f"probe-{new_id()}.lock"
        try:
            with try_lock(path) or contextlib.nullcontext() as lock:
                if lock is None:
                    continue  # a sweeper took the fresh file for a leftover: try another
                with try_lock(path) or contextlib.nullcontext() as second:
                    if second is not None:
                        raise CacheError(no_lock_text(folder, "two owners could lock one file"))
                return
        except OSError as error:
            if no_locks(error):
                raise CacheError(no_lock_text(folder, str(error.strerror))) from error
            raise
        finally:
            path.unlink(missing_ok=True)
    raise CacheError(no_lock_text(folder, "locks on fresh files were refused"))


def no_lock_text(path: Path, reason: str) -> str:
    """What to tell about a file system without usable locks."""
    return (
        f"file locks do not work at {path} ({reason}), so builds of several processes could harm each other there. "
        "Point LLMAPI_CACHE_DIR at a local disk, or mount this one with locks"
    )


def _mount_refusal(folder: Path) -> str | None:
    """Why the mount below ``folder`` keeps its locks to this host, as far as Linux tells; else None."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        device = os.stat(folder).st_dev  # noqa: PTH116
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2:3] == [number]:
            kind, _, *options = right.split(" ", 2)
            return local_lock_reason(kind, options[0] if options else "")
    return None


def local_lock_reason(kind: str, options: str) -> str | None:
    """Why a mount of ``kind`` with ``options`` has locks that other hosts do not see; None where it has not.

    >>> local_lock_reason("nfs", "rw,vers=3,nolock,addr=10.0.0.1")
    'nfs is mounted with nolock: its locks hold on this host only'
    """
    bad = {
        "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
        "nfs4": {"nolock", "local_lock=flock", "local_lock=all"},
        "lustre": {"localflock", "noflock"},
        "cifs": {"nobrl"},
        "smb3": {"nobrl"},
        "ocfs2": {"localflocks"},
        "gfs2": {"localflocks"},
    }
    if kind in _LOCAL_LOCKS:
        return f"{kind} has no locks that other hosts see"
    found = bad.get(kind, set()) & set(options.split(","))
    return f"{kind} is mounted with {min(found)}: its locks hold on this host only" if found else None
