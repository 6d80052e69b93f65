"""Every kernel compiles for every architecture, with no GPU; what cannot compile says why."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import llmapi._kernels
from llmapi._kernels import nvrtc
from llmapi._kernels.nvrtc import ARCHITECTURES, CSRC, DTYPE_MACRO, Unit, architecture, compile_unit, key_parts
from llmapi.errors import BuildError

MODULES = sorted(m.name for m in pkgutil.iter_modules(llmapi._kernels.__path__) if m.name.endswith("_cuda"))
MODULES.append("plugins")


FULL = ("sm_75", "sm_80", "sm_90a", "sm_120")
"""Architectures for which every specialization is compiled; on the others one of each source, for the sake of time."""

LIKE_ANOTHER = ("sm_86", "sm_89", "sm_100", "sm_103")
"""Architectures for which every source says the same as for sm_80 and sm_120."""

HOPPERS = [path.name for path in CSRC.glob("*.cu") if "wgmma" in path.read_text()]
"""Sources whose accumulators must all have registers on sm_90a, which the compiler says only where it optimizes."""

AS_USERS_GET_IT = ("sm_80", "sm_90a")
"""Architectures for which the last specialization of each source is optimized; the rest goes the quick way."""

QUICK = "--Ofast-compile=max"
"""Front end and assembler refuse the same things, without the optimizer's time, which is most of it."""


def to_compile(module: str, arch: str) -> Iterator[tuple[Unit, bool]]:
    """What of a module's units this test compiles for an architecture, and whether the quick way will do.

    As users get it: for two architectures the last specialization of each source (in clusters, if any), and all of
    Hopper's own. Of clusters, 1 and 8 blocks in every type, and the numbers between in one. Sampling without edits,
    whose text is part of that with edits, only in one type for Hopper.
    """
    types = DTYPE_MACRO if arch == "sm_90a" else ["float16" if arch == "sm_75" else "bfloat16"]  # Turing: no bfloat16
    for dtype in types:
        units = importlib.import_module(f"llmapi._kernels.{module}").units(dtype)
        if arch < "sm_90" and not arch.startswith("sm_1"):
            units = [unit for unit in units if int(dict(unit.defines).get("SPLIT", 1)) == 1]  # no clusters there
        if dtype != "bfloat16":
            units = [unit for unit in units if int(dict(unit.defines).get("SPLIT", 1)) not in (2, 4)]
        if arch != "sm_90a" or dtype != "bfloat16":
            units = [unit for unit in units if ("EDITED", "0") not in unit.defines]
        first, last = {unit.source: unit for unit in reversed(units)}, {unit.source: unit for unit in units}
        for unit in units:
            if arch not in FULL:
                if unit == first[unit.source]:
                    yield unit, arch in LIKE_ANOTHER
            elif arch == "sm_90a" and dtype != "bfloat16":
                yield unit, True
            else:
                optimized = unit == last[unit.source] and arch in AS_USERS_GET_IT
                yield unit, not optimized and not (arch == "sm_90a" and unit.source in HOPPERS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_compiles_for_every_architecture(module: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict.fromkeys(to_compile(module, arch))
    assert found or module == "skinny_linear_cuda"
    for quick, options in ((False, nvrtc._OPTIONS), (True, (*nvrtc._OPTIONS, QUICK))):
        monkeypatch.setattr(nvrtc, "_OPTIONS", options)
        units = [unit for unit, is_quick in found if is_quick == quick]
        with ThreadPoolExecutor(2) as pool:
            for unit, code in zip(units, pool.map(lambda unit: compile_unit(unit, arch), units), strict=True):
                assert code[:4] == b"\x7fELF", unit.label


@pytest.mark.parametrize("options", [(), (QUICK,)], ids=["as users get it", "quick"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("float* y = x;", "cannot be used to initialize"),
        ('asm volatile("cp.async.wait_group 0;");', "requires .target sm_80 or higher"),
        ("__shared__ int s[20000]; s[x[0]] = 1; __syncthreads(); x[1] = s[x[2]];", "too much shared data"),
        ("extern __device__ int g(int); x[0] = g(x[1]);", "Unresolved extern function"),
    ],
)
def test_both_ways_of_the_compiler_notice(
    body: str, message: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.cu").write_text(f'extern "C" __global__ void f(int* x) {{ {body} }}')
    monkeypatch.setattr(nvrtc, "CSRC", tmp_path)
    monkeypatch.setattr(nvrtc, "_OPTIONS", (*nvrtc._OPTIONS, *options))
    with pytest.raises(BuildError, match=message):
        compile_unit(Unit.of("bad.cu"), "sm_75")


def test_every_source_belongs_to_a_unit() -> None:
    """A source file that no ``units()`` names would never be compiled by the test above."""
    named = {u.source for m in MODULES for u in importlib.import_module(f"llmapi._kernels.{m}").units("bfloat16")}
    assert {path.name for path in CSRC.glob("*.cu")} == named


def test_an_error_shows_the_compilers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.cu").write_text('extern "C" __global__ void f() { int x = ; }')
    monkeypatch.setattr(nvrtc, "CSRC", tmp_path)
    with pytest.raises(BuildError, match=r"bad.cu A=1 does not compile for sm_80:\n.*bad.cu\(1\): error"):
        compile_unit(Unit.of("bad.cu", A=1), "sm_80")


def test_a_key_knows_every_file_that_is_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include <cuda_fp16.h>\n')
    (tmp_path / "b.cuh").write_text('#  include "c.cuh"\n')
    (tmp_path / "c.cuh").write_text("one")
    monkeypatch.setattr(nvrtc, "CSRC", tmp_path)
    nvrtc.source_text_digest.cache_clear()
    before = key_parts(Unit.of("a.cu"), "sm_90a")
    (tmp_path / "c.cuh").write_text("two")
    nvrtc.source_text_digest.cache_clear()
    after = key_parts(Unit.of("a.cu"), "sm_90a")
    nvrtc.source_text_digest.cache_clear()
    assert {name for name in before if before[name] != after[name]} == {"source"}
    assert key_parts(Unit.of("a.cu", N=2), "sm_90a")["defines"] == "N=2"


def test_architectures() -> None:
    assert architecture(8, 9) == "sm_89" and architecture(9, 0) == "sm_90a" and architecture(12, 0) == "sm_120"
    with pytest.raises(BuildError, match=r"7\.0; the kernels need 7\.5"):
        architecture(7, 0)
