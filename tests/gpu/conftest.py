"""GPU tests: skipped where torch sees no GPU; a build cache of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmapi._kernels.gpu import Gpu

MISSING = "this machine has no NVIDIA GPU that torch can use"


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(MISSING)


@pytest.fixture(scope="session", autouse=True)
def everywhere(offline_and_quiet: None) -> None:
    """All tests here run so."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build cache shared by the session: kernels are compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def gpu() -> Iterator[Gpu]:
    """The GPU, with kernels compiled as they are asked for."""
    if not torch.cuda.is_available():
        pytest.skip(MISSING)
    found = Gpu(torch.device("cuda", 0))
    yield found
    found.close()


@pytest.fixture
def seed() -> int:
    """Of random inputs; another one in each run."""
    return random.randrange(1 << 30)
