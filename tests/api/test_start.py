"""The second start is short: artifacts are found by content, and never found when the content is another."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmapi import LLM, SamplingParams
from llmapi._build.store import Store
from llmapi._build.store.entry import HASH_AT_OPEN
from llmapi._files import is_tokenizer
from tests.api.truth import Truth, prompts_of
from tests.tiny import tiny_checkpoint


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


PROMPTS = prompts_of([4, 19], seed=101)


def tokens(llm: LLM, count: int = 12) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy(count, repetition_penalty=1.5))]


def expected(truth: Truth, count: int = 12) -> list[list[int]]:
    return [truth.greedy(p, count, repetition_penalty=1.5) for p in PROMPTS]


def age(folder: Path, seconds: float = 3600.0) -> None:
    """Date the files back: what was written this moment is always hashed again."""
    for file in folder.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be changed."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    age(folder)
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise AssertionError("a warm start must not come here")

    monkeypatch.setattr(torch.export, "export", raises)
    monkeypatch.setattr("llmapi._build.export.export_graph", raises)
    monkeypatch.setattr("llmapi._build.weights.converted", raises)


def test_a_warm_start_hashes_converts_and_exports_nothing(
    model: Path, tmp_path: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        cold = llm.build_report
        assert tokens(llm) == expected(truth)
    assert not cold.cached and ("export", "built") in [(p.name, p.note) for p in cold.phases]
    read = ["model.safetensors", "config.json", *(f.name for f in model.iterdir() if is_tokenizer(f.name))]
    assert cold.hashed_bytes == sum((model / name).stat().st_size for name in read)
    assert cold.exports == 1 and cold.conversions == len(load_file(model / "model.safetensors"))
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level("INFO", "llmapi"):
        forbid(patch)
        with LLM(model, cache_dir=tmp_path / "cache") as llm:
            warm = llm.build_report
            assert tokens(llm) == expected(truth)
    assert warm.cached and warm.keys == cold.keys
    entries = Store(tmp_path / "cache").entries()
    small = sum(f.size for e in entries for f in e.manifest.files.values() if f.size <= HASH_AT_OPEN)
    assert warm.counters == {
        "hub_calls": 0,
        "hashed_bytes": 0,
        "checked_bytes": small,
        "conversions": 0,
        "exports": 0,
    }
    assert "hub_calls 0, hashed_bytes 0" in str(warm) and "exports 0" in warm._repr_html_()
    [line] = [r.getMessage() for r in caplog.records]
    digests = {kind: digest[:12] for kind, digest in warm.keys.items()}
    assert line == f"{model}: cache hit: " + ", ".join(f"{kind} {digest}" for kind, digest in digests.items())
    assert list(digests) == ["tokenizer", "weights", "graph", "engine"]
    assert "load" in [p.name for p in warm.phases]
    assert [p.note for p in warm.phases if p.name in ("convert", "export", "build")] == ["cache hit"] * 3
    assert "cache hit" in str(warm) and "<table>" in warm._repr_html_()
    assert all(line.startswith("hit") for line in warm.cache) and len(warm.cache) == 4


def test_the_place_of_a_model_does_not_count(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "moved"
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        keys = llm.build_report.keys
    shutil.copytree(model, other)
    with LLM(str(other), cache_dir=tmp_path / "cache") as llm:
        assert llm.build_report.cached and llm.build_report.keys == keys


def test_fine_tunes_share_the_engine_but_not_the_weights(
    model: Path, tmp_path: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_checkpoint(tmp_path / "tuned", seed=17)
    with LLM(model, cache_dir=tmp_path / "cache") as a:
        monkeypatch.setattr(torch.export, "export", None)
        with LLM(other, cache_dir=tmp_path / "cache") as b:
            ours, theirs = a.build_report.keys, b.build_report.keys
            assert ours["engine"] == theirs["engine"] and ours["weights"] != theirs["weights"]
            notes = {p.name: p.note for p in b.build_report.phases}
            assert (notes["convert"], notes["build"]) == ("built", "cache hit")
            assert tokens(b) == expected(Truth(other)) != expected(truth)
            assert tokens(a) == expected(truth)


def test_limits_change_the_engine_alone(model: Path, tmp_path: Path) -> None:
    with LLM(model, cache_dir=tmp_path / "cache", max_batch_size=8) as llm:
        first = llm.build_report.keys
        said = tokens(llm)
    for options in (
        {"max_batch_size": 4},
        {"max_seq_len": 128},
        {"max_num_tokens": 64},
        {"kv_cache_config": {"block_size": 32}},
    ):
        with LLM(model, cache_dir=tmp_path / "cache", **{"max_batch_size": 8, **options}) as llm:
            report = llm.build_report
            assert report.keys["weights"] == first["weights"] and report.keys["engine"] != first["engine"], options
            notes = {p.name: p.note for p in report.phases}
            assert (notes["convert"], notes["export"], notes["build"]) == ("cache hit", "cache hit", "built"), options
            [miss] = [line for line in report.cache if line.startswith("miss")]
            assert next(iter(options)).replace("kv_cache_config", "block_size") in miss  # it explains itself
            assert report.line == f"{model}: cache {miss}"
            assert (report.exports, report.conversions) == (0, 0), options
            assert tokens(llm) == said
    for options in ({"enable_prefix_caching": False}, {"kv_cache_config": {"max_tokens": 512}}, {"seed": 5}):
        with LLM(model, cache_dir=tmp_path / "cache", **{"max_batch_size": 8, **options}) as llm:
            assert llm.build_report.cached and llm.build_report.keys == first, options


def test_dtype_changes_both(model: Path, tmp_path: Path) -> None:
    with LLM(model, cache_dir=tmp_path / "cache") as a, LLM(model, cache_dir=tmp_path / "cache", dtype="bfloat16") as b:
        ours, theirs = a.build_report.keys, b.build_report.keys
        assert ours["engine"] != theirs["engine"] and ours["weights"] != theirs["weights"]


def swap(model: Path, other: Path) -> Path:
    """Write the other model's weights over this one's, in place."""
    weights = model / "model.safetensors"
    content = (other / "model.safetensors").read_bytes()
    assert len(content) == weights.stat().st_size
    with weights.open("r+b") as file:
        file.write(content)
    return weights


def test_new_weights_in_the_old_file_are_seen(model: Path, tmp_path: Path, truth: Truth) -> None:
    other = tiny_checkpoint(tmp_path / "tuned", seed=17)
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        before = llm.build_report.keys
    swap(model, other)
    for _ in range(2):  # the first time right after writing
        with LLM(model, cache_dir=tmp_path / "cache") as llm:
            assert llm.build_report.keys["weights"] != before["weights"]
            assert llm.build_report.hashed_bytes > 0
            assert tokens(llm) == expected(Truth(other)) != expected(truth)
    age(model, 1800)
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        assert tokens(llm) == expected(Truth(other))


def test_what_a_forged_time_hides(model: Path, tmp_path: Path, truth: Truth) -> None:
    """Same path, size, inode and modification time: only then is the remembered digest believed.

    Nothing short of reading the file would notice. Copying or renaming a file into place changes the inode, and any
    ordinary write the time, so it takes a deliberate ``utime`` after writing in place.
    """
    other = tiny_checkpoint(tmp_path / "tuned", seed=17)
    weights = model / "model.safetensors"
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        assert tokens(llm) == expected(truth)
    stamp = weights.stat()
    swap(model, other)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        assert llm.build_report.hashed_bytes == 0
        assert tokens(llm) == expected(truth)  # the remembered weights: this is the documented limit
    weights.rename(tmp_path / "aside")
    shutil.copyfile(tmp_path / "aside", weights)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with LLM(model, cache_dir=tmp_path / "cache") as llm:  # another inode
        assert tokens(llm) == expected(Truth(other))


def test_a_damaged_artifact_is_built_again(model: Path, tmp_path: Path, truth: Truth) -> None:
    with LLM(model, cache_dir=tmp_path / "cache"):
        pass
    [file] = (tmp_path / "cache").rglob("model.safetensors")
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-100])
    with LLM(model, cache_dir=tmp_path / "cache") as llm:
        assert {p.name: p.note for p in llm.build_report.phases}["convert"] == "built"
        assert tokens(llm) == expected(truth)


# ---- other files, same model


def test_bin_and_shards_are_the_same_model(model: Path, tmp_path: Path, truth: Truth, cache: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    shards = tmp_path / "shards"
    loaded.save_pretrained(str(shards), max_shard_size="150KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    whole_bin = tmp_path / "bin"
    whole_bin.mkdir()
    torch.save(loaded.state_dict(), whole_bin / "pytorch_model.bin")
    split_bin = tmp_path / "bin shards"
    split_bin.mkdir()
    state, index = loaded.state_dict(), {}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({n: state[n] for n in part}, split_bin / file)
        index.update(dict.fromkeys(part, file))
    (split_bin / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    for folder in (shards, whole_bin, split_bin):
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        with LLM(folder, cache_dir=cache) as llm:
            assert tokens(llm) == expected(truth), folder


def test_a_half_precision_checkpoint(tmp_path: Path, cache: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", seed=5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    loaded.save_pretrained(str(folder))
    with LLM(folder, cache_dir=cache) as llm:
        assert tokens(llm) == expected(Truth(folder))


# ---- dummy weights


def test_dummy_weights_need_only_a_config(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dummy"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)

    def said(seed: int, **options: Any) -> list[list[int]]:
        with LLM(folder, load_format="dummy", seed=seed, cache_dir=tmp_path / "cache", **options) as llm:
            assert llm.build_report.hashed_bytes == 0 and llm.tokenizer is None
            return tokens(llm)

    first = said(3)
    assert said(3) == first
    assert said(4) != first
    assert said(0) not in (first, said(4))
    assert all(0 <= t < 300 for ids in first for t in ids)
    shutil.copytree(model, folder, dirs_exist_ok=True)
    with LLM(folder, load_format="dummy", seed=3, cache_dir=tmp_path / "other") as llm:
        assert tokens(llm) == first  # the weights that lie there are not read
        assert llm.generate("hello", greedy(2)).text is not None and llm.tokenizer is not None
