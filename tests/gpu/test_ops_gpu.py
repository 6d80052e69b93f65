"""Every operator that has a launch, against its reference in float32 on the CPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmapi._kernels import OPS, Op, relative_error
from llmapi._kernels.gpu import Gpu

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Whatever is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def on(device: str, args: tuple[Any, ...]) -> list[Any]:
    return [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in copy.deepcopy(args)]


def compare(op: Op, sample: Any, call: Any, dtype: torch.dtype, seed: int) -> None:
    here, there = on("cpu", sample.args), on("cuda", sample.args)
    expected, actual = op.reference(*here), call(*there)
    pairs = zip(
        [*(expected if isinstance(expected, tuple) else (expected,)), *(here[i] for i in op.mutates)],
        [*(actual if isinstance(actual, tuple) else (actual,)), *(there[i] for i in op.mutates)],
        strict=True,
    )
    for e, a in pairs:
        assert a.device.type == "cuda"
        assert relative_error(a.cpu(), e) <= 2 * op.tolerance[dtype], (sample.label, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_reference_is_the_same_on_the_gpu(op: Op, dtype: torch.dtype) -> None:
    seed = random.randrange(1 << 30)
    for sample in op.samples(torch.Generator().manual_seed(seed), dtype):
        compare(op, sample, getattr(torch.ops.llmapi, op.name), dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.cuda], ids=lambda op: op.name)
def test_launch_equals_the_reference(op: Op, dtype: torch.dtype, gpu: Gpu) -> None:
    seed = random.randrange(1 << 30)
    launch = op.cuda
    assert launch is not None
    for sample in op.samples(torch.Generator().manual_seed(seed), dtype):
        compare(op, sample, lambda *args: launch(gpu, *args), dtype, seed)


def test_slots_below_zero_are_not_written(gpu: Gpu) -> None:
    launch = OPS["llmapi.rotary_kv_write.default"].cuda
    assert launch is not None
    for heads in (1, 2):
        caches = [torch.zeros(1, 8, heads, 64, device="cuda") for _ in range(2)]
        slots = torch.tensor([-1, 3], dtype=torch.int32, device="cuda")
        launch(gpu, torch.ones(2, 3 * heads * 64, device="cuda"), None, slots, *caches, False)
        for found in caches:
            assert found.sum() == heads * 64 and found[0, 3].sum() == heads * 64


def test_queries_may_stay_where_they_are(gpu: Gpu) -> None:
    op = OPS["llmapi.rotary_kv_write.default"]
    launch = op.cuda
    assert launch is not None
    for sample in op.samples(torch.Generator().manual_seed(5), torch.bfloat16):
        compare(op, sample, lambda *args: launch(gpu, *args, in_place=True), torch.bfloat16, 5)
