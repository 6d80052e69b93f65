"""Load on a GPU: kernels from the cache, weights onto the device, linear layers tuned, an engine over all of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from llmapi import _progress
from llmapi._build.compiled import tuning_key
from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._kernels import beam_cuda, beam_reorder_cuda, sample_cuda
from llmapi._kernels.gpu import Gpu
from llmapi._runtime.bind_cuda import Binder
from llmapi._runtime.engine_cuda import CudaEngine
from llmapi._runtime.linear_cuda import tuned_rows
from llmapi._runtime.weights_cuda import random_weights, read_weights

if TYPE_CHECKING:
    from llmapi._runtime.start import Prepared

log = logging.getLogger("llmapi")


def load_cuda(
    prepared: Prepared,
    graph: Graph,
    weights: TensorFile | None,
    constants: Mapping[str, torch.Tensor],
    *,
    progress: bool,
) -> CudaEngine:
    """The engine on torch's current GPU.

    Args:
        prepared: what to load.
        graph, constants: the compiled step.
        weights: their file; None for random ones.
        progress: whether to draw a bar.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = Gpu(device, prepared.builder.cubin)
    dtype = getattr(torch, prepared.config.dtype)
    logits = (prepared.config.max_batch_size, prepared.spec.vocab_size, dtype)
    gpu.expect(sample_cuda.units_for(gpu, *logits))  # every start needs these; weights are read meanwhile

    def on_device() -> Mapping[str, torch.Tensor]:
        with _progress.bar("load", 0 if weights is None else weights.nbytes, "B", enabled=progress) as done:
            if weights is not None:
                return read_weights(graph, weights, device, done)
            return random_weights(graph, prepared.dummy_seed or 0, dtype, device, done)

    def tune(binder: Binder) -> None:
        groups = binder.linear_groups()
        if binder.choices.kernel is None:
            return
        rows = tuned_rows(prepared.config)
        shapes = [(gate, int(w[0].shape[0]), int(w[0].shape[1])) for gate, w in groups]
        key = tuning_key(gpu.name, gpu.arch, prepared.config.dtype, binder.choices.cases(shapes, rows))

        def measure() -> dict[str, int]:
            with torch.inference_mode():
                binder.choices.tune(groups, rows)
            return dict(binder.choices.table)

        binder.choices.table = prepared.builder.tuning(key, prepared.label, measure)
        gpu.prefetch(binder.units(rows))

    try:
        engine = CudaEngine(
            graph,
            on_device,
            constants,
            prepared.spec,
            prepared.config,
            gpu=gpu,
            utilization=prepared.utilization,
            tune=tune,
        )
        beams = [*beam_cuda.units_for(gpu, *logits), *beam_reorder_cuda.units(prepared.config.dtype)]
        sampling = sample_cuda.later_units_for(gpu, *logits)
        gpu.expect([*engine.later_units(), *sampling, *beams], calmly=True)  # so that few requests wait for a compiler
        return engine
    except BaseException:
        gpu.close()
        raise
