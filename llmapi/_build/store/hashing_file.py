"""HashingFile: a file of an entry, hashed while it is written."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmapi._build.store.manifest import FileRecord

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER = 1 << 20
_PIECE = 8 << 20  # bytes of each buffer that is lent out
_PIECES = 4


class HashingFile(io.BufferedIOBase):
    """A binary file to write once, front to back, whose SHA-256 is known when it is closed.

    Large files go fastest through :meth:`borrow` and :meth:`give`: while the caller fills one buffer, others are being
    hashed and written by two threads.

    Args:
        path: a new file, made for the user only.
        note: told the file's record when it is closed whole.
    """

    def __init__(self, path: Path, note: Callable[[FileRecord], None]) -> None:
        self._note = note
        self._hash = hashlib.sha256()
        self._size = 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(fd, "wb", _BUFFER)
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._buffers: list[tuple[memoryview, list[Future[Any]]]] = []
        self._turn = 0

    def borrow(self) -> memoryview:
        """An empty buffer of 8 MiB to fill; :meth:`give` appends it to the file. One at a time.

        Raises:
            OSError: what was given before cannot be written.
        """
        if len(self._buffers) < _PIECES and self._turn == len(self._buffers):
            self._buffers.append((memoryview(mmap.mmap(-1, _PIECE)), []))
        buffer, pending = self._buffers[self._turn]
        _finish(pending)
        return buffer

    def give(self, size: int) -> None:
        """Append the first ``size`` bytes of the buffer borrowed last; it is not the caller's any more."""
        self._threads = self._threads or (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        hasher, writer = self._threads
        buffer, pending = self._buffers[self._turn]
        pending += [hasher.submit(self._hash.update, buffer[:size]), writer.submit(self._append, buffer[:size])]
        self._turn = (self._turn + 1) % _PIECES
        self._size += size

    def write(self, data: Buffer, /) -> int:
        """Append ``data`` (any object with a buffer) and return its size in bytes."""
        view = memoryview(data).cast("B")
        if len(view) < _BUFFER:
            self._settle()
            self._file.write(view)
            self._hash.update(view)
            self._size += len(view)
            return len(view)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self.borrow()[: len(piece)] = piece
            self.give(len(piece))
        return len(view)

    def _append(self, view: memoryview) -> None:
        """Write, and have the disk begin with it: else it would all wait for the end."""
        self._file.write(view)
        self._file.flush()
        if hasattr(os, "posix_fadvise"):  # dirty pages are not dropped by this, only sent on their way
            fd, end = self._file.fileno(), self._file.tell()
            os.posix_fadvise(fd, end - len(view), len(view), os.POSIX_FADV_DONTNEED)

    def _settle(self) -> None:
        """Wait until all that was given is hashed and written."""
        for _, pending in self._buffers:
            _finish(pending)

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written so far, in hex."""
        self._settle()
        return self._hash.hexdigest()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        if not self._file.closed:
            self._settle()
            self._file.flush()

    def abandon(self) -> None:
        """Close without keeping anything: the builder failed, and its folder goes."""
        self._stop_threads()
        try:
            self._file.close()
        finally:
            super().close()

    def close(self) -> None:
        """Make the file durable and note its digest; harmless when repeated."""
        if self.closed:
            return
        try:
            with self._file:
                try:
                    self._settle()
                finally:
                    self._stop_threads()
                self._file.flush()
                os.fsync(self._file.fileno())
            self._note(FileRecord(self._size, self._hash.hexdigest()))
        finally:
            super().close()

    def _stop_threads(self) -> None:
        for thread in self._threads or ():
            thread.shutdown()
        self._threads = None


def _finish(pending: list[Future[Any]]) -> None:
    """Wait for both, then raise what either met."""
    errors = [future.exception() for future in pending]
    pending.clear()
    for error in errors:
        if error is not None:
            raise error
