"""A stand-in for a loaded plan with plugins that computes next to nothing, on the CPU or on a GPU.

Its contexts echo a step's integers as logits, from and to the addresses that they were bound to, on the stream that
they are given: what is left to test is the engine's own work between CUDA's calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmapi._build.tensorrt.buckets import buckets, table_width
from llmapi._build.tensorrt.plan import PlanInfo
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.device_tensorrt import TensorRTDevice
from llmapi._runtime.engine_tensorrt_paged import TensorRTPagedEngine
from llmapi.config import EngineOptions, KvCacheConfig, resolve
from tests._runtime.test_engine_cpu import SPEC
from tests.tensorrt.fake_runtime import at

BATCH, TOKENS, LENGTH, BLOCKS = 4, 16, 256, 12
FACTORS = {"input_ids": 1.0, "positions": 3.0, "slot_mapping": 5.0}
"""Of the integers of a wanted row, whose sum every logit of it is."""


class EchoContext:
    """``IExecutionContext`` whose logits are sums of a row's integers.

    Args:
        view: gives the memory at an address as a tensor.
        delay: something slow to launch before.
    """

    def __init__(self, view: Callable[[int, tuple[int, ...], torch.dtype], torch.Tensor], delay: Callable[[], None]):
        self._view, self._delay = view, delay
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, torch.Tensor] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 16 == 0 and size == 1024

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def execute_async_v3(self, stream: int) -> bool:
        rows = self._shapes["logits_indices"][0]
        if not self._bound:  # at the first run, which no graph is made of
            self._bound = {n: self._view(self._addresses[n], s, torch.int32) for n, s in self._shapes.items()}
            self._bound["logits"] = self._view(self._addresses["logits"], (rows, SPEC.vocab_size), torch.float32)
            device = self._bound["logits"].device
            self._picked = torch.zeros(rows, dtype=torch.int32, device=device)
            self._sum = torch.zeros(rows, dtype=torch.float32, device=device)
        self._delay()
        self._sum.zero_()
        for name, factor in FACTORS.items():
            torch.index_select(self._bound[name], 0, self._bound["logits_indices"], out=self._picked)
            self._sum.add_(self._picked, alpha=factor)
        self._bound["logits"].copy_(self._sum[:, None].expand(-1, SPEC.vocab_size))
        return True


def echo_engine(gpu: TensorRTDevice, contexts: Callable[[], EchoContext], patch: pytest.MonkeyPatch) -> Any:
    """An engine over echoing contexts.

    Args:
        gpu: where it runs.
        contexts: makes one.
        patch: undone by the caller.
    """
    patch.setattr("llmapi._tensorrt.installed", lambda: ["tensorrt"])
    spec = replace(SPEC, head_dim=64)
    options = EngineOptions(
        backend="tensorrt", dtype="float32", max_seq_len=LENGTH, max_batch_size=BATCH, max_num_tokens=TOKENS,
        kv_cache=KvCacheConfig(max_tokens=BLOCKS * 64),
    )  # fmt: skip
    of = buckets(BATCH, TOKENS)
    shapes = [bucket.shapes(table_width(LENGTH)) for bucket in of]
    profiles = [{name: [list(shape)] * 3 for name, shape in own.items()} for own in shapes]
    info = PlanInfo("tensorrt", "10.15", ["sm90"], "float32", {}, {}, profiles, "", "plugin", 64)
    plan: Any = SimpleNamespace(
        info=info, contexts=[contexts() for _ in of], scratch_bytes=1024, said=lambda: "nothing", close=lambda: None
    )
    weights = {"one": torch.zeros(64, device=gpu.device)}
    return TensorRTPagedEngine(
        plan, lambda: weights, spec, resolve(options, spec), gpu=gpu, utilization=0.5
    )  # fmt: skip


def drive(engine: TensorRTPagedEngine, steps: int) -> None:
    """Queue steps of several sizes without waiting for any, then compare what each gave; then copy blocks.

    Args:
        engine: from :func:`echo_engine`.
        steps: how many.
    """
    found, expected = [], []
    for step in range(steps):
        count = (1, 2, 3, 1, 9, 16)[step % 6]
        sequences = min(count, 3)
        starts = [*range(sequences), count]
        ids, places = [step * 100 + i for i in range(count)], [step + i for i in range(count)]
        slots = [step * 7 + i for i in range(count)]
        wanted = [start - 1 for start in starts[1:]]
        lengths = [b - a + 1 for a, b in itertools.pairwise(starts)]
        batch = StepBatch(ids, places, slots, [[i] for i in range(sequences)], lengths, starts, wanted, [1] * 3, [])
        found.append(engine.step(batch).clone())
        expected.append([float(ids[w] + 3 * places[w] + 5 * slots[w]) for w in wanted])
    for logits, sums in zip(found, expected, strict=True):
        assert logits[:, 0].tolist() == sums and bool((logits == logits[:, :1]).all())
    for number, cache in enumerate(engine._caches.values()):
        cache.copy_(torch.arange(BLOCKS, device=cache.device).view(-1, 1, 1, 1) + 100 * number)
    batch = StepBatch([1], [0], [0], [[0]], [1], [0, 1], [0], [1], [(3, 7), (5, 1)])
    engine.step(batch)
    for number, cache in enumerate(engine._caches.values()):
        own = [100 * number + block for block in (0, 5, 2, 3, 4, 5, 6, 3, *range(8, BLOCKS))]
        assert cache[:, 5, 0, 3].tolist() == own


def on_cpu(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The host's memory at an address."""
    return at(address, shape, dtype)


def on_gpu(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The GPU's memory at an address."""
    kind = {torch.int32: "<i4", torch.float32: "<f4"}[dtype]
    told = {"shape": shape, "typestr": kind, "data": (address, False), "version": 3, "strides": None}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=told), device="cuda")
