"""Plans built once for the session: one cache for all of its processes that share it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory, offline_and_quiet: None) -> Path:
    """A build cache."""
    return tmp_path_factory.mktemp("plans")
