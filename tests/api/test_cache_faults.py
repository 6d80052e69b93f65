"""Starts of a whole LLM while everything goes wrong around its cache. Faults are injected for real, into real builds:
SIGKILL, full and read-only disks, damaged bytes, deletion. The store alone is tested harder in tests/_build."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmapi import LLM, SamplingParams
from llmapi._build import cpu_kernels
from llmapi._build.store import Store
from llmapi.errors import CacheError
from tests.api.start_worker import PROMPT, garbage

WORKER = Path(__file__).with_name("start_worker.py")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Starts:
    """Runs jobs of ``start_worker`` in forked processes."""

    def __init__(self, model: Path, folder: Path) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self.model = str(model)
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), self.model, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def together(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        """Run jobs at once; their results in order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([{"model": self.model, **job} for job in jobs]) + "\n")
        self._process.stdin.flush()
        results: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        for result in results:
            assert "crash" not in result, result["crash"]
            if "cannot_mount" in result:
                pytest.skip(f"no file system can be mounted here: {result['cannot_mount']}")
        return results

    def one(self, do: str, **job: Any) -> dict[str, Any]:
        """Run one job."""
        return self.together({"do": do, **job})[0]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with old files, whose digests are remembered."""
    folder = tmp_path_factory.mktemp("faults") / "model"
    shutil.copytree(checkpoint, folder)
    for file in folder.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole cache; made by the worker's first start."""
    return tmp_path_factory.mktemp("built") / "cache"


@pytest.fixture(scope="module")
def starts(model: Path, built: Path) -> Iterator[Starts]:
    worker = Starts(model, built)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def expected(starts: Starts, built: Path) -> dict[str, Any]:
    """What an undisturbed start gives."""
    return starts.one("start", root=str(built))


def says(expected: dict[str, Any], result: dict[str, Any]) -> bool:
    return (result["tokens"], result["text"]) == (expected["tokens"], expected["text"])


# ---- killed processes


def test_killed_at_20_random_moments_of_a_build(starts: Starts, expected: dict[str, Any], tmp_path: Path) -> None:
    touched = starts.one("start", root=str(tmp_path / "whole"))["touched"]
    assert touched > 100
    rng = random.Random(11)
    kinds: list[list[str]] = []
    for number, at in enumerate(sorted({1, touched, *rng.sample(range(2, touched), 18)})):
        root = tmp_path / f"cache-{number}"
        assert starts.one("start", root=str(root), at=at) == {"signal": signal.SIGKILL}
        after = starts.one("start", root=str(root))
        assert says(expected, after), f"killed at touch {at} of {touched}"
        assert garbage(root) == [], f"killed at touch {at} of {touched}"
        assert Store(root).verify() == []
        kinds.append(after["built"])
    assert ["tokenizer", "weights", "graph", "engine"] in kinds  # some died before anything was whole
    assert len({len(k) for k in kinds}) >= 3  # and others at every stage


def test_eight_start_the_same_model_at_once(starts: Starts, expected: dict[str, Any], tmp_path: Path) -> None:
    root, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    job = {"do": "together", "root": str(root), "marks": str(marks), "others": 7, "die": False}
    results = starts.together(*({**job, "me": i} for i in range(8)))
    assert all(says(expected, r) for r in results)
    assert len((marks / "conversions").read_text().split()) == 1
    assert sorted(kind for r in results for kind in r["built"]) == ["engine", "graph", "tokenizer", "weights"]
    waited = [r for r in results if any("hit: weights" in x and "built by another process" in x for x in r["cache"])]
    assert len(waited) == 7
    assert garbage(root) == []


def test_the_builder_dies_while_seven_wait(starts: Starts, expected: dict[str, Any], tmp_path: Path) -> None:
    root, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    job = {"do": "together", "root": str(root), "marks": str(marks), "others": 7, "die": True}
    results = starts.together(*({**job, "me": i} for i in range(8)))
    assert results.count({"signal": signal.SIGKILL}) == 1
    living = [r for r in results if "signal" not in r]
    assert all(says(expected, r) for r in living)
    assert len((marks / "conversions").read_text().split()) == 2
    assert sum("weights" in r["built"] for r in living) == 1
    assert starts.one("start", root=str(root))["built"] == [] and garbage(root) == []


