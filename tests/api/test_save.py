"""save(folder) and LLM(folder): a self-contained engine that needs no source, no hub and no cache."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, CheckpointError, ConfigError, EngineClosedError, SamplingParams
from llmapi._build.store import Store
from tests.api.truth import Truth, forced, prompts_of
from tests.tiny import tiny_checkpoint


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


PROMPTS = prompts_of([4, 19], seed=111)


def tokens(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy(12, repetition_penalty=1.5))]


def expected(truth: Truth) -> list[list[int]]:
    return [truth.greedy(p, 12, repetition_penalty=1.5) for p in PROMPTS]


@pytest.fixture(scope="module")
def saved(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, saved."""
    folder = tmp_path_factory.mktemp("saved") / "engine"
    llm.save(folder)
    return folder


def test_it_needs_neither_source_nor_cache(
    tmp_path: Path, truth: Truth, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    folder = tmp_path / "ein Ordner 引擎 é"
    with LLM(source, cache_dir=tmp_path / "first", max_batch_size=8, max_seq_len=256) as llm:
        llm.save(folder)
        chat = llm.chat([{"role": "user", "content": "hello"}], greedy(5))
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "first")

    def raises(*_: Any, **__: Any) -> None:
        raise AssertionError("a saved engine must not come here")

    monkeypatch.setattr(torch.export, "export", raises)
    monkeypatch.setattr("llmapi._runtime.start.resolve_source", raises)
    for name in (folder, str(folder)):
        with LLM(name, cache_dir=tmp_path / "second") as llm:
            assert tokens(llm) == expected(truth)
            assert llm.chat([{"role": "user", "content": "hello"}], greedy(5)).text == chat.text
            assert llm.build_report.cached and llm.build_report.hashed_bytes == 0
            assert "max_seq_len=256" in repr(llm)
            says = SamplingParams(temperature=0, max_tokens=9, logits_processors=[forced([7])])
            assert llm.generate("hello", says).outputs[0].token_ids == [7, 1]  # it knows its end token
    assert Store(tmp_path / "second").entries() == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_other_limits_build_the_engine_and_nothing_else(saved: Path, tmp_path: Path, truth: Truth) -> None:
    with LLM(saved, cache_dir=tmp_path, max_batch_size=3) as llm:
        assert not llm.build_report.cached
        assert [e.kind for e in Store(tmp_path).entries()] == ["engine"]
        assert tokens(llm) == expected(truth)
        llm.save(tmp_path / "again")
    with LLM(saved, cache_dir=tmp_path, max_batch_size=3) as llm:
        assert llm.build_report.cached
    with LLM(tmp_path / "again", cache_dir=tmp_path / "empty") as llm:
        assert llm.build_report.cached and tokens(llm) == expected(truth)
        assert llm._prepared.config.max_batch_size == 3


def test_options_of_the_runtime_can_be_given_anew(saved: Path, tmp_path: Path, truth: Truth) -> None:
    options = {"enable_prefix_caching": False, "kv_cache_config": {"max_tokens": 128}, "seed": 4}
    with LLM(saved, cache_dir=tmp_path, **options) as llm:
        assert llm.build_report.cached and tokens(llm) == expected(truth)
        assert llm._loop._scheduler.pool.num_blocks == 128 // 8
    with LLM(saved, cache_dir=tmp_path, skip_tokenizer_init=True) as llm:
        assert llm.tokenizer is None and tokens(llm) == expected(truth)


def test_a_saved_engine_without_tokenizer(tmp_path: Path, cache: Path, checkpoint: Path) -> None:
    bare = tiny_checkpoint(tmp_path / "bare", tokenizer=False)
    with LLM(bare, cache_dir=cache, skip_tokenizer_init=True) as llm:
        llm.save(tmp_path / "saved")
        said = tokens(llm)
    with LLM(tmp_path / "saved", cache_dir=cache) as llm:
        assert llm.tokenizer is None and tokens(llm) == said
    with LLM(tmp_path / "saved", cache_dir=cache, tokenizer=checkpoint) as llm:
        assert llm.generate("hello", greedy(3)).text


def test_where_it_may_be_saved(llm: LLM, tmp_path: Path, truth: Truth) -> None:
    (tmp_path / "empty").mkdir()
    llm.save(tmp_path / "empty")
    llm.save(str(tmp_path / "new" / "deep"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("full", "file", "empty"):
        with pytest.raises(ConfigError, match=f"{taken} exists and is not an empty folder: give a new one"):
            llm.save(tmp_path / taken)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    for wrong in (None, 5, b"x", "~no such user/x", "nul\0"):
        with pytest.raises(ConfigError, match="folder="):
            llm.save(wrong)  # type: ignore[arg-type]


def test_a_closed_llm_is_not_saved(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    with LLM(checkpoint, cache_dir=cache) as llm:
        pass
    with pytest.raises(EngineClosedError, match=r"this LLM was closed.*: save before close\(\), or make a new one"):
        llm.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("llmapi._tokenizer.Tokenizer.save", fails)
        with pytest.raises(OSError, match="disk full"):
            llm.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
    llm.save(tmp_path / "engine")


def test_a_save_to_a_full_disk_says_so(llm: LLM, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # as a quota does
    try:
        with pytest.raises(ConfigError, match=r"engine cannot be written: its disk is full.*weights alone take .*kB"):
            llm.save(tmp_path / "engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_every_file_that_is_cut_or_gone_is_named(saved: Path, tmp_path: Path) -> None:
    names = files_of(saved)
    assert "llmapi.json" in names and len(names) > 5
    for name in names:
        for how in ("cut", "gone"):
            broken = tmp_path / "broken"
            shutil.copytree(saved, broken)
            if how == "cut":
                (broken / name).write_bytes((broken / name).read_bytes()[:-7])
            else:
                (broken / name).unlink()
            if (name, how) != ("llmapi.json", "gone"):  # without it, it is a folder like any other
                with pytest.raises(CheckpointError, match=rf"{name}.*(save the engine again)"):
                    LLM(broken, cache_dir=tmp_path / "cache")
            shutil.rmtree(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "saved in format 99, this llmapi reads format 1: save it again"),
        ({"spec": {}}, "cannot be read"),
        ({"limits": None}, "cannot be read"),
        ({"limits": {}}, "cannot be read"),
        ({"files": []}, "cannot be read"),
        ({"stop_token_ids": 5}, "cannot be read"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    data = json.loads((broken / "llmapi.json").read_text())
    (broken / "llmapi.json").write_text(json.dumps([] if change is None else {**data, **change}))
    with pytest.raises(CheckpointError, match=message):
        LLM(broken, cache_dir=tmp_path / "cache")


def test_what_a_saved_engine_cannot_become(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype='bfloat16', but the engine in .* was saved as 'float32'"):
        LLM(saved, cache_dir=tmp_path, dtype="bfloat16")
    with pytest.raises(ConfigError, match="max_seq_len=4096 is more than the 512 positions"):
        LLM(saved, cache_dir=tmp_path, max_seq_len=4096)
    with pytest.raises(ConfigError, match="load_format='dummy'"):
        LLM(saved, cache_dir=tmp_path, load_format="dummy")
    with pytest.raises(ConfigError, match="revision='main'"):
        LLM(saved, cache_dir=tmp_path, revision="main")
