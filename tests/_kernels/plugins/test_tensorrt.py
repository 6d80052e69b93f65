"""The Python half of the plugins, driven through TensorRT's own bindings in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tensorrt_stub import build

DRIVEN = Path(__file__).with_name("driven.py")
TESTS = 100
"""At least so many must have run: a process that collects none passes, too."""


def test_importing_the_plugins_imports_no_tensorrt() -> None:
    code = "import sys, llmapi._kernels.plugins; print([m for m in sys.modules if m.startswith('tensorrt')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plugins_through_the_bindings(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("TensorRT's bindings for Python are published for Linux")
    wrong = build.problem()
    assert wrong is None, wrong
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(DRIVEN)]
    done = subprocess.run(command, capture_output=True, text=True, env=build.environment(tmp_path), timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= TESTS and "skipped" not in done.stdout, done.stdout[-2000:]