# ---- bad disks


@pytest.mark.parametrize("size", [4 << 10, 24 << 10, 60 << 10, 300 << 10, 600 << 10, 620 << 10])
def test_a_disk_that_is_full_at_some_write(size: int, starts: Starts, expected: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    result = starts.one("full_disk", root=str(disk), size=size)
    assert result["said"].startswith("CacheError: the disk of the cache is full"), result["said"]
    assert "LLMAPI_CACHE_DIR" in result["said"]
    assert result["left"] == result["after"] == []
    assert says(expected, result)


@pytest.mark.parametrize("limit", [10, 3000, 9000, 200_000])
def test_a_limit_on_the_size_of_files(limit: int, starts: Starts, expected: dict[str, Any], tmp_path: Path) -> None:
    """As a quota does; needs no mount."""
    root = tmp_path / "cache"
    result = starts.one("start", root=str(root), limit=limit)
    assert result["error"].startswith("CacheError: the disk of the cache is full"), result
    assert garbage(root) == []
    assert says(expected, starts.one("start", root=str(root)))


def test_a_root_that_may_only_be_read(starts: Starts, expected: dict[str, Any], built: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(built, root)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    result = starts.one("read_only", root=str(root))
    assert says(expected, result) and result["built"] == []
    other = starts.one("read_only", root=str(root), max_batch_size=4)
    assert "cannot be written" in other["error"] and "LLMAPI_CACHE_DIR" in other["error"]
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    shutil.rmtree(root / "v1" / "tokenizer")  # what is quick to read anew is no reason to fail
    assert says(expected, starts.one("read_only", root=str(root)))


# ---- damaged and deleted entries


def files_of_entries(root: Path) -> list[Path]:
    found = [p for e in Store(root).entries() for p in (root / "v1" / e.kind / e.digest).rglob("*") if p.is_file()]
    kinds = {file.parent.parent.name for file in found}
    native = "cpu-kernels" in kinds  # only where there is a compiler
    assert kinds == {"weights", "graph", "engine", "tokenizer"} | ({"cpu-kernels"} if native else set())
    assert len(found) == len(kinds) * 3 + 6 + native  # manifest, stamps and use of each; and what they hold
    return sorted(found)


def said(llm: LLM) -> list[int]:
    return list(llm.generate(PROMPT, GREEDY, use_tqdm=False).outputs[0].token_ids)


def test_a_flipped_bit_in_any_file(model: Path, built: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    for number, file in enumerate(files_of_entries(built)):
        root = tmp_path / f"cache-{number}"
        shutil.copytree(built, root)
        damaged = root / file.relative_to(built)
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 16
        damaged.write_bytes(data)
        cpu_kernels._loaded.clear()  # a process loads them once
        with LLM(model, cache_dir=root, progress=False) as llm:
            assert said(llm) == expected["tokens"], file
            report = llm.build_report
        if file.name in ("stamps.json", "use.json"):  # hints, of which nothing depends
            assert report.cached, file
        else:
            [miss] = [line for line in report.cache if line.startswith("miss")]
            assert file.name in miss and "set aside" in miss and file.parent.parent.name in miss
            assert miss.removeprefix("miss: ") in report.line
        assert Store(root).verify() == []
        shutil.rmtree(root)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_manifest(model: Path, built: Path, expected: dict[str, Any], tmp_path: Path, keep: float) -> None:
    root = tmp_path / "cache"
    shutil.copytree(built, root)
    manifests = list((root / "v1").glob("*/*/manifest.json"))
    for manifest in manifests:
        data = manifest.read_bytes()
        manifest.write_bytes(data[: int(len(data) * keep)])
    cpu_kernels._loaded.clear()
    with LLM(model, cache_dir=root, progress=False) as llm:
        assert said(llm) == expected["tokens"]
        misses = [line for line in llm.build_report.cache if line.startswith("miss")]
    assert len(misses) == len(manifests) >= 4 and all("manifest.json is damaged" in m for m in misses)


def test_entries_deleted_while_in_use(model: Path, built: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(built, root)
    with LLM(model, cache_dir=root, progress=False) as llm:
        shutil.rmtree(root)
        assert said(llm) == expected["tokens"]  # what is mapped stays
        with LLM(model, cache_dir=root, progress=False) as again:
            assert said(again) == expected["tokens"] == said(llm)
            assert not again.build_report.cached


def test_a_path_with_spaces_and_non_ascii(starts: Starts, expected: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "my cache 'ünï' \"模型\" 100% #1"
    assert len(starts.one("start", root=str(root))["built"]) == 4
    again = starts.one("start", root=str(root))
    assert says(expected, again) and again["built"] == [] and garbage(root) == []


def test_two_versions_of_the_code_share_one_root(
    model: Path, built: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Each finds its own entries, shares what is the same, and leaves the other's alone."""
    root = tmp_path / "cache"
    shutil.copytree(built, root)
    place = Path(__file__).resolve().parents[2]
    shutil.copytree(place / "llmapi", tmp_path / "llmapi", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "llmapi/_build/weights.py").open("a") as source:
        source.write("\n# another version\n")
    script = (
        "import sys, json; sys.path[:0] = [sys.argv[2], sys.argv[4]]; from tests.api import start_worker;"
        "import llmapi; assert llmapi.__file__.startswith(sys.argv[2]), llmapi.__file__;"
        "print(json.dumps([start_worker.start(sys.argv[1], sys.argv[3]) for _ in range(2)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(tmp_path), str(root), str(place)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert says(expected, first) and first["built"] == ["weights"]  # the rest is the same in both
    assert says(expected, second) and second["built"] == []
    [miss] = [line for line in first["cache"] if line.startswith("miss")]
    assert "converter" in miss
    with LLM(model, cache_dir=root, progress=False) as llm:
        assert llm.build_report.cached and said(llm) == expected["tokens"]
    assert garbage(root) == []


def test_eviction_under_a_budget_spares_what_others_run(
    model: Path, built: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(built, root)
    with LLM(model, cache_dir=root, progress=False) as llm:
        monkeypatch.setenv("LLMAPI_CACHE_BYTES", "1000")  # less than any entry of weights
        for size in (2, 3, 4):
            with LLM(model, cache_dir=root, progress=False, max_batch_size=size, dtype="bfloat16") as other:
                assert said(other)
            assert said(llm) == expected["tokens"]
        held = {e.kind for e in Store(root).entries()}
        assert {"weights", "graph", "engine", "tokenizer"} == held
        with pytest.raises(CacheError, match="in use"):
            Store(root).remove(llm.build_report.keys["weights"])
        Store(root).prune(0)
        assert {e.digest for e in Store(root).entries()} == set(llm.build_report.keys.values())


# ---- nothing is executed


def test_a_warm_start_unpickles_and_executes_nothing_of_the_cache(
    model: Path, built: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No unpickler is made, and no code is compiled from what the cache holds."""
    compiled: list[str] = []
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "pickle.find_class":
            seen.append(str(args))
        if watching and event == "compile" and str(args[1]).startswith(str(built)):
            compiled.append(str(args[1]))

    watching = True
    sys.addaudithook(hook)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("torch.load", None)
            with LLM(model, cache_dir=built, progress=False) as llm:
                assert said(llm) == expected["tokens"]
    finally:
        watching = False
    assert (seen, compiled) == ([], [])
    endings = {p.suffix for p in (built / "v1").rglob("*") if p.is_file()}
    endings.discard(".so")  # compiled here; docs/cache.md says what is checked before it is loaded
    assert endings == {".json", ".safetensors", ""}  # the one without is the clock
