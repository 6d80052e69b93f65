"""Load a TensorRT plan: refuse what cannot run here, then plan and weights onto the GPU, and an engine over them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmapi import _progress
from llmapi._build.artifact_keys import runtime_cache_key
from llmapi._build.graph import Graph
from llmapi._build.key import Key
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
    package = load_package(info.package)
    keys = prepared.report.keys

    def kept() -> bytes | None:
        return prepared.builder.runtime_cache(_cache_key(keys["plan"]))

    def keep(plan: LoadedPlan) -> None:
        try:
            blob = plan.runtime_cache()
            if blob:
                prepared.builder.keep_runtime_cache(_cache_key(keys["plan"]), prepared.label, blob)
        except (LLMAPIError, OSError) as error:  # the next start takes longer, that is all
            log.info("what TensorRT made for this GPU is not kept: %s", error)

    plan = open_plan(data, info, package, kept)
    del data
    device = torch.device("cuda", torch.cuda.current_device())

    def on_device() -> Mapping[str, torch.Tensor]:
        with _progress.bar("load", weights.nbytes, "B", enabled=progress) as done:
            return read_weights(graph, weights, device, done)

    def free_bytes() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * prepared.utilization) - (total - free) - RESERVE)

    try:
        return TensorRTEngine(
            plan, on_device, prepared.spec, prepared.config,
            device=device, free_bytes=free_bytes, on_stream=_Stream(device), on_close=keep,
        )  # fmt: skip
    except BaseException:
        plan.close()
        raise


class _Stream:
    """A stream of the engine's own, in order with the one that the caller works on."""

    def __init__(self, device: torch.device) -> None:
        self._own: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def __call__(self) -> Iterator[int]:
        caller: Any = torch.cuda.current_stream(self._own.device)
        self._own.wait_stream(caller)
        with torch.cuda.stream(self._own):
            yield int(self._own.cuda_stream)
        caller.wait_stream(self._own)


def _cache_key(plan_digest: str) -> Key:
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)()  # a CPU build of torch has none
    return runtime_cache_key(plan_digest, torch.cuda.get_device_name(), driver)
