"""The CPU engine: each node of the graph is bound once to a torch function; a step calls them in order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmapi._build.graph import Graph, Node
from llmapi._build.tensor_file import TensorFile
from llmapi._kernels import OPS
from llmapi._kernels.native import NativeKernels
from llmapi._kernels.plan import CpuPlan
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine import Engine, cache_names, num_kv_blocks
from llmapi._runtime.linear_cpu import can_pack, make_linear
from llmapi._runtime.program import Call, Program, call_of, torch_function
from llmapi.config import EngineConfig
from llmapi.errors import ConfigError, EngineClosedError
from llmapi.models.spec import TransformerSpec

DEFAULT_KV_FRACTION = 0.25
"""Share of the free host memory that the KV cache may take where the user names no size."""


class CpuEngine(Engine):
    """Runs a graph with torch on the CPU.

    Args:
        graph: the exported, rewritten step.
        weights: the mapped weights file; tensors are views of it.
        constants: the graph's small tables by name.
        spec: the model.
        config: limits and types.
        kernels: compiled kernels, used where everything is float32; None for torch's operators.

    Raises:
        ConfigError: the KV cache does not fit.
        BuildError: the graph holds an operator that this torch does not have.
    """

    def __init__(
        self,
        graph: Graph,
        weights: TensorFile,
        constants: Mapping[str, torch.Tensor],
        spec: TransformerSpec,
        config: EngineConfig,
        kernels: NativeKernels | None = None,
    ) -> None:
        self.spec, self.config = spec, config
        self.num_blocks = num_kv_blocks(config, spec, available_memory, DEFAULT_KV_FRACTION)
        shape = (self.num_blocks, config.block_size, spec.num_kv_heads, spec.head_dim)
        dtype = getattr(torch, config.kv_dtype)
        names = cache_names(spec)
        self._caches = {name: torch.empty(shape, dtype=dtype) for name in names}
        values: dict[str, torch.Tensor] = {**constants, **self._caches}
        values.update({i.name: weights.read(i.parts) for i in graph.inputs if i.kind == "weight"})
        try:
            pack = can_pack(weights.path.stat().st_size, available_memory())
        except ConfigError:  # the system does not tell
            pack = False
        self.kernels = kernels if config.dtype == config.kv_dtype == "float32" else None
        self._pack = pack
        self._program = Program.bind(graph, values, self._implement)
        self._closed = False

    @torch.inference_mode()
    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Copy blocks, then run the batch; see :class:`Engine`."""
        plan = self._begin(batch)
        logits: torch.Tensor = self._program.run(plan, _step_tensors(batch))
        return logits.float()

    @torch.inference_mode()
    def step_hidden(
        self, batch: StepBatch, sampled: torch.Tensor | None, projected: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Engine`."""
        plan = self._begin(batch)

        def select(states: torch.Tensor) -> torch.Tensor | None:
            return states[torch.tensor(projected)] if projected else None

        hidden, logits = self._program.run_hidden(plan, _step_tensors(batch), select)
        return hidden, torch.empty(0, self.spec.vocab_size) if logits is None else logits.float()

    def _begin(self, batch: StepBatch) -> CpuPlan:
        if self._closed:
            raise EngineClosedError("this engine was closed: make a new LLM")
        if batch.copies:
            self._copy_blocks(batch.copies)
        return CpuPlan.of(
            batch.slot_mapping, batch.block_tables, batch.seq_lens, batch.query_start, self.config.block_size
        )

    def _implement(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Call:
        """The call of a node: a compiled kernel where there is one, else the operator's own CPU code, else torch's."""
        if node.op == "aten.linear.default":
            linear = make_linear(args[1], args[2] if len(args) > 2 else None, self.kernels, pack=self._pack)
            return call_of(linear, args[:1], {})
        record = OPS.get(node.op)
        if record is None:
            return call_of(torch_function(node.op), args, kwargs)
        if self.kernels is not None and record.native is not None:
            return call_of(partial(record.native, self.kernels), args, kwargs, plan=record.reads_plan)
        if record.cpu is None:
            return call_of(record.reference, args, kwargs)
        return call_of(record.cpu, args, kwargs, plan=record.reads_plan)

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        source, target = torch.tensor(copies).t()
        for cache in self._caches.values():
            cache[target] = cache[source]

    def close(self) -> None:
        """Drop the weights' map and the KV cache."""
        if self._closed:
            return
        self._closed = True
        del self._program
        self._caches = {}


def available_memory() -> int:
    """Bytes of host memory that can be taken without swapping.

    Raises:
        ConfigError: the system does not tell.
    """
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("this system does not tell how much memory is free: give kv_cache_config a max_tokens")


def _step_tensors(batch: StepBatch) -> dict[str, torch.Tensor]:
    ints = partial(torch.tensor, dtype=torch.int32)
    width = max(map(len, batch.block_tables))
    return {
        "input_ids": ints(batch.input_ids),
        "positions": ints(batch.positions),
        "slot_mapping": ints(batch.slot_mapping),
        "block_tables": ints([table + [0] * (width - len(table)) for table in batch.block_tables]),
        "seq_lens": ints(batch.seq_lens),
        "query_start": ints(batch.query_start),
        "logits_indices": ints(batch.logits_indices),
    }
