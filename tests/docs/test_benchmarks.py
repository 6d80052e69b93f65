"""Benchmarks follow the code that they measure: all load, and those that need no GPU run, on next to nothing."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmapi import LLM, SamplingParams
from tests.tiny import tiny_checkpoint

FOLDER = Path(__file__).parents[2] / "benchmarks"
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Loads a benchmark as Python does a script, and runs it where it is given arguments."""
    modules = set(sys.modules)

    def load(path: Path, *arguments: str) -> dict[str, Any]:
        for folder in (FOLDER, path.parent):
            monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        return runpy.run_path(str(path), run_name="__main__" if arguments else "benchmark")

    yield load  # type: ignore[misc]
    for name in set(sys.modules) - modules:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=2048)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_it_can_be_loaded(path: Path, bench: Bench) -> None:
    assert bench(path)["__doc__"]


def test_host_time_of_beams(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench(FOLDER / "beam_host.py", "--requests", "2", "--width", "3", "--tokens", "9", "--prompt", "5")
    assert "2 requests of 3 beams, 7 steps: median" in capsys.readouterr().out
    bench(FOLDER / "beam_host.py", "--requests", "2", "--width", "3", "--prompt", "5", "--books")
    assert capsys.readouterr().out.count("2 searches of 3 beams, books kept") == 4


def test_beams_beside_greedy_sequences(bench: Bench, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    counts = ("--prompts", "2", "--width", "2", "--tokens-in", "4", "--tokens-out", "16", "--backend", "cpu")
    bench(FOLDER / "beam_gpu.py", "--config", str(model / "config.json"), "--tokenizer", str(model), *counts)
    lines = capsys.readouterr().out.splitlines()
    names = ["2", "greedy", "waiting", "beams", "edited", "logprobs", "ending", "stops", "words", "guided"]
    assert [line.split()[0] for line in lines] == names and "of the greedy rate" in lines[-1]


def test_guided(bench: Bench, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    counts = ("--requests", "4", "--tokens", "8", "--repeats", "1", "--backend", "cpu", "--cache-dir", str(tmp_path))
    bench(FOLDER / "guided.py", str(model), *counts)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["4", "free", "guided", "beside"] and "of free; mask" in lines[2]


def test_soak(bench: Bench, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.setenv("LLMAPI_CACHE_DIR", str(tmp_path))
    sizes = ("--in-flight", "8", "--batch", "8", "--kv-tokens", "4096", "--check", "5", "--alone", "3", "--words", "9")
    bench(
        FOLDER / "soak.py", "--model", str(model), "--backend", "cpu", "--dtype", "bfloat16", "--seconds", "2", *sizes
    )
    assert "requests" in capfd.readouterr().out


def test_compile_times(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench(FOLDER / "compile_times.py", "gated_activation_cuda", "--only", "ACT=0")
    first, one, total = capsys.readouterr().out.splitlines()
    assert first.startswith("NVRTC") and one.endswith(" s  gated_activation.cu ACT=0 LLM_DTYPE=2")
    assert total.endswith(" s in all")


def test_timeline(bench: Bench, model: Path, tmp_path: Path) -> None:
    watch = bench(FOLDER / "gpu_timeline.py")["watch"]
    with LLM(model, cache_dir=tmp_path, backend="cpu", progress=False) as llm:
        seen = watch(llm._loop)
        llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    assert [(step["seqs"], step["tokens"]) for step in seen] == [(1, 3), *[(1, 1)] * 5]
    assert all(step["launch"] > 0 for step in seen)
