"""Digests of files are right, remembered, and never remembered wrongly."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from llmapi._digests import DigestMemory
from llmapi.errors import SourceError

HOUR_AGO = time.time() - 3600


def put(path: Path, content: bytes, when: float = HOUR_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (when, when))
    return path


def sha(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def notes(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


def test_reads_once_and_remembers_across_objects(tmp_path: Path) -> None:
    content = os.urandom(9_000_001)  # more than one piece
    file = put(tmp_path / "w.bin", content)
    first = DigestMemory(tmp_path / "notes")
    assert first.sha256(file) == first.sha256(str(file)) == sha(content)
    assert (first.hashed_files, first.hashed_bytes, first.remembered) == (1, len(content), 1)
    second = DigestMemory(tmp_path / "notes")
    assert second.sha256(file) == sha(content)
    assert (second.hashed_files, second.hashed_bytes, second.remembered) == (0, 0, 1)
    assert [p.suffix for p in notes(tmp_path / "notes")] == [".json"]


def test_making_one_touches_nothing(tmp_path: Path) -> None:
    DigestMemory(tmp_path / "notes").prune()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_a_changed_file_is_read_again(change: str, tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "notes")
    file = put(tmp_path / "w.bin", b"old!")
    assert memory.sha256(file) == sha(b"old!")
    if change == "size":
        put(file, b"newer")
    elif change == "mtime":
        put(file, b"new!", HOUR_AGO + 1e-3)
    else:  # same size, same time, another file in its place
        put(tmp_path / "other", b"new!").replace(file)
    assert memory.sha256(file) == sha(file.read_bytes()) != sha(b"old!")
    assert memory.hashed_files == 2


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    """Within the timestamp's grain a second write could leave size and time as they are."""
    memory = DigestMemory(tmp_path / "notes")
    file = put(tmp_path / "w.bin", b"old!", time.time() - 0.5)
    status = file.stat()
    assert memory.sha256(file) == sha(b"old!")
    assert notes(tmp_path / "notes") == []
    file.write_bytes(b"new!")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert memory.sha256(file) == sha(b"new!")


def test_a_time_in_the_future_is_not_remembered(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "notes")
    memory.sha256(put(tmp_path / "w.bin", b"x", time.time() + 3600))
    assert notes(tmp_path / "notes") == []


@pytest.mark.parametrize("note", ["", "{", "[]", '{"path": 1}', '{"sha256": "x"}'])
def test_a_broken_note_is_as_none(note: str, tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "notes")
    file = put(tmp_path / "w.bin", b"content")
    memory.sha256(file)
    (path,) = notes(tmp_path / "notes")
    path.write_text(note)
    assert memory.sha256(file) == sha(b"content")
    assert json.loads(path.read_text())["sha256"] == hashlib.sha256(b"content").hexdigest()


def test_a_note_with_a_digest_that_is_none(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "notes")
    file = put(tmp_path / "w.bin", b"content")
    memory.sha256(file)
    (path,) = notes(tmp_path / "notes")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "beef"}))
    assert memory.sha256(file) == sha(b"content")


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    put(tmp_path / "file", b"")
    memory = DigestMemory(tmp_path / "file" / "notes")
    file = put(tmp_path / "w.bin", b"content")
    assert memory.sha256(file) == memory.sha256(file) == sha(b"content")
    assert (memory.hashed_files, memory.remembered) == (2, 0)
    assert memory.prune() == 0


def test_prune_forgets_what_is_gone(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "notes")
    kept, gone = put(tmp_path / "kept", b"kept"), put(tmp_path / "gone", b"gone")
    memory.sha256(kept), memory.sha256(gone)
    gone.unlink()
    put(tmp_path / "notes" / "ab" / "broken.json", b"{")
    put(tmp_path / "notes" / "ab" / "dead.tmp", b"{", time.time() - 7200)
    put(tmp_path / "notes" / "ab" / "alive.tmp", b"{", time.time())
    assert memory.prune() == 2
    assert len(notes(tmp_path / "notes")) == 2
    memory.sha256(kept)
    assert memory.remembered == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*gone"):
        DigestMemory(tmp_path / "notes").sha256(tmp_path / "gone")
    with pytest.raises(SourceError, match="cannot read"):
        DigestMemory(tmp_path / "notes").sha256(tmp_path)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "w.bin", b"content")
    real = hashlib.sha256

    class Growing:
        def __init__(self, data: bytes = b"") -> None:
            self._hash = real(data)

        def update(self, data: bytes) -> None:
            self._hash.update(data)
            with file.open("ab") as out:
                out.write(b"more" if file.stat().st_size < 20 else b"")

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Growing)
    with pytest.raises(SourceError, match=r"changed while it was read.*try again"):
        DigestMemory(tmp_path / "notes").sha256(file)


def link(path: Path, target: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))
    return path


def test_the_hubs_own_digest_is_taken(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--model"
    named, git = "a" * 64, "b" * 40  # not their real hashes: proof that the first is taken and the second is not
    lfs = link(repo / "snapshots" / "c0ffee" / "model.safetensors", put(repo / "blobs" / named, b"weights"))
    small = link(repo / "snapshots" / "c0ffee" / "config.json", put(repo / "blobs" / git, b"{}"))
    memory = DigestMemory(tmp_path / "notes")
    assert memory.sha256(lfs) == f"sha256:{named}"
    assert (memory.hashed_files, memory.remembered) == (0, 1)
    assert memory.sha256(small) == sha(b"{}")


def test_other_links_named_by_a_hash_are_read(tmp_path: Path) -> None:
    """Only a snapshot's link into its repository's blobs counts; a shared store is named by another hash."""
    name = "a" * 64
    elsewhere = link(tmp_path / "folder" / "w", put(tmp_path / "blobs" / name, b"one"))
    foreign = link(tmp_path / "snapshots" / "c" / "w", tmp_path / "blobs" / name)
    store = put(tmp_path / "hub" / "blobs" / "aa" / name, b"two")
    direct = link(tmp_path / "hub" / "models--o--m" / "snapshots" / "c" / "w", store)
    dangling = link(tmp_path / "hub" / "models--o--m" / "snapshots" / "c" / "x", store.parent.parent / "gone")
    memory = DigestMemory(tmp_path / "notes")
    assert memory.sha256(elsewhere) == sha(b"one")
    assert memory.sha256(foreign) == sha(b"one")
    assert memory.sha256(direct) == sha(b"two")
    with pytest.raises(SourceError):
        memory.sha256(dangling)
    blob = tmp_path / "hub" / "models--o--m" / "blobs" / ("d" * 64)
    link(blob, store)  # the repository's blob is a link into the store: its own name is the SHA-256
    assert memory.sha256(link(tmp_path / "hub/models--o--m/snapshots/c/y", blob)) == "sha256:" + "d" * 64


def _hash_all(root: str, files: list[str], times: int) -> list[str]:
    memory = DigestMemory(Path(root))
    return [memory.sha256(f) for _ in range(times) for f in files]


def test_processes_share_one_memory(tmp_path: Path) -> None:
    contents = [os.urandom(1000 + i) for i in range(6)]
    files = [str(put(tmp_path / f"{i}.bin", c)) for i, c in enumerate(contents)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(_hash_all, [(str(tmp_path / "notes"), files, 20)] * 3)
    assert results == [[sha(c) for c in contents] * 20] * 3
    assert [p.suffix for p in notes(tmp_path / "notes")] == [".json"] * 6
