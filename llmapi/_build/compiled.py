"""Compiled: what the cuda backend keeps in the store beside graph and weights: machine code, and measured choices."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from llmapi._build.key import Key, Part, canonical, schema_part, toolchain_parts
from llmapi._build.names import CUBIN_FILE, TUNING_FILE
from llmapi._build.store import Staging, Store
from llmapi._kernels import nvrtc
from llmapi._kernels.nvrtc import Unit


def kernel_key(unit: Unit, arch: str) -> Key:
    """Key of one unit's machine code.

    Left out: the GPU's name (machine code depends on the architecture alone), the driver and torch (they load it), and
    every source that the unit does not include.

    Args:
        unit: the specialization.
        arch: such as ``"sm_90a"``.
    """
    return Key([schema_part(), *(Part(name, value) for name, value in nvrtc.key_parts(unit, arch).items())])


def tuning_key(gpu: str, arch: str, dtype: str, cases: list[str], sources: dict[str, str]) -> Key:
    """Key of a table of measured choices.

    Args:
        gpu: name of the device; times differ between GPUs of one architecture.
        arch: its architecture.
        dtype: of weights and activations.
        cases: what was measured.
        sources: digests of the kernels that took part.
    """
    parts = [Part("gpu", gpu), Part("target", arch), Part("dtype", dtype), Part("cases", canonical(sorted(cases)))]
    parts += [Part("kernels", canonical(sources)), Part("cublas", _cublas())]
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

    with store.build("kernel", kernel_key(unit, arch), f"{unit.label} for {arch}", build) as entry:
        return entry.file(CUBIN_FILE).read_bytes()


def cached_tuning(store: Store, key: Key, label: str, measure: Callable[[], dict[str, int]]) -> dict[str, int]:
    """A table of choices, measured if the store has none.

    Args:
        store: the cache.
        key: from :func:`tuning_key`.
        label: the model's name.
        measure: makes the table.
    """

    def build(staging: Staging) -> None:
        table = measure()
        with staging.open(TUNING_FILE) as out:
            out.write(json.dumps(table, indent=1, sort_keys=True).encode())

    with store.build("tuning", key, label, build) as entry:
        data: Any = json.loads(entry.file(TUNING_FILE).read_text(encoding="utf-8"))
    return {str(name): int(choice) for name, choice in data.items()}


def _cublas() -> str:
    """Version of the cuBLAS that torch uses, as far as Python's packages tell."""
    for name in ("nvidia-cublas", "nvidia-cublas-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of the system"
