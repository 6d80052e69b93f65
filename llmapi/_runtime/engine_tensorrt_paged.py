"""TensorRTPagedEngine: runs a plan with plugins over the paged KV cache, each step in one of the plan's buckets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from llmapi._build.tensorrt.buckets import buckets_in, choose
from llmapi._build.tensorrt.plugin_path import POOLS
from llmapi._kernels.plugins import pool_addresses
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine import Engine, cache_names, num_kv_blocks
from llmapi._runtime.padded_step import PaddedStep, empty_step
from llmapi._runtime.plan_rows import PlanRows
from llmapi._runtime.tensorrt_plan import LoadedPlan
from llmapi._runtime.transfer import to_device
from llmapi.config import EngineConfig
from llmapi.errors import BuildError, CacheError, CapacityError, ConfigError, EngineClosedError, LLMAPIError
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    from llmapi._runtime.device_tensorrt import TensorRTDevice

log = logging.getLogger("llmapi")


class TensorRTPagedEngine(Engine):
    """Everything that a plan's contexts are bound to is bound once: a step writes its integers, and runs one context.

    A context's shapes never change, for plugins leak where they do; see docs/kernels/plugins.md.

    Args:
        plan: loaded, with a context for each bucket.
        weights: gives the plan's weights by name, on the device.
        spec: the model.
        config: limits and types.
        gpu: where it runs.
        utilization: share of the GPU's memory that may be used.
        graphs: whether buckets of decoding steps are captured as CUDA graphs.
        on_close: called once, with the plan, before it is let go.

    Raises:
        ConfigError: the model does not fit the GPU.
        CacheError: the plan is none for these limits.
        BuildError: TensorRT does not run the plan.
    """

    def __init__(
        self,
        plan: LoadedPlan,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        spec: TransformerSpec,
        config: EngineConfig,
        *,
        gpu: TensorRTDevice,
        utilization: float,
        graphs: bool = True,
        on_close: Callable[[LoadedPlan], None] = lambda plan: None,
    ) -> None:
        self.spec, self.config = spec, config
        self._plan, self._gpu, self._on_close = plan, gpu, on_close
        self._closed = False
        self._steps = _steps_of(plan, config)
        self._buckets = [step.bucket for step in self._steps]
        self._graphs: dict[int, Callable[[], None]] = {}
        batch = min(config.max_batch_size, config.max_num_tokens)
        # Buckets before this one hold all steps that only decode.
        self._captured = choose(self._buckets, batch, batch, batch) + 1 if graphs else 0
        try:
            self._allocate(weights)
            self._bind()
            with torch.inference_mode(), gpu.stream() as stream:
                self._warm_up(stream)
            gpu.synchronize()
            self.num_blocks = num_kv_blocks(config, spec, lambda: gpu.free_bytes(utilization), 1.0)
            self._make_caches()
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"the model does not fit {gpu.name}: {error}. Its plan has {len(self._buckets)} execution contexts; "
                "use a smaller model, max_num_tokens or kv_cache_config, or end other programs that use this GPU"
            ) from error

    # ---- made once

    def _allocate(self, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """All memory but the caches'. Buckets share it: one step is run at a time."""
        device = self._gpu.device
        # Contexts come one at a time, too, and so have their intermediate results in the same place.
        self._scratch = torch.empty(self._plan.scratch_bytes, dtype=torch.uint8, device=device)
        self._weights = dict(weights())  # the plan knows their addresses; they live as long as it
        size = max(step.size for step in self._steps)
        self._host = self._gpu.pinned(size)
        self._ints = torch.zeros(size, dtype=torch.int32, device=device)
        self._copied = self._gpu.event()
        # Zeros have no guard: until it is there, plugins follow no address.
        self._pools = torch.zeros(1 + 2 * self.spec.num_layers, dtype=torch.int64, device=device)
        rows = max(bucket.rows for bucket in self._buckets)
        self._out = PlanRows.empty(rows, self.spec, self.config, device)
        self._caches: dict[str, torch.Tensor] = {}

    def _bind(self) -> None:
        for context, step in zip(self._plan.contexts, self._steps, strict=True):
            if self._scratch.numel():
                context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
            arrays = step.views(self._ints)
            for name, array in arrays.items():
                if not context.set_input_shape(name, tuple(array.shape)):
                    raise CacheError(
                        f"{name} of shape {list(array.shape)} is outside the sizes that the plan was built for: remove "
                        "the entry and build again"
                    )
            for name, tensor in {**self._weights, **arrays, POOLS: self._pools, **self._out.by_name}.items():
                if not context.set_tensor_address(name, tensor.data_ptr()):
                    raise CacheError(f"the plan takes no {name}: remove the entry and build again")
            if missing := context.infer_shapes():
                raise CacheError(
                    f"the plan wants {', '.join(missing)} beside what it was built with: remove the entry and build "
                    "again"
                )

    def _warm_up(self, stream: int) -> None:
        """Run each bucket on a step of nothing: what is loaded or allocated at a first run is there before the cache
        takes what is left, and what cannot run shows.
        """
        for index in range(len(self._steps)):
            self._bring(index, empty_step(), None)
            self._enqueue(index, stream)

    def _make_caches(self) -> None:
        spec = self.spec
        shape = (self.num_blocks, self.config.block_size, spec.num_kv_heads, spec.head_dim)
        dtype = getattr(torch, self.config.kv_dtype)
        names = cache_names(spec)
        self._caches = {name: torch.zeros(shape, dtype=dtype, device=self._gpu.device) for name in names}
        caches = list(self._caches.values())
        self._pools.copy_(pool_addresses(list(zip(caches[::2], caches[1::2], strict=True))))
        self._gpu.synchronize()

    # ---- a step

    @torch.inference_mode()
    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Queue a step; see :class:`Engine`.

        Raises:
            CapacityError: no bucket holds it.
            BuildError: TensorRT does not run it.
        """
        with self._gpu.stream() as stream:
            return self._step(batch, sampled, stream).logits

    @torch.inference_mode()
    def step_hidden(
        self, batch: StepBatch, sampled: torch.Tensor | None, projected: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same step: a plan gives both of every row; see :class:`Engine`."""
        with self._gpu.stream() as stream:
            return self._step(batch, sampled, stream).projected(projected)

    def _step(self, batch: StepBatch, sampled: torch.Tensor | None, stream: int) -> PlanRows:
        if self._closed:
            raise EngineClosedError("this engine was closed: make a new LLM")
        rows = len(batch.logits_indices)
        index = choose(self._buckets, len(batch.input_ids), len(batch.seq_lens), rows)
        if batch.copies:
            self._copy_blocks(batch.copies)
        self._bring(index, batch, sampled)
        self._run(index, stream)
        return self._out.first(rows)

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        source, target = to_device(torch.tensor(copies), self._gpu.device).t()
        for cache in self._caches.values():
            cache[target] = cache[source]

    def _bring(self, index: int, batch: StepBatch, sampled: torch.Tensor | None) -> None:
        """A step's integers to where the bucket's context reads them, in one copy."""
        step = self._steps[index]
        self._copied.synchronize()  # the copy of the step before must have left the host's memory
        step.fill(self._host.numpy(), batch)
        self._ints[: step.size].copy_(self._host[: step.size], non_blocking=True)
        self._copied.record()
        if sampled is not None:
            ids = step.views(self._ints)["input_ids"]
            ids.copy_(torch.where(ids < 0, sampled[(~ids).clamp_(min=0).long()], ids))

    def _run(self, index: int, stream: int) -> None:
        """By its graph, where there is one. The first run of a bucket is captured after it."""
        replay = self._graphs.get(index)
        if replay is not None:
            replay()
            return
        self._enqueue(index, stream)
        if index < self._captured:
            try:
                self._graphs[index] = self._gpu.capture(lambda handle: self._enqueue(index, handle))
            except (RuntimeError, LLMAPIError) as error:
                self._captured = 0
                log.warning("steps run without CUDA graphs, which CUDA cannot capture here: %s", error)

    def _enqueue(self, index: int, stream: int) -> None:
        if not self._plan.contexts[index].execute_async_v3(stream):
            bucket = self._buckets[index]
            raise BuildError(
                f"TensorRT could not run a step of {bucket.tokens} tokens of {bucket.sequences} sequences "
                f"({self._plan.said()}): the GPU may be out of memory; lower max_batch_size or max_num_tokens"
            )

    def close(self) -> None:
        """Let go of the graphs, the plan, the weights and the caches."""
        if self._closed:
            return
        self._closed = True
        try:
            self._on_close(self._plan)
        finally:
            self._graphs.clear()
            self._plan.close()
            self._weights, self._caches = {}, {}
            self._scratch = self._host = self._ints = self._pools = torch.empty(0)
            self._out = PlanRows(torch.empty(0), torch.empty(0))


def _steps_of(plan: LoadedPlan, config: EngineConfig) -> list[PaddedStep]:
    """The plan's buckets, once they are known to hold any step of an engine."""
    buckets, width = buckets_in(plan.info.profiles)
    if plan.info.block_size != config.block_size:
        raise CacheError(
            f"the plan has blocks of {plan.info.block_size} tokens, and the engine of {config.block_size}: remove the "
            "entry and build again"
        )
    tokens, batch = config.max_num_tokens, min(config.max_batch_size, config.max_num_tokens)
    try:
        choose(buckets, tokens, batch, tokens)
    except CapacityError as error:
        raise CacheError(f"the plan is none for these limits ({error}): remove the entry and build again") from error
    if width * config.block_size < config.max_seq_len:
        raise CacheError(
            f"the plan is for sequences of {width * config.block_size} tokens, and max_seq_len is {config.max_seq_len}"
            ": remove the entry and build again"
        )
    return [PaddedStep.of(bucket, width) for bucket in buckets]
