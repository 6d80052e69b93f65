"""``llmapi cache``."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from llmapi import LLM
from llmapi._build.key import Key, Part
from llmapi._build.store import Staging, Store
from llmapi.cli import main
from tests.cli.helpers import GREEDY, PROMPTS, Cli, refused
from tests.fakehub import FakeHub
from tests.tiny import tiny_checkpoint


def test_ls_and_show(cli: Cli, cache: Path, model: str) -> None:
    result = cli("cache", "ls")
    head, *rows, total = result.out.splitlines()
    assert head.split() == ["KIND", "KEY", "SIZE", "BUILT", "USED", "HITS", "MODEL"]
    entries = {e.kind: e for e in Store(cache).entries()}
    assert {row.split()[0] for row in rows} == set(entries) == {"engine", "graph", "tokenizer", "weights"}
    assert all(row.endswith(" llama") for row in rows)
    assert total.startswith("4 entries, ")
    assert str(cache) in total
    engine = entries["engine"]
    shown = cli("cache", "show", engine.digest[:10]).out
    assert f"engine {engine.digest}\nmodel   {model}\n" in shown
    assert "\n  max_batch_size: 64\n" in shown
    assert "\n  torch.version: " in shown
    for name, record in engine.manifest.files.items():
        assert f"  {name}  " in shown
        assert f"sha256:{record.sha256}" in shown
    assert "in use now" not in shown
    with LLM(model, cache_dir=cache):
        assert "in use now" in cli("cache", "show", f"engine/{engine.digest[:10]}").out
        refused(cli("cache", "rm", engine.digest), 1, "is in use")


def test_why_hit(cli: Cli, cache: Path, model: str) -> None:
    result = cli("cache", "why", model)
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split(":")[:2] for line in lines[:3]] == [[k, " hit"] for k in ("tokenizer", "weights", "engine")]
    assert len(lines) == 4 and lines[3].startswith("cpu-kernels: ")


def test_why_tells_of_compiled_cpu_kernels(
    cli: Cli, model: str, tmp_path: Path, kernels: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache of its own, for a process that loaded the same kernels before asks no cache for them."""
    from llmapi._build import cpu_kernels

    words = ("cache", "why", model, "--cache-dir", str(tmp_path))

    def line() -> str:
        return cli(*words).out.split("cpu-kernels: ")[1]

    assert re.fullmatch(r"miss: \w{12}, there is no entry of this kind yet\n", line())
    monkeypatch.setattr(cpu_kernels, "_loaded", {})
    cpu_kernels.obtain(Store(tmp_path))
    (entry,) = Store(tmp_path).entries()
    assert line().startswith(f"hit: {entry.digest[:12]} (CPU kernels), last used 0 s ago")
    monkeypatch.setattr(cpu_kernels, "find_compiler", lambda: ("/usr/bin/c++", "another compiler 1.0"))
    assert re.search(r"differs in\n    compiler: .* -> another compiler 1.0\n", line())
    monkeypatch.undo()
    monkeypatch.setattr(cpu_kernels, "COMPILERS", ("no-such-compiler",))
    assert line() == "none: there is no C++ compiler (no-such-compiler): PyTorch's operators do the work\n"
    monkeypatch.setenv("LLMAPI_CPU_KERNELS", "0")
    assert line() == "none: LLMAPI_CPU_KERNELS is 0: PyTorch's operators do the work\n"
    assert "cpu-kernels" not in cli(*words, "--dtype", "bfloat16").out  # torch's operators serve that type


def test_why_names_what_differs_and_builds_nothing(cli: Cli, cache: Path, model: str) -> None:
    before = [(e.digest, e.hits) for e in Store(cache).entries()]
    result = cli("cache", "why", model, "--max-batch-size", "8")
    tokenizer, weights, engine, nearest, *diff = result.out.splitlines()
    assert tokenizer.startswith("tokenizer: hit: ")
    assert weights.startswith("weights: hit: ")
    assert engine.startswith("engine: miss: ")
    assert "differs in" in nearest
    assert diff[0] == "    max_batch_size: 64 -> 8" and diff[1].startswith("cpu-kernels: ")
    result = cli("cache", "why", model, "--dtype", "bfloat16")
    assert result.out.count("    dtype: float32 -> bfloat16") == 2
    assert [(e.digest, e.hits) for e in Store(cache).entries()] == before
    # It tells the truth: the key that it names is the one that a start asks for.
    promised = re.search(r"engine: miss: (\w+)", result.out)
    assert promised
    with LLM(model, cache_dir=cache, dtype="bfloat16") as llm:
        assert llm.build_report.keys["engine"].startswith(promised[1])
    for entry in Store(cache).entries():
        if (entry.digest, entry.hits) not in before and "bfloat16" in str(entry.manifest.key):
            assert main(["cache", "rm", entry.digest]) == 0


def test_why_in_an_empty_cache(cli: Cli, model: str, tmp_path: Path) -> None:
    result = cli("cache", "why", model, "--cache-dir", str(tmp_path / "new"))
    tokenizer, weights, engine, _ = result.out.splitlines()
    assert tokenizer.startswith("tokenizer: miss: ")
    assert weights.startswith("weights: miss: ")
    assert "there is no entry of this kind yet" in weights
    assert "export the graph first" in engine
    assert Store(tmp_path / "new").entries() == []


