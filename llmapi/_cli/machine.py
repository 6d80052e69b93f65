"""What this machine is: processor, memory, GPUs. Reads files and asks ``nvidia-smi``; changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_QUERY = "name,compute_cap,memory.total,driver_version"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it: texts such as ``"9.0"`` and ``"81559 MiB"``."""

    name: str
    compute_capability: str
    memory: str
    driver: str


def processor() -> str:
    """The processor's name."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> tuple[int, int] | None:
    """Bytes of memory in all and free; None where the system does not say."""
    found = {}
    for line in _lines("/proc/meminfo"):
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[name] = int(value.split()[0]) * 1024
    return (found["MemTotal"], found["MemAvailable"]) if len(found) == 2 else None


def gpus() -> list[Gpu] | str:
    """The NVIDIA GPUs, or why there are none to see."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi is not installed, so there is no NVIDIA driver"
    try:
        done = subprocess.run(
            [command, f"--query-gpu={_QUERY}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi cannot be run ({type(error).__name__})"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode or not rows:
        said = (done.stdout + done.stderr).strip().splitlines()
        return f"nvidia-smi found none ({said[0] if said else f'exit code {done.returncode}'})"
    return [Gpu(*row) for row in rows if len(row) == 4]


def summary() -> str:
    """The machine in one line, for measurements."""
    import torch

    from llmapi._build.store.disk import size_text

    held = memory()
    parts = [
        processor(),
        f"{cores()} cores",
        f"{torch.get_num_threads()} threads",
        *([f"{size_text(held[0])} memory"] if held else []),
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    return ", ".join(parts)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
