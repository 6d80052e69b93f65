"""TensorRTEngine: runs a TensorRT plan over a linear KV cache, one row for each sequence in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from llmapi._build.tensorrt.path import cache_output
from llmapi._build.tensorrt.shapes import max_chunk
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine import Engine, cache_names, num_kv_blocks
from llmapi._runtime.plan_rows import PlanRows
from llmapi._runtime.slots_tensorrt import Run, runs_of
from llmapi._runtime.tensorrt_plan import LoadedPlan
from llmapi.config import EngineConfig
from llmapi.errors import BuildError, CapacityError, EngineClosedError
from llmapi.models.spec import TransformerSpec

_STEP_INPUTS = ("input_ids", "positions", "write_index", "kv_lengths", "logits_indices")


class TensorRTEngine(Engine):
    """Binds weights and caches by name once, and a step's integers and logits at each run.

    Args:
        plan: loaded, with a context for each profile.
        weights: gives the plan's weights by name, on the device.
        spec: the model.
        config: limits and types.
        device: where it runs.
        free_bytes: tells how much of its memory is free for the cache.
        on_stream: enters the stream to run on, and gives its handle.
        on_close: called once, with the plan, before it is let go.

    Raises:
        ConfigError: not one sequence fits.
    """

    def __init__(
        self,
        plan: LoadedPlan,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        spec: TransformerSpec,
        config: EngineConfig,
        *,
        device: torch.device,
        free_bytes: Callable[[], int],
        on_stream: Callable[[], AbstractContextManager[int]],
        on_close: Callable[[LoadedPlan], None] = lambda plan: None,
    ) -> None:
        self.spec, self.config = spec, config
        self._plan, self._device, self._on_stream, self._on_close = plan, device, on_stream, on_close
        self._weights = dict(weights())  # the plan knows their addresses; they live as long as it
        blocks = num_kv_blocks(config, spec, free_bytes, 1.0)
        self.num_blocks = min(blocks, config.max_batch_size)
        shape = (self.num_blocks, spec.num_kv_heads, config.max_seq_len, spec.head_dim)
        dtype = getattr(torch, config.kv_dtype)
        # Zeros: what is hidden still takes part in a product, with weight zero, and must be a number.
        names = cache_names(spec)
        self._caches = {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}
        # A step's small tensors lie at fixed addresses, so that TensorRT may replay what it captured.
        most = max(config.max_batch_size, max_chunk(config))
        self._ints = {name: torch.zeros(most, dtype=torch.int32, device=device) for name in _STEP_INPUTS}
        self._out = self._rows(config.max_batch_size)
        for context in plan.contexts:
            for name, tensor in self._weights.items():
                context.set_tensor_address(name, tensor.data_ptr())
        self._closed = False

    @torch.inference_mode()
    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Copy rows, then run the batch; see :class:`Engine`."""
        with self._stream() as stream:
            return self._step(batch, stream).logits

    @torch.inference_mode()
    def step_hidden(
        self, batch: StepBatch, sampled: torch.Tensor | None, projected: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same step: a plan gives both of every row; see :class:`Engine`."""
        with self._stream() as stream:
            return self._step(batch, stream).projected(projected)

    def _stream(self) -> AbstractContextManager[int]:
        if self._closed:
            raise EngineClosedError("this engine was closed: make a new LLM")
        return self._on_stream()

    def _rows(self, count: int) -> PlanRows:
        return PlanRows.empty(count, self.spec, self.config, self._device)

    def _step(self, batch: StepBatch, stream: int) -> PlanRows:
        if batch.copies:
            source, target = torch.tensor(batch.copies, device=self._device).t()
            for cache in self._caches.values():
                cache[target] = cache[source]
        rows = self._rows(len(batch.logits_indices))
        limits = {"slots": self.num_blocks, "capacity": self.config.max_seq_len}
        limits |= {"max_batch": self.config.max_batch_size, "max_tokens": max_chunk(self.config)}
        for run in runs_of(batch, **limits):
            self._run(run, rows, stream)
        return rows

    def _run(self, run: Run, result: PlanRows, stream: int) -> None:
        """One execution; what it gives is put in its places."""
        context = self._plan.contexts[run.profile]
        rows = len(run.input_ids)
        wanted = run.logits_indices or [0]  # a run of which nobody wants a row still has to give one
        for name, values in zip(
            _STEP_INPUTS, (run.input_ids, run.positions, run.write_index, run.kv_lengths, wanted), strict=True
        ):
            given = torch.tensor(values, dtype=torch.int32)
            tensor = self._ints[name][: given.numel()].view(given.shape)
            tensor.copy_(given)
            self._bind(context, name, tensor)
        for name, cache in self._caches.items():
            window = cache[run.first_row : run.first_row + rows]
            self._bind(context, name, window)
            context.set_tensor_address(cache_output(name), window.data_ptr())  # updated in place
        fixed = len(wanted) <= self.config.max_batch_size
        out = self._out.first(len(wanted)) if fixed else self._rows(len(wanted))
        out.bind(context)
        if not context.execute_async_v3(stream):
            raise BuildError(
                f"TensorRT could not run {rows} sequences of {len(run.input_ids[0])} tokens: the GPU may be out of "
                "memory; lower max_batch_size or max_num_tokens"
            )
        if run.places:
            result.put(run.places, out)

    def _bind(self, context: Any, name: str, tensor: torch.Tensor) -> None:
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise CapacityError(
                f"{name} of shape {list(tensor.shape)} is outside the sizes that the plan was built for"
            )
        context.set_tensor_address(name, tensor.data_ptr())

    def close(self) -> None:
        """Let go of the plan, the weights and the caches."""
        if self._closed:
            return
        self._closed = True
        try:
            self._on_close(self._plan)
        finally:
            self._plan.close()
            self._weights, self._caches, self._ints = {}, {}, {}
            self._out = PlanRows(torch.empty(0), torch.empty(0))
