"""Archives: entries as one plain tar file, to move them to another machine.

The first member, ``llmapi-cache.json``, lists the entries; then come, for entry number i, ``<i>/manifest.json`` and
the files it declares, in its order. Nothing else is accepted on the way in: every member must be the very one expected
next, a plain file of the declared size and digest. Headers are read one block at a time, so no archive makes the reader
allocate or write more than the archive's own size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llmapi._build.store import disk as store_disk, errors as store_errors, staging as store_staging
from llmapi._build.store.disk import Layout, size_text
from llmapi._build.store.entry import Entry
from llmapi._build.store.manifest import MAX_BYTES, Manifest, seal, unseal
from llmapi.errors import CacheError

LOCAL_KINDS = ("cpu-kernels", "kernel", "plan", "runtime-cache")
"""Entries of these kinds hold machine code, for a processor or a GPU. No archive carries them: what comes from elsewhere
is never executed."""

_FORMAT = 1
_INDEX = "llmapi-cache.json"
_CHUNK = 1 << 20
_MAX_ENTRIES = 9999  # entry numbers have four digits, so that a name of MAX_NAME bytes fits a tar header


def write_archive(archive: Path, entries: Iterable[Entry]) -> int:
    """Write open entries to ``archive``, hashing them on the way; its size in bytes.

    Raises:
        CacheError: an entry is damaged, or the disk is full. No file is left then; one that was there before stays.
    """
    entries = list(entries)
    if not 0 < len(entries) <= _MAX_ENTRIES:
        raise CacheError(f"{len(entries)} entries: an archive holds 1 to {_MAX_ENTRIES}")
    local = [e for e in entries if e.kind in LOCAL_KINDS]
    if local:
        raise CacheError(
            f"{local[0]} holds code compiled for this machine, which is not exported: leave it out; the other machine "
            "compiles its own"
        )
    partial = archive.with_name(f".{archive.name}.{store_disk.new_id()}.partial")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb", _CHUNK) as out:
            index = [{"kind": e.kind, "digest": e.digest, "label": e.manifest.label} for e in entries]
            _write_bytes(out, _INDEX, seal({"format": _FORMAT, "entries": index}))
            for i, entry in enumerate(entries):
                _write_bytes(out, f"{i:04d}/manifest.json", entry.manifest.dump())
                for name in entry.manifest.files:
                    _write_entry_file(out, f"{i:04d}/{name}", entry, name)
            out.write(bytes(2 * tarfile.BLOCKSIZE))
            out.flush()
            os.fsync(fd)
            size = out.tell()
        partial.replace(archive)
        return size
    except OSError as error:
        if store_errors.is_disk_full(error):
            need = sum(e.manifest.size for e in entries)
            raise CacheError(
                f"the disk of {archive} is full: {size_text(need)} are needed, {size_text(_free(archive))} are free. "
                "Nothing was left behind. Free some space or name a file on another disk"
            ) from error
        raise CacheError(
            f"{archive} cannot be written: {error.strerror}; name a file in a folder you may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _free(archive: Path) -> int:
    return store_disk.free_bytes(archive.absolute().parent)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _write_bytes(out: BinaryIO, name: str, data: bytes) -> None:
    out.write(_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def _write_entry_file(out: BinaryIO, member: str, entry: Entry, name: str) -> None:
    record = entry.manifest.files[name]
    out.write(_header(member, record.size))
    h = hashlib.sha256()
    size = 0
    with entry.file(name).open("rb", buffering=0) as f:
        while data := f.read(_CHUNK):
            size += len(data)
            h.update(data)
            out.write(data)
    if (size, h.hexdigest()) != (record.size, record.sha256):
        raise CacheError(f"{name} of {entry} is damaged; run llmapi cache verify, and build the entry again")
    out.write(bytes(-size % tarfile.BLOCKSIZE))


def read_archive(
    layout: Layout,
    archive: Path,
    accept: Callable[[Manifest], str | None] | None,
    make_room: Callable[[int], None],
    publish: Callable[[store_staging.Staging, Manifest], Entry],
) -> list[Entry]:
    """Check an archive whole, then publish its entries.

    Args:
        accept: says why this machine cannot use an entry, or None where it can.
        publish: moves a filled staging folder into place.

    Raises:
        CacheError: it is no archive of ours, damaged, hostile or cannot be used here. Nothing is left then.
    """
    try:
        source = archive.open("rb")
    except OSError as error:
        raise CacheError(
            f"{archive} cannot be read: {error.strerror}; name a file made by llmapi cache export"
        ) from error
    with source, contextlib.ExitStack() as stagings:
        reader = _Reader(source, archive)
        ready = []
        for i, (kind, digest) in enumerate(_read_index(reader)):
            data = reader.small(f"{i:04d}/manifest.json")
            try:
                manifest = Manifest.load(data)
            except CacheError as error:
                raise reader.refuse(f"manifest {i}: {error}") from None
            if (manifest.kind, manifest.digest) != (kind, digest):
                raise reader.refuse(f"manifest {i} is that of another entry")
            if kind in LOCAL_KINDS:
                raise reader.refuse(f"entry {i} holds machine code ({kind}), which is only taken from this machine")
            if accept is not None and (reason := accept(manifest)):
                raise CacheError(
                    f"{archive} cannot be used on this machine: {manifest.kind} {manifest.label}: {reason}"
                )
            if manifest.size > reader.left:
                raise reader.refuse(f"entry {i} claims {size_text(manifest.size)}, more than the archive still holds")
            staging = stagings.enter_context(store_staging.Staging(layout, make_room))
            staging.need(manifest.size)
            for name, record in manifest.files.items():
                with staging.open(name) as out:
                    for piece in reader.member(f"{i:04d}/{name}", record.size):
                        out.write(piece)
                if out.sha256 != record.sha256:
                    raise reader.refuse(f"{name} of entry {i} does not have the digest that its manifest names")
            ready.append((staging, manifest))
        reader.end()
        entries: list[Entry] = []
        try:
            for staging, manifest in ready:
                entries.append(publish(staging, manifest))
        except BaseException:
            for entry in entries:
                entry.close()
            raise
        return entries


def _read_index(reader: _Reader) -> list[tuple[str, str]]:
    data = reader.small(_INDEX)
    try:
        index = unseal(data)
    except CacheError as error:
        raise reader.refuse(str(error)) from None
    if index.get("format") != _FORMAT:
        raise reader.refuse(f"it has format {index.get('format')!r}, this version reads {_FORMAT}")
    entries = index.get("entries")
    if not isinstance(entries, list) or not 0 < len(entries) <= _MAX_ENTRIES:
        raise reader.refuse("it lists no entries")
    found = [(e.get("kind"), e.get("digest")) for e in entries if isinstance(e, dict)]
    if len(found) != len(entries) or len(set(map(str, found))) != len(found):
        raise reader.refuse("its list of entries is not one")
    return [(str(kind), str(digest)) for kind, digest in found]


class _Reader:
    """Reads the members of a tar file in order, each of which the caller must expect by name and size."""

    def __init__(self, source: BinaryIO, archive: Path) -> None:
        self._source, self._archive = source, archive
        self._size = os.fstat(source.fileno()).st_size

    @property
    def left(self) -> int:
        """Bytes of the archive not read yet."""
        return self._size - self._source.tell()

    def refuse(self, reason: str) -> CacheError:
        return CacheError(f"{self._archive} is refused: {reason}. Nothing was imported; export it anew")

    def _next(self, name: str) -> int:
        """Size of the next member, which must be the plain file ``name``."""
        block = self._source.read(tarfile.BLOCKSIZE)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise self.refuse(f"it ends, or is damaged, where {name} should be ({error})") from None
        if info.name != name:
            raise self.refuse(f"it holds {info.name!r} where {name!r} should be")
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.linkname:
            raise self.refuse(f"{name!r} is no plain file")
        if not 0 <= info.size <= self.left:
            raise self.refuse(f"{name!r} claims {info.size} bytes, more than the archive still holds")
        return info.size

    def member(self, name: str, size: int) -> Iterator[bytes]:
        """The content of the next member, in pieces."""
        if (found := self._next(name)) != size:
            raise self.refuse(f"{name!r} has {found} bytes, its manifest says {size}")
        left = size
        while left:
            data = self._source.read(min(left, _CHUNK))
            if not data:
                raise self.refuse(f"it ends inside {name!r}")
            left -= len(data)
            yield data
        self._source.read(-size % tarfile.BLOCKSIZE)

    def small(self, name: str) -> bytes:
        """The whole content of the next member."""
        size = self._next(name)
        if size > MAX_BYTES:
            raise self.refuse(f"{name!r} has {size} bytes, at most {MAX_BYTES} are read")
        data = self._source.read(size)
        if len(data) != size:
            raise self.refuse(f"it ends inside {name!r}")
        self._source.read(-size % tarfile.BLOCKSIZE)
        return data

    def end(self) -> None:
        """Make sure that nothing undeclared follows."""
        while data := self._source.read(_CHUNK):
            if data.strip(b"\0"):
                raise self.refuse("it holds more than it declares")
