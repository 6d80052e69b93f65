"""``LLM(..., backend="tensorrt")`` over the full TensorRT, whose builder and runtime are the stand-in's."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM
from llmapi._build.graph import Graph
from llmapi._runtime import load_tensorrt
from llmapi._runtime.device_tensorrt import TensorRTDevice
from llmapi._tensorrt import BLOCK_SIZE
from tests.tensorrt.fake_network import fake_tensorrt
from tests.tensorrt.fake_paged_runtime import Event, World

GPU = "a GPU"
LIMITS: dict[str, Any] = {"dtype": "float32", "max_seq_len": 200, "max_batch_size": 4, "max_num_tokens": 48}


@contextmanager
def full_tensorrt(patch: pytest.MonkeyPatch) -> Iterator[World]:
    """A machine with an Ada GPU and the full TensorRT, as far as anyone can tell.

    Args:
        patch: undone by the caller.
    """
    with fake_tensorrt() as trt:
        world: World = trt.world
        patch.setattr("llmapi._tensorrt.installed", lambda: ["tensorrt"])
        patch.setattr("llmapi._device.cuda_visible", lambda: True)
        patch.setattr("llmapi._device.cuda_capability", lambda: (8, 9))
        patch.setattr("torch.cuda.get_device_name", lambda: GPU)

        class CpuDevice(TensorRTDevice):
            def __init__(self) -> None:
                self.device, self.name, self.driver = torch.device("cpu"), GPU, 13000

            def read_weights(self, graph: Graph, file: Any, done: Any) -> dict[str, torch.Tensor]:
                return {i.name: file.read(i.parts) for i in graph.inputs if i.kind == "weight"}

            def free_bytes(self, utilization: float) -> int:
                assert utilization == 0.9
                world.calls.append(("size", 0))
                return world.free_bytes

            def stream(self) -> Any:
                return world.stream()

            def pinned(self, count: int) -> torch.Tensor:
                return torch.full((count,), 12345, dtype=torch.int32)

            def event(self) -> Any:
                return Event()

            def capture(self, run: Any) -> Any:
                return world.capture(run)

            def synchronize(self) -> None:
                world.calls.append(("wait", 0))

        load = load_tensorrt.load_tensorrt

        def remember(*args: Any, **options: Any) -> Any:
            found: Any = load(*args, **options)
            engine = weakref.proxy(found)

            def cache_at(address: int) -> torch.Tensor:
                [cache] = [c for c in engine._caches.values() if c.data_ptr() == address]
                return cache

            world.cache_at = cache_at
            return found

        patch.setattr(load_tensorrt, "load_tensorrt", remember)
        patch.setattr(load_tensorrt, "TensorRTDevice", CpuDevice)
        yield world


def make(checkpoint: Path, cache: Path, *, blocks: int | None = None, **options: Any) -> LLM:
    """An LLM over the stand-in.

    Args:
        checkpoint: the model.
        cache: of builds.
        blocks: KV blocks; None for as many as are of use.
        options: of LLM, in place of :data:`LIMITS`.
    """
    sized = {} if blocks is None else {"kv_cache_config": {"max_tokens": blocks * BLOCK_SIZE}}
    return LLM(checkpoint, backend="tensorrt", cache_dir=cache, **{**LIMITS, **sized, **options})
