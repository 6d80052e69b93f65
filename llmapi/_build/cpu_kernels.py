"""The CPU kernels as an artifact: C++ sources, compiled once by the machine's own compiler and kept in the store.

Without a compiler, or where anything about this goes wrong, there are none, and torch's operators do the work.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from llmapi import _env
from llmapi._build.key import Key, Part, canonical, source_digest, schema_part
from llmapi._build.names import CPU_KERNELS_FILE
from llmapi._build.store import Staging, Store
from llmapi._build.store.entry import Entry
from llmapi.errors import BuildError, LLMAPIError

if TYPE_CHECKING:
    from llmapi._kernels.native import NativeKernels

log = logging.getLogger("llmapi")

COMPILERS = ("c++", "g++", "clang++")
"""Looked for in this order."""

SOURCES = Path(__file__).resolve().parent.parent / "_kernels" / "csrc_cpu"
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden", "-Wall", "-Wextra",
)  # fmt: skip
_TIMEOUT = 300.0  # seconds

_loaded: dict[str, NativeKernels] = {}  # by digest of the key: the same code twice in a process is of no use
_lock = threading.Lock()


KIND = "cpu-kernels"
"""Kind of the artifact."""


class NoKernels(Exception):
    """There are no compiled kernels; the text says why."""


def find_compiler() -> tuple[str, str]:
    """Path of the C++ compiler, and the first line of what it says of its version.

    Raises:
        NoKernels: there is none, or it does not run.
    """
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise NoKernels(f"the compiler {path} cannot be run ({type(error).__name__})") from error
        return path, (done.stdout.strip().splitlines() or [""])[0]
    raise NoKernels(f"there is no C++ compiler ({', '.join(COMPILERS)})")


def kernels_key(version: str) -> Key:
    """Key of the compiled kernels: all that shapes the machine code.

    Left out: the compiler's path (what it says of itself counts) and torch (no code of it is compiled in; its thread
    pool is found at run time).

    Args:
        version: what the compiler says of itself.
    """
    return Key(
        [
            schema_part(),
            Part("sources", source_digest(SOURCES)),
            Part("flags", canonical(FLAGS)),
            Part("compiler", version),
            Part("machine", platform.machine()),
            Part("processor", canonical(_processor())),
        ]
    )


def compile_kernels(compiler: str, target: Path) -> None:
    """Compile the sources into a shared object.

    Args:
        compiler: path of the C++ compiler.
        target: file to write.

    Raises:
        BuildError: the compiler refuses, with what it said.
    """
    # Compiled and linked in one go, with no OpenMP flag: the thread pool is torch's, handed over at load.
    command = [compiler, *FLAGS, "-shared", str(SOURCES / "kernels.cpp"), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} could not be run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise BuildError(f"{compiler} does not compile the CPU kernels: {said}")


def obtain(store: Store) -> NativeKernels:
    """The compiled kernels, loaded; from this process, from the cache, or compiled now.

    Args:
        store: the cache.

    Raises:
        NoKernels: with the reason.
    """
    if not _env.cpu_kernels():
        raise NoKernels("LLMAPI_CPU_KERNELS is 0")
    from llmapi._kernels.native import NativeKernels

    compiler, version = find_compiler()
    key = kernels_key(version)

    def build(staging: Staging) -> None:
        compile_kernels(compiler, staging.file(CPU_KERNELS_FILE))

    with _lock:
        if key.digest not in _loaded:
            try:
                with store.build(KIND, key, "CPU kernels", build) as entry:
                    _loaded[key.digest] = NativeKernels(checked(entry))
            except (LLMAPIError, OSError) as error:
                raise NoKernels(str(error)) from error
        return _loaded[key.digest]


def checked(entry: Entry) -> Path:
    """The shared object of an entry, which is about to be executed: written by this user, and as the manifest says.

    Args:
        entry: from the cache.

    Raises:
        NoKernels: somebody else could have written it, or its digest is another.
    """
    path = entry.file(CPU_KERNELS_FILE)
    for place in (path, entry.path):
        info = place.stat()
        if info.st_uid not in (os.geteuid(), 0) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NoKernels(f"{place} is not writable by this user alone, so it is not executed")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry.manifest.files[CPU_KERNELS_FILE].sha256:
        raise NoKernels(f"{path} does not have the digest that its manifest names")
    return path


def _processor() -> dict[str, str]:
    """Model and features of the processor: code for one of them need not run on another."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU part", "Features")
    found: dict[str, str] = {}
    table = Path("/proc/cpuinfo")
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines() if table.exists() else ():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in wanted:
            found.setdefault(name, " ".join(sorted(value.split())) if name in ("flags", "Features") else value)
    return found or {"name": platform.processor()}
