"""The skinny products on the emulator: both kernels, with what they have of clusters, bulk copies and mbarriers.

Hopper's matrix instruction of a warpgroup is not emulated: here the bulk kernel multiplies with that of a warp, as it
does on GPUs after Hopper.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmapi._kernels import skinny_linear_cuda
from tests.emulator import cases
from tests.emulator.gpu import EmulatedGpu
from tests.emulator.tensor_map import EmulatedTensorMap


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(skinny_linear_cuda, "TensorMap", EmulatedTensorMap)
    yield
    EmulatedTensorMap.made.clear()


def test_copied(kernel_folder: Path) -> None:
    """The kernel that runs on any GPU, with partial tiles added up through memory; plain copies on Turing."""
    for capability in ((8, 0), (7, 5)):
        cases.skinny_copy(EmulatedGpu(kernel_folder, capability=capability))


@pytest.mark.parametrize("rows", [5, 16, 33, 100])
def test_bulk(kernel_folder: Path, rows: int) -> None:
    cases.skinny_bulk(EmulatedGpu(kernel_folder, capability=(9, 0), shared_memory=227 << 10), rows)


@pytest.mark.parametrize("rows", [3, 24, 70])
def test_norm_between(kernel_folder: Path, rows: int) -> None:
    cases.skinny_norm(EmulatedGpu(kernel_folder, capability=(9, 0), shared_memory=227 << 10), rows)
