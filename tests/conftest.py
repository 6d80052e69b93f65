"""Kernels made once for the session, of the CPU and of the emulator; an environment of the tests' own for who asks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmapi._build.cpu_kernels import NoKernels, obtain
from llmapi._build.store import Store
from llmapi._kernels.native import NativeKernels
from tests.emulator import build


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C is heard, also where the tests were started in the background of a shell, which makes it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of all processes of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> NativeKernels | str:
    """The kernels, or why there are none; compiled once for all processes of this run of the tests."""
    try:
        return obtain(Store(shared_folder(tmp_path_factory, "cpu-kernels")))
    except NoKernels as error:
        return str(error)


@pytest.fixture
def kernels(compiled: NativeKernels | str) -> NativeKernels:
    """The kernels, for tests that are about them."""
    if isinstance(compiled, str):
        pytest.skip(compiled)
    return compiled


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled to, once for all processes of this run of the tests."""
    if build.COMPILER is None:
        pytest.skip(build.MISSING)
    return shared_folder(tmp_path_factory, "emulated")


@pytest.fixture(scope="session")
def offline_and_quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, no bars, and no cache but the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("LLMAPI_CACHE_DIR", str(tmp_path_factory.mktemp("default-cache")))
        patch.setenv("LLMAPI_PROGRESS", "0")
        yield
