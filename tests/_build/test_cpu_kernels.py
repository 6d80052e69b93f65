"""The compiled CPU kernels as an artifact: compiled once, checked before they run, done without where they cannot be had."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmapi import LLM, SamplingParams
from llmapi._build import cpu_kernels
from llmapi._build.cpu_kernels import NoKernels, compile_kernels, find_compiler, kernels_key, obtain
from llmapi._build.key import Key, Part
from llmapi._build.names import CPU_KERNELS_FILE
from llmapi._build.store import Staging, Store
from llmapi._kernels.native import NativeKernels
from llmapi.errors import BuildError, CacheError
from tests.tiny import tiny_checkpoint

KIND = cpu_kernels.KIND


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, kernels: NativeKernels) -> None:
    """As in a process that has loaded nothing yet; needs a compiler."""
    monkeypatch.setattr(cpu_kernels, "_loaded", {})


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """What was compiled."""
    calls: list[Path] = []
    real = compile_kernels

    def counted(compiler: str, target: Path) -> None:
        calls.append(target)
        real(compiler, target)

    monkeypatch.setattr(cpu_kernels, "compile_kernels", counted)
    yield calls


def script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is no compiler, and no other on the path."""
    folder.mkdir()
    for name in cpu_kernels.COMPILERS:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def object_file(root: Path) -> Path:
    (path,) = root.glob(f"v1/{KIND}/*/{CPU_KERNELS_FILE}")
    return path


def test_compiled_once_then_taken_from_the_cache(
    tmp_path: Path, fresh: None, compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    first = obtain(store)
    assert obtain(store) is first, "a process loads it once"
    monkeypatch.setattr(cpu_kernels, "_loaded", {})
    again = obtain(store)
    assert again is not first and again.path == object_file(store.root)
    assert len(compilations) == 1


def test_the_key_names_what_shapes_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = kernels_key("g++ 1")
    keys = {base.digest, kernels_key("g++ 2").digest}
    sources = shutil.copytree(cpu_kernels.SOURCES, tmp_path / "csrc_cpu")
    with (sources / "kernels.cpp").open("a") as out:
        out.write("//\n")
    for name, value in (
        ("SOURCES", sources),
        ("FLAGS", (*cpu_kernels.FLAGS, "-g")),
        ("_processor", lambda: {"name": "another"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, name, value)
            keys.add(kernels_key("g++ 1").digest)
    monkeypatch.setattr("platform.machine", lambda: "another")
    keys.add(kernels_key("g++ 1").digest)
    assert len(keys) == 6
    assert kernels_key("g++ 1").digest != base.digest
    assert [p.name for p in base.parts] == ["key_schema", "sources", "flags", "compiler", "machine", "processor"]


def test_without_a_compiler_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoKernels, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        find_compiler()
    with pytest.raises(NoKernels):
        obtain(Store(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'if [ "$1" = --version ]; then echo fake 1.0; else echo "x.cpp:1: error: no AVX today" >&2; exit 1; fi'
    script(tmp_path / "bin", text, monkeypatch)
    assert find_compiler()[1] == "fake 1.0"
    with pytest.raises(NoKernels, match="does not compile the CPU kernels: x.cpp:1: error: no AVX today"):
        obtain(Store(tmp_path / "cache"))
    assert Store(tmp_path / "cache").entries() == []


def test_a_compiler_that_writes_something_else_is_noticed(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'if [ "$1" = --version ]; then echo fake 1.0; else for last; do :; done; echo junk > "$last"; fi'
    script(tmp_path / "bin", text, monkeypatch)
    with pytest.raises(NoKernels, match="invalid ELF header|file too short"):
        obtain(Store(tmp_path / "cache"))


def test_a_compiler_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "exit 3", monkeypatch)
    with pytest.raises(NoKernels, match="cannot be run"):
        find_compiler()
    with pytest.raises(BuildError, match="could not be run"):
        compile_kernels(str(tmp_path / "no such compiler"), tmp_path / "out.so")


def test_a_damaged_object_is_compiled_again(
    tmp_path: Path, fresh: None, compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    obtain(store)
    path = object_file(store.root)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # the old one stays mapped in this process
    path.write_bytes(data)
    monkeypatch.setattr(cpu_kernels, "_loaded", {})
    obtain(store)
    assert len(compilations) == 2


def test_what_others_could_have_written_is_not_executed(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    obtain(store)
    path = object_file(store.root)
    for place, mode in ((path, 0o666), (path.parent, 0o777)):
        before = place.stat().st_mode
        place.chmod(mode)
        monkeypatch.setattr(cpu_kernels, "_loaded", {})
        with pytest.raises(NoKernels, match="not executed"):
            obtain(store)
        place.chmod(before)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid != 0:  # root's files are trusted
        with pytest.raises(NoKernels, match="not executed"):
            obtain(store)


def test_a_cache_that_cannot_be_written_gives_none(tmp_path: Path, fresh: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoKernels):
        obtain(Store(tmp_path / "file" / "cache"))


@pytest.mark.parametrize("kind", Store.LOCAL_KINDS)
def test_machine_code_is_neither_exported_nor_imported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(staging: Staging) -> None:
        staging.write(CPU_KERNELS_FILE, b"code")

    store = Store(tmp_path / "a")
    key = Key([Part("sources", "1")])
    store.build(kind, key, "kernels", build).close()
    archive = tmp_path / "a.tar"
    with pytest.raises(CacheError, match="is not exported"):
        store.export([key.digest], archive)
    assert not archive.exists()
    with monkeypatch.context() as patch:  # an archive that somebody else made
        patch.setattr("llmapi._build.store.archive.LOCAL_KINDS", ())
        store.export([key.digest], archive)
    other = Store(tmp_path / "b")
    with pytest.raises(CacheError, match="machine code"):
        other.import_(archive)
    assert other.entries() == []


def test_an_llm_runs_without_them_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: NativeKernels
) -> None:
    model = tiny_checkpoint(tmp_path / "llama")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [[5, 9, 2], list(range(3, 60)), [7]]

    def run() -> tuple[list[list[int]], str]:
        with LLM(model, cache_dir=tmp_path / "cache", progress=False, skip_tokenizer_init=True) as llm:
            notes = {p.name: p.note for p in llm.build_report.phases}
            return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)], notes["kernels"]

    with_them, note = run()
    assert note == "cache hit"
    monkeypatch.setenv("LLMAPI_CPU_KERNELS", "0")
    with caplog.at_level(logging.INFO, logger="llmapi"):
        without, note = run()
    assert note == "none" and without == with_them
    lines = [r.getMessage() for r in caplog.records if "CPU kernels" in r.getMessage()]
    assert lines == ["no compiled CPU kernels, torch's operators are used: LLMAPI_CPU_KERNELS is 0"]
