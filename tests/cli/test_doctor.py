"""``llmapi doctor``: each check says what it sees, and what to do where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmapi._build.store import lock as store_lock
from llmapi._cli import checks, installed, machine
from llmapi._cli.check import Check
from llmapi.errors import CacheError
from tests.cli.helpers import Cli
from tests.fakehub import FakeHub


def named(found: Iterable[Check], name: str) -> Check:
    (check,) = [c for c in found if c.name == name]
    return check


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Installed versions, as the checks see them; change it to change what is installed."""
    real = importlib.metadata.version
    pretended: dict[str, str | None] = {}

    def version(name: str) -> str:
        found = pretended.get(name, "") if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


def test_this_machine_runs_models(cli: Cli, tmp_path: Path) -> None:
    result = cli("doctor", "--cache-dir", str(tmp_path / "new"))
    assert (result.code, result.err) == (0, "")
    assert f"torch: {importlib.metadata.version('torch')}" in result.out
    assert "  OK  cpu: runs\n" in result.out
    why = "was built without CUDA: install a CUDA build of torch|sees no NVIDIA GPU: check nvidia-smi"
    assert re.search(f"  no  cuda: backend='cuda' cannot run here: torch .*({why})", result.out)
    assert re.search(r"  no  tensorrt: (builds plans with \w+ [\d.]+, and runs none|.* needs TensorRT)", result.out)
    assert result.out.endswith("This machine runs models on the cpu backend.\n")
    assert re.search(r"  OK  locks: ", result.out)
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_what_is_needed_decides_the_exit_code(cli: Cli, tmp_path: Path, packages: dict[str, str | None]) -> None:
    packages["gguf"] = packages["mpi4py"] = packages["ipywidgets"] = None
    words = ("doctor", "--cache-dir", str(tmp_path))
    result = cli(*words)
    assert result.code == 0
    assert "  no  MPI: mpi4py is not installed\n      -> pip install mpi4py" in result.out
    assert "pip install 'llmapi[gguf]'" in result.out
    packages["transformers"] = "5.9.1"
    result = cli(*words)
    assert result.code == 1
    assert (
        "  no  transformers (needed): 5.9.1 is older than 5.10\n      -> pip install 'transformers>=5.10'" in result.out
    )
    assert "cannot run llmapi yet" in result.out
    packages["transformers"] = None
    assert "  no  transformers (needed): not installed\n" in cli(*words).out


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = dict(d.split(">=") for d in project["dependencies"])
    wanted.pop("mpi4py")  # optional on the cpu backend; it has a check of its own
    assert wanted == installed.REQUIRED
    for extra in ("gguf", "cuda", "tensorrt-rtx", "tensorrt"):  # that remedies name
        assert extra in project["optional-dependencies"]


def test_a_torch_that_cannot_be_loaded(packages: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    check = named(checks.packages(), "torch")
    assert not check.ok
    assert check.needed
    assert "cannot be loaded" in check.found
    assert "torch cannot be loaded" in named(checks.gpus(), "torch with CUDA").found


def test_mpi_without_a_library(packages: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    packages["mpi4py"] = "4.1.0"
    monkeypatch.setattr(checks, "_LOAD_MPI", "import os; os.abort()")
    check = named(checks.packages(), "MPI")
    assert (check.ok, check.needed) == (False, False)
    assert "finds no MPI library" in check.found
    monkeypatch.setattr(checks, "_LOAD_MPI", "print('Open MPI v5')")
    assert named(checks.packages(), "MPI") == Check("MPI", True, "mpi4py 4.1.0, Open MPI v5")


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an ``nvidia-smi`` first in the path."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = "NVIDIA H200, 9.0, 143771 MiB, 570.1\nNVIDIA H200, 9.0, 143771 MiB, 570.1"
    smi(tmp_path, monkeypatch, f'case "$1" in *compute_cap*) printf "{rows}\\n";; esac'.replace("\n", "\\n"))
    found = named(checks.gpus(), "GPU 1")
    assert (found.ok, found.found) == (True, "NVIDIA H200, compute capability 9.0, 143771 MiB, driver 570.1")
    smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    found = named(checks.gpus(), "GPU")
    assert (found.ok, found.found) == (False, "nvidia-smi found none (NVIDIA-SMI has failed)")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert "no NVIDIA driver" in named(checks.gpus(), "GPU").found


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(c.ok for c in checks.cache(tmp_path))
    file = tmp_path / "file"
    file.touch()
    for root in (file, file / "below"):
        (check,) = checks.cache(root)
        assert not check.ok
        assert check.needed
        assert "--cache-dir" in check.remedy

    def refuse(folder: Path) -> None:
        raise CacheError("locks do not work on this file system")

    monkeypatch.setattr(store_lock, "check_locks", refuse)
    locks = named(checks.cache(tmp_path), "locks")
    assert (locks.ok, locks.needed, locks.found) == (False, True, "locks do not work on this file system")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert named(checks.cache(tmp_path), "free space").found == "1.0 kB"
    assert not named(checks.cache(tmp_path), "free space").ok
    assert list(tmp_path.iterdir()) == [file]


def test_cache_folder_that_cannot_be_written() -> None:
    check = named(checks.cache(Path("/proc/llmapi")), "writable")
    assert (check.ok, check.needed) == (False, True)
    assert check.found.startswith("/proc: ")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in named(checks.hub(network=True), "online").found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        assert named(checks.hub(network=False), "endpoint").ok
        assert hub.log == []  # the network is left alone
        assert named(checks.hub(network=True), "endpoint").found == f"{hub.endpoint} answers"
        assert len(hub.log) == 1
    check = named(checks.hub(network=True), "endpoint")
    assert not check.ok
    assert "cannot be reached" in check.found


def test_machine_reads_what_the_system_says() -> None:
    total, free = machine.memory() or (0, 0)
    assert total > free > 0
    assert machine.cores() == len(os.sched_getaffinity(0))
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}  # which nproc heeds
    nproc = subprocess.run(["nproc"], capture_output=True, text=True, check=True, env=plain)
    assert str(machine.cores()) == nproc.stdout.strip()
    assert f"torch {torch.__version__}" in machine.summary()