def test_why_for_other_weights(cli: Cli, cache: Path, model: str, tmp_path: Path) -> None:
    other = str(tiny_checkpoint(tmp_path / "other", seed=1))
    result = cli("cache", "why", other)
    _, weights, _, diff, engine, _ = result.out.splitlines()
    assert weights.startswith("weights: miss: ")
    assert diff.startswith("    origin.files: ")
    assert engine.startswith("engine: hit: ")
    dummy = cli("cache", "why", model, "--load-format", "dummy", "--engine-seed", "3").out
    assert "    origin.dummy: (absent) -> 3\n" in dummy


def test_why_downloads_no_weights(
    cli: Cli, cache: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.add("org/tiny", {f.name: f.read_bytes() for f in Path(model).iterdir() if f.is_file()})
        result = cli("cache", "why", "org/tiny")
        tokenizer, weights, engine, _ = result.out.splitlines()
        assert tokenizer.startswith("tokenizer: hit: ")
        assert weights == "weights: miss: the model's weights are not on this machine; a start downloads them"
        assert engine.startswith("engine: hit: ")
        assert "config.json" in hub.fetched()
        assert "model.safetensors" not in hub.fetched()
        # Half a download is no model either.
        (config,) = (tmp_path / "hub").rglob("config.json")
        index = config.with_name("model.safetensors.index.json")
        index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
        assert cli("cache", "why", "org/tiny").out.splitlines()[1] == weights
        index.unlink()
        assert cli("generate", "org/tiny", PROMPTS[0], *GREEDY).code == 0
        assert "model.safetensors" in hub.fetched()
        asked = len(hub.log)
        assert "\nweights: hit: " in cli("cache", "why", "org/tiny").out
        assert len(hub.log) == asked


def test_export_and_import(cli: Cli, own_cache: Path, built: Path, model: str, tmp_path: Path) -> None:
    files = [p for p in own_cache.rglob("*") if p.is_file()]
    assert {e.digest for e in Store(own_cache).entries()} == {e.digest for e in Store(built).entries()}
    for entry in Store(built).entries():
        for name in entry.manifest.files:
            (copy,) = [p for p in files if p.match(f"{entry.kind}/{entry.digest}/{name}")]
            assert copy.read_bytes() == (built / copy.relative_to(own_cache)).read_bytes()
    again = cli("cache", "import", str(tmp_path / "all.tar"))
    assert again.out.count("kept ") == 4
    result = cli("-v", "generate", model, PROMPTS[0], *GREEDY)
    assert f"{model}: cache hit: tokenizer " in result.err
    (tmp_path / "all.tar").write_bytes((tmp_path / "all.tar").read_bytes()[:-3000])
    refused(cli("cache", "import", str(tmp_path / "all.tar")), 1, "refused")


def test_import_of_what_cannot_run_here(cli: Cli, own_cache: Path, tmp_path: Path) -> None:
    engine = next(e for e in Store(own_cache).entries() if e.kind == "engine")
    parts = [Part("torch", '{"version":"9.9"}') if p.name == "torch" else p for p in engine.manifest.key.parts]
    far = Store(tmp_path / "far")

    def build(staging: Staging) -> None:
        staging.write("graph.txt", b"graph")

    far.build("engine", Key(parts), "far", build).close()
    archive = str(tmp_path / "far.tar")
    assert cli("cache", "export", "--cache-dir", str(far.root), Key(parts).digest, archive).code == 0
    refused(cli("cache", "import", archive), 1, "cannot be used on this machine", "needs torch 9.9", version("torch"))
    assert len(Store(own_cache).entries()) == 4


def test_verify_finds_one_flipped_bit(cli: Cli, own_cache: Path) -> None:
    sound = cli("cache", "verify")
    assert sound.code == 0
    assert sound.out.startswith("4 sound, 0 damaged; ")
    weights = next(e for e in Store(own_cache).entries() if e.kind == "weights")
    (path,) = own_cache.rglob(f"weights/{weights.digest}/*.safetensors")
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = cli("cache", "verify")
    assert result.code == 1
    damaged, total = result.out.splitlines()
    assert damaged.startswith(f"damaged: weights {weights.digest[:12]}: ")
    assert path.name in damaged
    assert total.startswith("3 sound, 1 damaged; ")
    assert cli("cache", "verify").code == 0
    assert "weights" not in cli("cache", "ls").out


def test_prune_and_rm(cli: Cli, own_cache: Path) -> None:
    entries = {e.kind: e for e in Store(own_cache).entries()}
    assert cli("cache", "prune", "--budget", "50GB").out.startswith("0 bytes freed, ")
    refused(cli("cache", "rm", entries["engine"].digest[:8], "zz"), 1, "'zz'")
    assert len(Store(own_cache).entries()) == 4
    result = cli("cache", "rm", entries["engine"].digest[:8], f"engine/{entries['engine'].digest}")
    assert result.out.count("removed engine") == 1
    assert {e.kind for e in Store(own_cache).entries()} == {"weights", "graph", "tokenizer"}
    result = cli("cache", "prune", "--budget", "0")
    assert re.match(r"(removed (weights|graph|tokenizer) .*\n){3}.* freed, 0 bytes left", result.out)
    assert cli("cache", "ls").out.startswith("0 entries, 0 bytes of ")
