"""The CPU engine: each node of the graph is bound once to a torch function; a step calls them in order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmapi._build.graph import Graph, Input, Ref
from llmapi._build.tensor_file import TensorFile
from llmapi._kernels import OPS
from llmapi._kernels.native import NativeKernels
from llmapi._kernels.plan import CpuPlan
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine import Engine, num_kv_blocks
from llmapi._runtime.linear_cpu import can_pack, make_linear
from llmapi.config import EngineConfig
from llmapi.errors import BuildError, ConfigError, EngineClosedError
from llmapi.models.spec import TransformerSpec

DEFAULT_KV_FRACTION = 0.25
"""Share of the free host memory that the KV cache may take where the user names no size."""

_PLAN = 0  # slot of the environment that holds the step's CpuPlan
_Instruction = tuple[Callable[[list[Any]], Any], int, tuple[int, ...]]


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
        names = [f"{kind}_cache.{layer}" for layer in range(spec.num_layers) for kind in "kv"]
        self._caches = {name: torch.empty(shape, dtype=dtype) for name in names}
        values: dict[str, torch.Tensor] = {**constants, **self._caches}
        values.update({i.name: weights.read(i.parts) for i in graph.inputs if i.kind == "weight"})
        try:
            pack = can_pack(weights.path.stat().st_size, available_memory())
        except ConfigError:  # the system does not tell
            pack = False
        self.kernels = kernels if config.dtype == config.kv_dtype == "float32" else None
        self._program, self._slots, self._size, self._output = _bind(graph, values, self.kernels, pack=pack)
        self._closed = False

    @torch.inference_mode()
    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Copy blocks, then run the batch; see :class:`Engine`."""
        if self._closed:
            raise EngineClosedError("this engine was closed: make a new LLM")
        if batch.copies:
            self._copy_blocks(batch.copies)
        environment: list[Any] = [None] * self._size
        environment[_PLAN] = CpuPlan.of(
            batch.slot_mapping, batch.block_tables, batch.seq_lens, batch.query_start, self.config.block_size
        )
        for name, tensor in _step_tensors(batch).items():
            if name in self._slots:
                environment[self._slots[name]] = tensor
        for call, result, dead in self._program:
            environment[result] = call(environment)
            for slot in dead:
                environment[slot] = None
        logits: torch.Tensor = environment[self._output]
        return logits.float()

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        source, target = torch.tensor(copies).t()
        for cache in self._caches.values():
            cache[target] = cache[source]

    def close(self) -> None:
        """Drop the weights' map and the KV cache."""
        self._closed = True
        self._program, self._caches = [], {}


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


def _bind(
    graph: Graph, values: Mapping[str, Any], kernels: NativeKernels | None, *, pack: bool
) -> tuple[list[_Instruction], dict[str, int], int, int]:
    """Resolve every node once.

    Args:
        graph: the step.
        values: weights, constants and caches by name.
        kernels: compiled kernels, or None.
        pack: whether linear weights may be repacked.

    Returns:
        the instructions, the slots of step inputs, the number of slots, and the slot of the result.
    """
    slots: dict[str, int] = {}
    for name in [i.name for i in graph.inputs if _varies(i)] + [n.name for n in graph.nodes]:
        slots[name] = len(slots) + 1
    last_use: dict[int, int] = {}

    def argument(value: Any, index: int) -> Any:
        if isinstance(value, Ref):
            if value.name in values:
                return values[value.name]
            last_use[slots[value.name]] = index
            return _Slot(slots[value.name])
        if isinstance(value, list) and any(isinstance(v, Ref) for v in value):
            raise BuildError(f"the cpu backend cannot bind a list of tensors: {value}")
        return value

    calls = []
    for index, node in enumerate(graph.nodes):
        args = [argument(a, index) for a in node.args]
        kwargs = {k: argument(v, index) for k, v in node.kwargs.items()}
        if node.op == "aten.linear.default":
            linear = make_linear(args[1], args[2] if len(args) > 2 else None, kernels, pack=pack)
            call = _call(linear, False, args[:1], {})
        else:
            call = _call(*_implementation(node.op, kernels), args, kwargs)
        calls.append((call, slots[node.name]))
    output = slots[graph.output.name]
    dead: dict[int, list[int]] = {}
    for slot, index in last_use.items():
        if slot != output:
            dead.setdefault(index, []).append(slot)
    program = [(call, slot, tuple(dead.get(i, ()))) for i, (call, slot) in enumerate(calls)]
    return program, slots, len(slots) + 1, output


class _Slot(int):
    """An argument that is looked up in the environment at every step."""


def _varies(graph_input: Input) -> bool:
    return graph_input.kind == "step"


def _implementation(op: str, kernels: NativeKernels | None) -> tuple[Callable[..., Any], bool]:
    """The function for an operator, and whether it reads the step's plan."""
    if op == "getitem":
        return operator.getitem, False
    if op in OPS:
        record = OPS[op]
        if kernels is not None and record.native is not None:
            return partial(record.native, kernels), record.reads_plan
        return (record.reference, False) if record.cpu is None else (record.cpu, record.reads_plan)
    if op in _FAST:
        return _FAST[op], False
    namespace, name, overload = op.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload), False
    except AttributeError as error:
        raise BuildError(f"torch {torch.__version__} has no operator {op}: clear the engine from the cache") from error


# The same operators without the cost of resolving an overload at every call.
_FAST: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.view.default": torch.Tensor.view,
    "aten.index_select.default": torch.index_select,
}


def _call(
    function: Callable[..., Any], reads_plan: bool, args: list[Any], kwargs: dict[str, Any]
) -> Callable[[list[Any]], Any]:
    """``environment -> result`` with everything known beforehand folded in."""
    assert not any(isinstance(v, _Slot) for v in kwargs.values())
    dynamic = [isinstance(a, _Slot) for a in args]
    if dynamic == [True] + [False] * (len(args) - 1) and not reads_plan:
        slot, rest = args[0], tuple(args[1:])
        return lambda env: function(env[slot], *rest, **kwargs)
    pairs = tuple(zip(dynamic, args, strict=True))
    if reads_plan:
        return lambda env: function(*[env[a] if d else a for d, a in pairs], **kwargs, plan=env[_PLAN])
    return lambda env: function(*[env[a] if d else a for d, a in pairs], **kwargs)
