"""Kernel sources to shared objects, by the machine's g++."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from llmapi._kernels.nvrtc import CSRC, Unit

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
MISSING = "the kernel emulator needs g++, and there is none: install it (apt-get install g++)"

Sources = Mapping[str, str]
"""Texts of source files by name."""

_FLAGS = ("-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-w")
_UNIT_FLAGS = (
    "-D_GLIBCXX_INCLUDE_NEXT_C_HEADERS",  # <math.h> is C's: that of C++ takes longer than most kernels
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    # What a GPU would fault at or answer otherwise becomes a trap, which the runtime reports.
    "-fsanitize=alignment,bounds,shift-exponent",
    "-fsanitize-undefined-trap-on-error",
)
_REPLACED = {"ptx.cuh", "skinny_linear.cuh"}  # by those of include/


class BuildFailure(Exception):
    """g++ refused a source; with what it said."""


@functools.cache
def sources() -> Sources:
    """The kernels' sources."""
    return {path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in (".cu", ".cuh")}


def entries(text: str) -> list[str]:
    """Names of the kernels that a source defines.

    >>> entries('extern "C" __global__ void __launch_bounds__(2 * N) f(int x) {}')
    ['f']
    """
    bare = re.sub(r"__launch_bounds__\([^)]*\)", "", text)
    return re.findall(r'extern "C" __global__ void\s+(?:[A-Z]+\s+)?(\w+)\s*\(', bare)


def runtime(folder: Path) -> Path:
    """The shared object of ``runtime.cpp``.

    Args:
        folder: where to keep it.
    """
    text = (HERE / "runtime.cpp").read_text() + (HERE / "include" / "runtime.h").read_text()
    out = folder / f"runtime-{_digest(text)}.so"
    if not out.exists():
        _compile([*_FLAGS, "-O2", f"-I{HERE}", str(HERE / "runtime.cpp")], out)
    return out


def shared_object(unit: Unit, arch: str, folder: Path, texts: Sources, *, optimize: bool = True) -> Path:
    """A unit, compiled; one that is in the folder already is not compiled again.

    Args:
        unit: source and macros.
        arch: whose code is meant, such as ``"sm_80"``: the value of ``__CUDA_ARCH__``.
        folder: where to keep it; several processes may share it.
        texts: the sources.
        optimize: whether it shall run fast; compiling then takes twice as long.

    Raises:
        BuildFailure: it does not compile.
    """
    used = _included(unit.source, texts)
    staged = folder / f"sources-{_digest(*used, *(texts[name] for name in used))}"
    level = "-O1" if optimize else "-O0"
    out = staged / f"{_digest(unit.label, arch, level, _headers())}.so"
    if out.exists():
        return out
    staged.mkdir(exist_ok=True)
    for name in used:
        _write(staged / name, _dynamic_shared(texts[name]))
    listed = ", ".join(f"EMULATED_ENTRY({name})" for name in entries(texts[unit.source]))
    main = staged / f"{out.stem}.cpp"
    _write(main, f'#include "{unit.source}"\nEMULATED_UNIT({listed})\n')
    number = re.findall(r"\d+", arch)[0]
    macros = {"__CUDA_ARCH__": f"{number}0", "__CUDACC__": "1", **dict(unit.defines)}
    options = [*_FLAGS, level, *_UNIT_FLAGS, *(f"-D{name}={value}" for name, value in macros.items())]
    options += [f"-I{HERE / 'include'}", "-include", "cuda_shim.h", str(main)]
    _compile(options, out, unit.label)
    return out


def _included(source: str, texts: Sources) -> list[str]:
    """A source and all that it includes, but for what the emulator replaces."""
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in found or name in _REPLACED or name not in texts:
            return
        found[name] = None
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[name], re.MULTILINE):
            visit(included)

    visit(source)
    return list(found)


def _dynamic_shared(text: str) -> str:
    """C++ has no way to write ``extern __shared__ T name[];``: it becomes a pointer."""
    return re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulated::dynamic_shared());",
        text,
    )


@functools.cache
def _headers() -> str:
    return _digest(*_FLAGS, *_UNIT_FLAGS, *(path.read_text() for path in sorted((HERE / "include").iterdir())))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    own = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    own.write_text(text)
    own.replace(path)


def _compile(options: list[str], out: Path, label: str = "the emulator") -> None:
    assert COMPILER is not None, MISSING
    own = out.with_name(f"{out.name}.{os.getpid()}.{threading.get_ident()}")
    done = subprocess.run([COMPILER, *options, "-o", str(own)], capture_output=True, text=True)
    if done.returncode:
        raise BuildFailure(f"g++ refuses {label}:\n{done.stderr}")
    own.replace(out)
