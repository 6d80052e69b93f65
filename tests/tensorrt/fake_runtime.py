"""A stand-in for TensorRT's runtime on a machine without a GPU: the evaluator behind ``ICudaEngine``'s interface.

It knows tensors by their addresses alone, as the real one does, and refuses what the real one would: shapes outside the
profile, an output of a cache at another address than its input, missing addresses.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import contextmanager
from typing import Any

import torch

from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.plan import PlanInfo
from tests.tensorrt.evaluator import Evaluator

TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32}


class FakeEngine:
    """``ICudaEngine`` over an evaluated network."""

    def __init__(self, package: Package, evaluator: Evaluator, info: PlanInfo, owner: Any = None) -> None:
        self.evaluator, self.info, self.owner = evaluator, info, owner
        self._names = [*info.inputs, *info.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self._names), len(info.profiles)
        self.runs: list[tuple[int, tuple[int, ...]]] = []

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, config: Any) -> FakeContext:
        assert isinstance(config, FakeConfig) and config.cache is not None
        return FakeContext(self)


class FakeConfig:
    """``IRuntimeConfig``."""

    cache: Any = None

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class FakeCache:
    """``IRuntimeCache``."""

    blob = b""

    def deserialize(self, blob: bytes) -> bool:
        self.blob = blob
        return True

    def serialize(self) -> bytes:
        return self.blob + b"kernels"


class FakeContext:
    """``IExecutionContext``."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine.info.inputs or name in self._engine.info.outputs, name
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        smallest, _, largest = self._engine.info.profiles[self._profile][name]
        if len(shape) != len(smallest):
            return False
        if not all(a <= s <= b for a, s, b in zip(smallest, shape, largest, strict=True)):
            return False
        self._shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        info = self._engine.info
        inputs = {}
        for name, (kind, sizes) in info.inputs.items():
            shape = self._shapes[name] if -1 in sizes else tuple(sizes)
            inputs[name] = at(self._addresses[name], shape, TYPES[kind])
        for name in info.outputs:
            if name.endswith(".updated"):
                assert self._addresses[name] == self._addresses[name.removesuffix(".updated")], "not in place"
        self._engine.runs.append((self._profile or 0, tuple(inputs["input_ids"].shape)))
        for name, rows in self._engine.evaluator.run(inputs).items():
            if not name.endswith(".updated"):
                at(self._addresses[name], tuple(rows.shape), rows.dtype).copy_(rows)
        return True


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The memory at an address as a tensor."""
    count = math.prod(shape)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


@contextmanager
def no_stream() -> Any:
    """What stands for a CUDA stream."""
    yield 0
