"""Load a TensorRT plan: refuse what cannot run here, then plan and weights onto the GPU, and an engine over them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmapi import _progress
from llmapi._build.artifact_keys import runtime_cache_key
from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._build.tensorrt.package import load_package
from llmapi._runtime.engine_tensorrt import TensorRTEngine
from llmapi._runtime.fit import RESERVE
from llmapi._runtime.tensorrt_plan import LoadedPlan, open_plan, read_plan
from llmapi._runtime.weights_cuda import read_weights
from llmapi.errors import LLMAPIError

if TYPE_CHECKING:
    from llmapi._runtime.start import Prepared

log = logging.getLogger("llmapi")


class TensorRTDevice:
    """What loading asks of torch's current GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name()
        self.driver = int(getattr(torch._C, "_cuda_getDriverVersion", int)())
        self._own: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def read_weights(self, graph: Graph, file: TensorFile, done: Callable[[int], None]) -> Mapping[str, torch.Tensor]:
        """The graph's weights by name, on the device."""
        return read_weights(graph, file, self.device, done)

    def free_bytes(self, utilization: float) -> int:
        """Bytes that the cache may take: of the share that may be used, what is not used yet."""
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, int(total * utilization) - (total - free) - RESERVE)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A stream of our own, in order with the one that the caller works on; its handle."""
        caller: Any = torch.cuda.current_stream(self.device)
        self._own.wait_stream(caller)
        with torch.cuda.stream(self._own):
            yield int(self._own.cuda_stream)
        caller.wait_stream(self._own)

    def synchronize(self) -> None:
        """Wait until nothing runs any more."""
        torch.cuda.synchronize(self.device)


def load_tensorrt(prepared: Prepared, graph: Graph, weights: TensorFile, *, progress: bool) -> TensorRTEngine:
    """The engine on torch's current GPU.

    Args:
        prepared: what to load; its plan was built.
        graph: the step, which names the weights.
        weights: their file.
        progress: whether to draw a bar.

    Raises:
        ConfigError: the plan cannot run on this machine, or the cache does not fit.
        CacheError: the plan is damaged.
    """
    assert prepared.plan is not None
    data, info = read_plan(prepared.plan)
    builder, plan_digest, label = prepared.builder, prepared.report.keys["plan"], prepared.label
    gpus: list[TensorRTDevice] = []  # made once it is known that there is one

    def kept() -> bytes | None:
        gpus.append(TensorRTDevice())
        return builder.runtime_cache(runtime_cache_key(plan_digest, gpus[0].name, gpus[0].driver))

    def leave(plan: LoadedPlan) -> None:
        gpu.synchronize()
        try:
            if blob := plan.runtime_cache():
                builder.keep_runtime_cache(runtime_cache_key(plan_digest, gpu.name, gpu.driver), label, blob)
        except (LLMAPIError, OSError) as error:  # the next start takes longer, that is all
            log.info("what TensorRT made for this GPU is not kept: %s", error)

    plan = open_plan(data, info, load_package(info.package), kept)
    gpu = gpus[0]

    def on_device() -> Mapping[str, torch.Tensor]:
        with _progress.bar("load", weights.nbytes, "B", enabled=progress) as done:
            return gpu.read_weights(graph, weights, done)

    try:
        return TensorRTEngine(
            plan, on_device, prepared.spec, prepared.config,
            device=gpu.device, free_bytes=lambda: gpu.free_bytes(prepared.utilization), on_stream=gpu.stream,
            on_close=leave,
        )  # fmt: skip
    except BaseException:
        plan.close()
        raise
