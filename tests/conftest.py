"""The compiled CPU kernels, made once for the session; every LLM of this process then finds them loaded."""

from __future__ import annotations

import pytest

from llmapi._build.cpu_kernels import NoKernels, obtain
from llmapi._build.store import Store
from llmapi._kernels.native import NativeKernels


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> NativeKernels | str:
    """The kernels, or why there are none."""
    try:
        return obtain(Store(tmp_path_factory.mktemp("cpu-kernels")))
    except NoKernels as error:
        return str(error)


@pytest.fixture
def kernels(compiled: NativeKernels | str) -> NativeKernels:
    """The kernels, for tests that are about them."""
    if isinstance(compiled, str):
        pytest.skip(compiled)
    return compiled
