"""A tiny model, a cache that holds it, and a way to run commands in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmapi import LLM, RequestOutput
from llmapi._build.store import Store
from llmapi.cli import main
from tests.cli.helpers import PROMPTS, SAMPLING, Cli
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMAPI_PROGRESS", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A cache that holds the model, fresh for each module. Tests that change a cache take their own."""
    root = tmp_path_factory.mktemp("cache")
    with LLM(model, cache_dir=root):
        pass
    return root


@pytest.fixture
def cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMAPI_CACHE_DIR", str(built))
    return built


@pytest.fixture
def own_cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache, made by the verbs themselves."""
    archive, root = tmp_path / "all.tar", tmp_path / "own cache"
    keys = [e.digest for e in Store(built).entries()]
    assert main(["cache", "export", "--cache-dir", str(built), *keys, str(archive)]) == 0
    assert main(["cache", "import", "--cache-dir", str(root), str(archive)]) == 0
    monkeypatch.setenv("LLMAPI_CACHE_DIR", str(root))
    return root


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command: its exit code, stdout and stderr."""

    def run(*words: str, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="module")
def truth(built: Path, model: str) -> list[RequestOutput]:
    with LLM(model, cache_dir=built) as llm:
        return llm.generate(PROMPTS, SAMPLING)
