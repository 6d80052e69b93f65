"""One tiny model for the whole session: its checkpoint, the same model in transformers, and an LLM that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmapi import LLM
from tests.api.truth import Truth
from tests.tiny import tiny_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def everywhere(offline_and_quiet: None) -> None:
    """All tests here run so."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build cache shared by the session: the graph of each architecture is exported once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def truth(checkpoint: Path) -> Truth:
    """The same model in transformers."""
    return Truth(checkpoint)


@pytest.fixture(scope="session")
def llm(checkpoint: Path, cache: Path) -> Iterator[LLM]:
    """The tiny llama, ready to generate; blocks of 8 tokens, so that short prompts share some."""
    with LLM(
        checkpoint, cache_dir=cache, max_batch_size=16, kv_cache_config={"max_tokens": 8192, "block_size": 8}
    ) as llm:
        yield llm
