"""One safetensors file: written tensor by tensor in a chosen order, read as views of one memory map.

The order is ours, not the library's: tensors that are merged (q/k/v, gate/up) lie one after the other, so that the
merged tensor is a view too. The file is plain safetensors; any reader of the format reads it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from llmapi._build.file_span import FileSpan, SpanReader
from llmapi.errors import CacheError

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNMENT = 4096  # of the first tensor; the format allows spaces after the header
_CHUNK = 8 << 20  # bytes cast and written at once


class SupportsWrite(Protocol):
    """A file, or whatever else bytes can be written to."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Write all of ``data``."""


@runtime_checkable
class SupportsBorrow(Protocol):
    """A file that lends buffers to be filled: the fast way to write much."""

    def borrow(self) -> memoryview:
        """An empty buffer, the caller's until it is given back."""

    def give(self, size: int) -> None:
        """Append the first ``size`` bytes of the borrowed buffer."""


Value: TypeAlias = torch.Tensor | FileSpan
"""A tensor to be written: in memory, or still in its file."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * (4 if self.dtype == "float32" else 2)


def write_tensors(out: SupportsWrite, specs: Sequence[TensorSpec], value: Callable[[TensorSpec], Value]) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        out: where to.
        specs: all tensors, in the file's order.
        value: gives the tensor of a spec, of its shape and any dtype; asked in that order, and nothing it gave is kept.
    """
    header: dict[str, object] = {}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    out.write(len(text).to_bytes(8, "little") + text)
    with SpanReader() as reader:
        writer = _Writer(out, reader)
        for spec in specs:
            writer.write(spec, value(spec))


class _Writer:
    """Casts tensors, read or given, into the buffers of a file, a few rows at a time."""

    def __init__(self, out: SupportsWrite, reader: SpanReader) -> None:
        self._out, self._reader = out, reader
        self._own = memoryview(bytearray(0 if isinstance(out, SupportsBorrow) else _CHUNK))
        self._raw = memoryview(b"")  # what is read before it is cast; made when first needed

    def write(self, spec: TensorSpec, tensor: Value) -> None:
        """Append one tensor."""
        assert tuple(tensor.shape) == spec.shape, f"{spec} is given {list(tensor.shape)}"
        dtype = getattr(torch, spec.dtype)
        if isinstance(tensor, FileSpan):
            self._write_span(tensor, dtype)
        elif tensor.numel():
            self._write_tensor(tensor.reshape(spec.shape[0], -1) if len(spec.shape) > 1 else tensor.reshape(1, -1), dtype)

    def _write_tensor(self, table: torch.Tensor, dtype: torch.dtype) -> None:
        columns = max(1, table.shape[1])
        for wide in torch.split(table, max(1, _CHUNK // dtype.itemsize // columns)):
            for piece in torch.split(wide, _CHUNK // dtype.itemsize, 1) if len(wide) == 1 else (wide,):
                size = piece.numel() * dtype.itemsize
                _tensor(self._borrow()[:size], dtype).view(piece.shape).copy_(piece)
                self._give(size)

    def _write_span(self, span: FileSpan, dtype: torch.dtype) -> None:
        count, at = span.nbytes // span.dtype.itemsize, 0
        step = _CHUNK // max(dtype.itemsize, span.dtype.itemsize)
        while at < count:
            now = min(step, count - at)
            start, size = at * span.dtype.itemsize, now * span.dtype.itemsize
            buffer = self._borrow()
            if span.dtype == dtype:
                self._reader.read(span, start, buffer[:size])
            else:
                if not self._raw:
                    self._raw = memoryview(bytearray(_CHUNK))
                self._reader.read(span, start, self._raw[:size])
                _tensor(buffer[: now * dtype.itemsize], dtype).copy_(_tensor(self._raw[:size], span.dtype))
            self._give(now * dtype.itemsize)
            at += now

    def _borrow(self) -> memoryview:
        return self._out.borrow()[:_CHUNK] if isinstance(self._out, SupportsBorrow) else self._own

    def _give(self, size: int) -> None:
        if isinstance(self._out, SupportsBorrow):
            self._out.give(size)
        else:
            self._out.write(self._own[:size])


def _tensor(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=dtype)


class TensorFile:
    """A mapped safetensors file.

    Args:
        path: the file.

    Raises:
        CacheError: it is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._base = 8 + size
            total = path.stat().st_size
            try:
                self._header: Mapping[str, dict[str, list[int]]] = json.loads(file.read(min(size, total)))
                end = max((e["data_offsets"][1] for e in self._header.values()), default=0)
            except (ValueError, KeyError, TypeError) as error:
                raise CacheError(f"{path} is not a safetensors file ({error}): remove it and build again") from error
        if self._base + end != total:
            raise CacheError(f"{path} has {total} bytes instead of {self._base + end}: remove it and build again")
        self._bytes = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)
        self.path = path

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._bytes.numel()

    def moved(self, data: torch.Tensor) -> TensorFile:
        """The same tensors, as views of a copy of the file's bytes.

        Args:
            data: ``[nbytes]`` uint8 on any device, aligned to 16 bytes.
        """
        other = copy.copy(self)
        other._bytes = data
        return other

    def names(self) -> list[str]:
        """Every tensor's name, in the file's order."""
        return list(self._header)

    def read(self, parts: Sequence[str]) -> torch.Tensor:
        """A tensor, or several one below the other: a view of the map where they lie so, and aligned.

        Args:
            parts: names, of one dtype and of equal trailing sizes.
        """
        entries = [self._header[name] for name in parts]
        starts = [e["data_offsets"][0] for e in entries]
        ends = [e["data_offsets"][1] for e in entries]
        if starts[1:] != ends[:-1]:
            return torch.cat([self.read([name]) for name in parts])
        dtype = _DTYPES[str(entries[0]["dtype"])]
        rows = sum(e["shape"][0] for e in entries)
        raw = self._bytes[self._base + starts[0] : self._base + ends[-1]]
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()  # behind a tensor of a narrower type
        return raw.view(dtype).view(rows, *entries[0]["shape"][1:])
