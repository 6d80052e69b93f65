"""What can be said about a GPU today: the operators' references give the same there as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmapi._kernels import OPS, Op, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no NVIDIA GPU that torch can use")


def on(device: str, args: tuple[Any, ...]) -> list[Any]:
    return [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in copy.deepcopy(args)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_reference_is_the_same_on_the_gpu(op: Op, dtype: torch.dtype) -> None:
    registered = getattr(torch.ops.llmapi, op.name)
    for sample in op.samples(torch.Generator().manual_seed(11), dtype):
        here, there = on("cpu", sample.args), on("cuda", sample.args)
        expected, actual = registered(*here), registered(*there)
        pairs = zip(
            [*(expected if isinstance(expected, tuple) else (expected,)), *(here[i] for i in op.mutates)],
            [*(actual if isinstance(actual, tuple) else (actual,)), *(there[i] for i in op.mutates)],
            strict=True,
        )
        for e, a in pairs:
            assert a.device.type == "cuda"
            assert relative_error(a.cpu(), e) <= 2 * op.tolerance[dtype], sample.label
