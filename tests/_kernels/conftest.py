"""Fixtures of the emulated GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.emulator import build


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled to, once for all processes of this run of the tests."""
    if build.COMPILER is None:
        pytest.skip(build.MISSING)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "emulated"
    folder.mkdir(exist_ok=True)
    return folder
