"""The stand-in for TensorRT's runtime has no call that TensorRT's own bindings lack, and the same arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt import fake_paged_runtime
from tests.tensorrt_stub import build

SCRIPT = Path(__file__).with_name("runtime_names.py")
ARGUMENTS = {
    "execute_async_v3": (["stream_handle"], "bool"),
    "infer_shapes": ([], "list[str]"),
    "set_device_memory": (["memory", "size"], "None"),
    "set_input_shape": (["name", "shape"], "bool"),
    "set_optimization_profile_async": (["profile_index", "stream_handle"], "bool"),
    "set_tensor_address": (["name", "memory"], "bool"),
}
"""Of the context's calls, in order, and what they return."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the bindings say, in a process of their own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("TensorRT's bindings for Python are published for Linux")
    wrong = build.problem()
    assert wrong is None, wrong
    environment = build.environment(tmp_path_factory.mktemp("bindings"))
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def signature(doc: str, name: str) -> tuple[list[str], str]:
    """Arguments after ``self``, and the result, of the first overload."""
    found = re.search(rf"{name}\(self: [\w.]+(.*?)\) -> ([\w.\[\]]+)", doc)
    assert found, doc
    return re.findall(r", (\w+):", found[1]), found[2]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_calls_of_a_context(name: str, told: Any) -> None:
    assert signature(told["names"]["IExecutionContext"][name], name) == ARGUMENTS[name]


def test_an_engine_makes_contexts_without_memory(told: Any) -> None:
    create = told["names"]["ICudaEngine"]["create_execution_context"]
    assert signature(create, "create_execution_context")[0] == ["strategy"]
    assert "ExecutionContextAllocationStrategy" in create and "USER_MANAGED" in told["strategies"]
    assert "Buffer" in told["names"]["Runtime"]["deserialize_cuda_engine"]


@pytest.mark.parametrize(
    ("stand_in", "kind"),
    [(fake_paged_runtime.Engine, "ICudaEngine"), (fake_paged_runtime.Context, "IExecutionContext")],
)
def test_the_stand_in_has_no_call_of_its_own(stand_in: type, kind: str, told: Any) -> None:
    own = {name for name in vars(stand_in) if not name.startswith("_")}
    assert own and own <= set(told["members"][kind])
