"""NVRTC: CUDA C++ of this package to machine code for one GPU architecture. No GPU, driver or compiler is needed.

A :class:`Unit` is one source file of ``csrc/`` with its macros: one specialization. Its machine code (a cubin) depends
on the unit, the sources, the architecture and the version of NVRTC, and on nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmapi._device import OLDEST_CAPABILITY
from llmapi.errors import BuildError

CSRC = Path(__file__).parent / "csrc"

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_120")
"""What the kernels compile for: Turing to Blackwell. Hopper's own instructions need the ``a``."""

DTYPE_MACRO = {"float32": "0", "float16": "1", "bfloat16": "2"}
"""Value of ``LLM_DTYPE`` by element type; see ``csrc/common.cuh``."""


@dataclass(frozen=True)
class Unit:
    """One specialization of one source file.

    Attributes:
        source: file name in ``csrc/``.
        defines: macros, sorted by name.
    """

    source: str
    defines: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, source: str, **defines: int | str) -> Unit:
        """With macros as keyword arguments.

        >>> Unit.of("norm.cu", LLM_DTYPE=2)
        Unit(source='norm.cu', defines=(('LLM_DTYPE', '2'),))
        """
        return cls(source, tuple(sorted((name, str(value)) for name, value in defines.items())))

    @property
    def label(self) -> str:
        """For messages: ``norm.cu LLM_DTYPE=2``."""
        return " ".join([self.source, *(f"{name}={value}" for name, value in self.defines)])


def architecture(major: int, minor: int) -> str:
    """Name of a compute capability for NVRTC.

    Raises:
        BuildError: older than Turing.

    >>> architecture(9, 0)
    'sm_90a'
    """
    if (major, minor) < OLDEST_CAPABILITY:
        raise BuildError(
            f"this GPU has compute capability {major}.{minor}; the kernels need 7.5 (Turing) or newer: "
            "use backend='cpu'"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@functools.cache
def source_text_digest(source: str) -> str:
    """SHA-256 over a source file and all it includes from ``csrc/``, in order of first inclusion."""
    seen: dict[str, bytes] = {}

    def visit(name: str) -> None:
        if name in seen or not (CSRC / name).is_file():
            return
        seen[name] = text = (CSRC / name).read_bytes()
        for included in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            visit(included.decode())

    visit(source)
    digest = hashlib.sha256()
    for name, text in seen.items():
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()


def version() -> str:
    """Version of the NVRTC at hand, such as ``13.0``.

    Raises:
        BuildError: there is none.
    """
    nvrtc = _nvrtc()
    error, major, minor = nvrtc.nvrtcVersion()
    _check(error, "asking for its version")
    return f"{major}.{minor}"


def key_parts(unit: Unit, arch: str) -> Mapping[str, str]:
    """Everything that shapes the machine code of a unit, by name.

    Args:
        unit: what to compile.
        arch: one of :data:`ARCHITECTURES`, or another that NVRTC knows.
    """
    return {
        "source": source_text_digest(unit.source),
        "defines": " ".join(f"{name}={value}" for name, value in unit.defines),
        "target": arch,
        "nvrtc": version(),
        "options": " ".join(_OPTIONS),
    }


_OPTIONS = ("--std=c++17",)


def compile_unit(unit: Unit, arch: str) -> bytes:
    """Machine code (a cubin) of a unit.

    Args:
        unit: what to compile.
        arch: for what, such as ``"sm_90a"``.

    Raises:
        BuildError: NVRTC or CUDA's headers are missing, or the source does not compile; with the compiler's log.
    """
    nvrtc = _nvrtc()
    return _compiled(unit, arch, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)


def compile_ptx(unit: Unit, arch: str) -> bytes:
    """PTX of a unit, which a driver compiles for its GPU.

    Args:
        unit: what to compile.
        arch: the oldest that it must run on, such as ``"compute_80"``.

    Raises:
        BuildError: as :func:`compile_unit`.
    """
    nvrtc = _nvrtc()
    return _compiled(unit, arch, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")


def _compiled(unit: Unit, arch: str, size_of: Any, get: Any) -> bytes:
    nvrtc = _nvrtc()
    text = (CSRC / unit.source).read_bytes()
    options = [*_OPTIONS, f"--gpu-architecture={arch}", f"-I{CSRC}", f"-I{_headers()}"]
    options += [f"-D{name}={value}" for name, value in unit.defines]
    error, program = nvrtc.nvrtcCreateProgram(text, unit.source.encode(), 0, [], [])
    _check(error, unit.label)
    try:
        encoded = [option.encode() for option in options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BuildError(f"{unit.label} does not compile for {arch}:\n{log.decode(errors='replace').strip()}")
        error, size = size_of(program)
        _check(error, unit.label)
        code: bytes = b" " * size
        (error,) = get(program, code)
        _check(error, unit.label)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BuildError(
            f"the cuda backend compiles its kernels with NVRTC, and Python finds none ({error}): "
            'pip install "llmapi[cuda]"'
        ) from error
    return nvrtc


@functools.cache
def _headers() -> Path:
    """Folder with ``cuda_bf16.h``."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None or not (Path(found) / "cuda_bf16.h").is_file():
        raise BuildError('CUDA\'s headers (cuda_bf16.h) are not installed: pip install "llmapi[cuda]"')
    return Path(found)


def _check(error: Any, what: str) -> None:
    if int(error) != 0:
        raise BuildError(f"NVRTC failed at {what}: {error}")
