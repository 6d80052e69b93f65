"""CudaEngine: runs the graph on an NVIDIA GPU with the project's kernels, under CUDA graphs where a step is short."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmapi._build.graph import Graph
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.step_cuda import copy_blocks, resolve_ids
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.beam_moves import BeamMover
from llmapi._runtime.bind_cuda import Binder, CudaPlan
from llmapi._runtime.engine import Engine, cache_names, num_kv_blocks
from llmapi._runtime.fit import RESERVE
from llmapi._runtime.graphs_cuda import Graphs
from llmapi._runtime.program import Program
from llmapi._runtime.sampler_cuda import CudaSampler
from llmapi._runtime.step_buffers import StepBuffers, StepShape, num_decodes
from llmapi._runtime.transfer import indices, to_device
from llmapi.config import EngineConfig
from llmapi.errors import ConfigError, EngineClosedError
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    from llmapi._runtime.sampler import Sampler, SamplerTokenizer

log = logging.getLogger("llmapi")


class CudaEngine(Engine):
    """Runs a graph on a GPU.

    Args:
        graph: the exported, rewritten step.
        weights: gives the weights by input name, on the device.
        constants: the graph's small tables by name.
        spec: the model.
        config: limits and types.
        gpu: the device, with its kernels.
        utilization: share of the GPU's memory that this process may use.
        tune: decides which implementation each linear layer takes; None takes cuBLAS throughout.

    Raises:
        ConfigError: the weights or the KV cache do not fit.
    """

    moves_beams = True

    def __init__(
        self,
        graph: Graph,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        constants: Mapping[str, torch.Tensor],
        spec: TransformerSpec,
        config: EngineConfig,
        *,
        gpu: Gpu,
        utilization: float,
        tune: Callable[[Binder], None] | None = None,
    ) -> None:
        self.spec, self.config, self._gpu = spec, config, gpu
        self._closed = False
        device = gpu.device
        width = -(-config.max_seq_len // config.block_size)
        try:
            values: dict[str, Any] = dict(weights())
            values.update({name: table.to(device) for name, table in constants.items()})
            self._buffers = StepBuffers(gpu, config.max_num_tokens, config.max_batch_size, width)
            self._binder = Binder(gpu, graph, values, spec, config)
            if tune is not None:
                tune(self._binder)
            names = cache_names(spec)
            shape = (config.block_size, spec.num_kv_heads, spec.head_dim)
            dtype = getattr(torch, config.kv_dtype)
            tiny = torch.zeros(1, *shape, dtype=dtype, device=device)
            self._program = Program.bind(graph, values | dict.fromkeys(names, tiny), self._binder.implement)
            peak = self._measure_peak()
            free = lambda: _free_bytes(gpu, utilization, peak)  # noqa: E731
            self.num_blocks = num_kv_blocks(config, spec, free, 1.0)
            self._caches = {n: torch.zeros(self.num_blocks, *shape, dtype=dtype, device=device) for n in names}
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(f"{_memory_line(gpu, spec, config)}: {error}") from error
        self._program = Program.bind(graph, values | self._caches, self._binder.implement)
        pointers = [cache.data_ptr() for cache in self._caches.values()]
        self._cache_pointers = torch.tensor(pointers, dtype=torch.int64, device=device)
        self._block_bytes = next(iter(self._caches.values()))[0].nbytes
        self._mover = BeamMover(gpu, self._cache_pointers, config.block_size, self._block_bytes // config.block_size)
        self._graphs = Graphs(gpu, config.max_batch_size, config.max_num_tokens)

    def later_units(self) -> list[Unit]:
        """What steps will need compiled that no step of the start needed."""
        return self._binder.later_units()

    def sampler(self, tokenizer: SamplerTokenizer | None) -> Sampler:
        """A sampler that chooses on the GPU."""
        dtype = getattr(torch, self.config.dtype)
        rows = self.config.max_batch_size
        return CudaSampler(self._gpu, self.spec.vocab_size, tokenizer, max_rows=rows, logits_dtype=dtype)

    @torch.inference_mode()
    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Queue a step; see :class:`Engine`. The logits are valid until the next step."""
        with self._gpu.current():
            shape, plan, arrays = self._bring(batch, sampled, graphs=True)
            if shape is None:
                logits = self._run(plan, arrays)
            else:
                logits = self._graphs.replay(shape, lambda: self._run(plan, arrays))
            return logits[: len(batch.logits_indices)]

    @torch.inference_mode()
    def step_hidden(
        self, batch: StepBatch, sampled: torch.Tensor | None, projected: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue a step without a CUDA graph; see :class:`Engine`."""
        with self._gpu.current():
            _, plan, arrays = self._bring(batch, sampled, graphs=False)
            device = self._gpu.device

            def select(states: torch.Tensor) -> torch.Tensor | None:
                return states[indices(projected, device)] if projected else None

            self._binder.begin(plan)
            hidden, logits = self._program.run_hidden(plan, arrays, select)
            if logits is None:
                logits = torch.empty(0, self.spec.vocab_size, dtype=getattr(torch, self.config.dtype), device=device)
            return hidden, logits

    def _bring(
        self, batch: StepBatch, sampled: torch.Tensor | None, *, graphs: bool
    ) -> tuple[StepShape | None, CudaPlan, Mapping[str, torch.Tensor]]:
        """Copy blocks and bring a step's integers over: the shape of its graph, if it has one, its plan, its arrays."""
        if self._closed:
            raise EngineClosedError("this engine was closed: make a new LLM")
        if batch.copies:
            self._copy_blocks(batch.copies)
        decodes, tokens = num_decodes(batch), len(batch.input_ids)
        wanted = StepShape(tokens, len(batch.seq_lens), len(batch.logits_indices), decodes == tokens, decodes == 0)
        shape = self._graphs.shape(wanted) if graphs else None
        arrays = self._buffers.upload(batch, shape or wanted, decodes).device
        if batch.moves is not None:
            self._mover(batch.moves, self._buffers.tables, arrays["seq_lens"])
        resolve_ids(self._gpu, arrays["source_ids"], sampled, arrays["input_ids"])
        plan = CudaPlan.of(arrays, wanted, decodes) if shape is None else CudaPlan.any(arrays, shape)
        return shape, plan, arrays

    def _run(self, plan: CudaPlan, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._binder.begin(plan)
        logits: torch.Tensor = self._program.run(plan, inputs)
        return logits

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        device = self._gpu.device
        pairs = to_device(torch.tensor(copies, dtype=torch.int32), device)
        copy_blocks(self._gpu, self._cache_pointers, pairs, self._block_bytes)

    def _measure_peak(self) -> int:
        """Bytes that the largest step takes beyond what is allocated now."""
        config = self.config
        tokens, seqs = config.max_num_tokens, min(config.max_batch_size, config.max_num_tokens)
        each = [tokens // seqs + (i < tokens % seqs) for i in range(seqs)]
        each = [min(n, config.max_seq_len) for n in each]
        starts = [0]
        for n in each:
            starts.append(starts[-1] + n)
        total = starts[-1]
        blocks = [[0] * -(-n // config.block_size) for n in each]
        last = [s - 1 for s in starts[1:]]
        zeros = [0] * total
        batch = StepBatch(zeros, zeros, [-1] * total, blocks, each, starts, last, [1] * seqs, [])

        def run() -> None:
            _, plan, arrays = self._bring(batch, None, graphs=False)
            self._run(plan, arrays)

        with torch.inference_mode(), self._gpu.current():
            return self._gpu.peak_of(run)

    def close(self) -> None:
        """Give back the GPU's memory: graphs, caches, weights, kernels."""
        if self._closed:
            return
        self._closed = True
        self._gpu.synchronize()
        self._graphs.close()
        del self._program, self._caches, self._binder, self._buffers, self._cache_pointers, self._mover
        gc.collect()
        self._gpu.close()


def _free_bytes(gpu: Gpu, utilization: float, peak: int) -> int:
    """Bytes for the KV cache: the share of the GPU that may be used, less what is used and what a step needs."""
    free, total = gpu.memory()
    return max(0, int(total * utilization) - (total - free) - peak - RESERVE)


def _memory_line(gpu: Gpu, spec: TransformerSpec, config: EngineConfig) -> str:
    free, total = gpu.memory()
    token = spec.kv_bytes_per_token(config.kv_dtype_bytes)
    return (
        f"the model does not fit: {gpu.name} has {total / 2**30:.1f} GiB, of which "
        f"{free / 2**30:.1f} GiB are free now; keys and values take {token:,} bytes a token. Use a smaller model, "
        "max_num_tokens or kv_cache_config, or end other programs that use this GPU"
    )
