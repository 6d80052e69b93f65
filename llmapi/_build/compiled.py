"""Compiled: what the cuda backend keeps in the store beside graph and weights: machine code, and measured choices."""

from __future__ import annotations

import importlib.metadata

from llmapi._build.artifact_keys import sources
from llmapi._build.key import Key, Part, canonical, schema_part, toolchain_parts
from llmapi._build.names import CUBIN_FILE
from llmapi._build.store import Manifest, Staging, Store
from llmapi._kernels import nvrtc
from llmapi._kernels.nvrtc import Unit

# CUDA sources that take part in the measurements
_TUNED = ("skinny_linear.cu", "skinny_linear_copy.cu", "gated_activation.cu")
_VARIANTS = ("_kernels/skinny_linear_cuda.py", "_kernels/skinny_linear_layout.py", "_runtime/linear_cuda.py")


def kernel_key(unit: Unit, arch: str) -> Key:
    """Key of one unit's machine code.

    Left out: the GPU's name (machine code depends on the architecture alone), the driver and torch (they load it), and
    every source that the unit does not include.

    Args:
        unit: the specialization.
        arch: such as ``"sm_90a"``.
    """
    return Key([schema_part(), *(Part(name, value) for name, value in nvrtc.key_parts(unit, arch).items())])


def renewed_key(manifest: Manifest) -> Key | None:
    """The key that the unit of a stored kernel has now; None where its source is no longer part of the package.

    Args:
        manifest: of the entry. Its label begins with the source's name.
    """
    source = manifest.label.partition(" ")[0]
    if not (nvrtc.CSRC / source).is_file():
        return None
    made = {part.name: part.value for part in manifest.key.parts}
    parts = {**nvrtc.key_parts(Unit(source), made["target"]), "defines": made["defines"]}
    return Key([schema_part(), *(Part(name, value) for name, value in parts.items())])


def tuning_key(gpu: str, arch: str, dtype: str, cases: list[str]) -> Key:
    """Key of a table of measured choices.

    Args:
        gpu: name of the device; times differ between GPUs of one architecture.
        arch: its architecture.
        dtype: of weights and activations.
        cases: what was measured.
    """
    kernels = {source: nvrtc.source_text_digest(source) for source in _TUNED}
    kernels["variants"] = sources(*_VARIANTS)  # what the numbers in the table mean, and which ones are tried
    parts = [Part("gpu", gpu), Part("target", arch), Part("dtype", dtype), Part("cases", canonical(sorted(cases)))]
    parts += [Part("kernels", canonical(kernels)), Part("cublas", _cublas())]
    return Key([*toolchain_parts(), *parts])


def cached_cubin(store: Store, unit: Unit, arch: str) -> bytes:
    """Machine code of a unit, compiled if the store has none.

    Args:
        store: the cache.
        unit: the specialization.
        arch: for what.

    Raises:
        BuildError: it does not compile.
    """

    def build(staging: Staging) -> None:
        code = nvrtc.compile_unit(unit, arch)
        with staging.open(CUBIN_FILE) as out:
            out.write(code)

    # a start without any compiles a hundred at once: what each differs in, `llmapi cache why` tells
    with store.build("kernel", kernel_key(unit, arch), f"{unit.label} for {arch}", build, explain=False) as entry:
        return entry.file(CUBIN_FILE).read_bytes()


def _cublas() -> str:
    """Version of the cuBLAS that torch uses, as far as Python's packages tell."""
    for name in ("nvidia-cublas", "nvidia-cublas-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of the system"
