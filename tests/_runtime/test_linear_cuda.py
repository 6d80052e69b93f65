"""Which implementation a linear layer takes on a GPU: every case is measured once, and the fastest one wins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.skinny_linear_layout import Layout, Variant
from llmapi._runtime import linear_cuda
from llmapi._runtime.linear_cuda import CUBLAS, ROWS, CudaLinear, LinearChoices


class PretendGpu:
    """The facts of an H200, and no GPU: what is prefetched is noted, nothing can be launched."""

    device = torch.device("cpu")
    capability = (9, 0)
    sms = 132
    shared_memory = 227 << 10

    def __init__(self) -> None:
        self.units: list[Unit] = []

    def prefetch(self, units: Iterable[Unit]) -> None:
        self.units += units


@pytest.fixture
def choices() -> LinearChoices:
    gpu: Any = PretendGpu()
    return LinearChoices(gpu, torch.bfloat16)


def weights(n: int, k: int) -> list[torch.Tensor]:
    return [torch.zeros(n, k, dtype=torch.bfloat16) for _ in range(2)]


def test_the_fastest_of_each_case_is_kept(choices: LinearChoices, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 1.0, 2.0, *[9.0] * 100])
    monkeypatch.setattr(linear_cuda, "_time", lambda call, weights: next(times))
    choices.tune([(None, weights(256, 512))], rows=(1, 8))
    assert choices.kernel is not None
    variants = choices.kernel.variants(1, 256, 512)
    assert choices.table == {"1x256x512": variants[0], "8x256x512": CUBLAS}
    assert choices.variant(1, 256, 512, None) == variants[0]
    assert choices.variant(5, 256, 512, None) is None
    units = choices.gpu.units  # type: ignore[attr-defined]
    assert {u.source for u in units} == {"skinny_linear.cu"}
    assert len(units) == 2 * min(len(variants), 6)


def test_a_gate_is_a_case_of_its_own(choices: LinearChoices, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(call: Callable[[torch.Tensor], None], weights: list[torch.Tensor]) -> float:
        return 1.0

    monkeypatch.setattr(linear_cuda, "_time", timed)
    choices.tune([(None, weights(256, 512)), ("silu", weights(256, 512))])
    assert set(choices.table) == {f"{r}x256x512{g}" for r in ROWS for g in ("", " silu")}
    assert set(choices.table.values()) == {CUBLAS}  # a tie goes to cuBLAS


def test_what_was_not_measured_is_cublas(choices: LinearChoices) -> None:
    choices.table["64x256x512"] = 11
    assert choices.variant(32, 256, 512, None) is None  # 32 rows were not measured
    assert choices.variant(33, 256, 512, None) == choices.variant(64, 256, 512, None) == 11
    assert choices.variant(65, 256, 512, None) is None and choices.variant(129, 256, 512, None) is None
    assert choices.variant(64, 257, 512, None) is None
    x = torch.randn(3, 512).bfloat16()
    weight, bias = torch.randn(256, 512).bfloat16(), torch.randn(256).bfloat16()
    layer = CudaLinear(choices, weight, bias)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, bias))
    assert layer(x[:0]).shape == (0, 256)


def test_float32_is_always_cublas() -> None:
    gpu: Any = PretendGpu()
    choices = LinearChoices(gpu, torch.float32)
    choices.tune([(None, [torch.zeros(8, 8)])])
    assert choices.table == {} and choices.variant(1, 8, 8, None) is None


def test_a_choice_fits_every_number_of_rows_that_takes_it() -> None:
    """What was measured at 64 rows is laid out anew for 33, whose code is another."""
    for rows in range(1, ROWS[-1] + 1):
        measured = linear_cuda.bucket_of(rows)
        for n, k in ((4096, 4096), (22016, 4096), (4096, 11008), (576, 1536), (8, 64)):
            for cluster, boxes, coarse in itertools.product((0, 1, 2), (1, 2, 4, 8), (0, 1)):
                variant = Variant(cluster, boxes, coarse)
                if Layout.of(variant, measured, n, k, sms=132, shared_memory=227 << 10):
                    assert Layout.of(variant, rows, n, k, sms=132, shared_memory=227 << 10), (rows, n, k, variant)
