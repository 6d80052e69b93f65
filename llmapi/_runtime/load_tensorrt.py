"""Load a TensorRT plan: refuse what cannot run here, then plan and weights onto the GPU, and an engine over them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from llmapi import _env, _progress
from llmapi._build.artifact_keys import runtime_cache_key
from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._build.tensorrt.package import load_package
from llmapi._runtime.device_tensorrt import TensorRTDevice
from llmapi._runtime.engine import Engine
from llmapi._runtime.engine_tensorrt import TensorRTEngine
from llmapi._runtime.engine_tensorrt_paged import TensorRTPagedEngine
from llmapi._runtime.tensorrt_plan import LoadedPlan, open_plan, read_plan
from llmapi.errors import LLMAPIError

if TYPE_CHECKING:
    from llmapi._runtime.start import Prepared

log = logging.getLogger("llmapi")


def load_tensorrt(prepared: Prepared, graph: Graph, weights: TensorFile, *, progress: bool) -> Engine:
    """The engine on torch's current GPU: of the linear cache or of the paged one, as the plan's description says.

    Args:
        prepared: what to load; its plan was built.
        graph: the step, which names the weights.
        weights: their file.
        progress: whether to draw a bar.

    Raises:
        ConfigError: the plan cannot run on this machine, or the cache does not fit.
        CacheError: the plan is damaged.
        BuildError: TensorRT does not run it.
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
        if info.attention == "plugin":
            return TensorRTPagedEngine(
                plan, on_device, prepared.spec, prepared.config,
                gpu=gpu, utilization=prepared.utilization, graphs=_env.tensorrt_graphs(), on_close=leave,
            )  # fmt: skip
        return TensorRTEngine(
            plan, on_device, prepared.spec, prepared.config,
            device=gpu.device, free_bytes=lambda: gpu.free_bytes(prepared.utilization), on_stream=gpu.stream,
            on_close=leave,
        )  # fmt: skip
    except BaseException:
        try:
            gpu.synchronize()  # a first run may be under way
        finally:
            plan.close()
        raise
