"""FileSpan: a tensor's bytes where they lie in a file, read in pieces without mapping the file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmapi.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_AHEAD = 32 << 20  # bytes that the system is asked to read before they are needed


@dataclass(frozen=True, slots=True)
class FileSpan:
    """A tensor as it lies in a file, row by row in the machine's byte order.

    Attributes:
        path: the file.
        offset: of the first byte.
        dtype: of the elements.
        shape: of the tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def rows(self, first: int, end: int) -> FileSpan:
        """The rows from ``first`` up to ``end``, cut to those that exist as slices are."""
        end = min(end, self.shape[0])
        first = min(first, end)
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return FileSpan(self.path, self.offset + first * row, self.dtype, (end - first, *self.shape[1:]))


class SpanReader:
    """Reads pieces of spans, of which one file at a time is open, and has the disk read ahead.

    Plain reads into a buffer are faster than copying out of a map: no page faults, and the disk is told what comes.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1

    def read(self, span: FileSpan, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of ``span`` from byte ``start`` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before.
        """
        try:
            if self._path != span.path:
                self.close()
                self._fd, self._path = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC), span.path
            at, done = span.offset + start, 0
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, at + len(into), _AHEAD, os.POSIX_FADV_WILLNEED)
            while done < len(into):
                count = os.preadv(self._fd, [into[done:]], at + done)
                if not count:
                    raise CheckpointError(
                        f"{span.path} ends at byte {at + done}, inside a tensor: it was cut short meanwhile; fetch or "
                        "copy it again"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{span.path} cannot be read ({error.strerror}); check the disk it is on") from error

    def close(self) -> None:
        """Let go of the open file; harmless when repeated."""
        if self._path is not None:
            os.close(self._fd)
            self._path = None

    def __enter__(self) -> SpanReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
