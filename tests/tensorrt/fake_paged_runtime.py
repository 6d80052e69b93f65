"""A stand-in for the runtime of full TensorRT: plans of the stand-in's builder, run by the evaluator on the CPU.

It knows tensors by their addresses alone, and keeps to the order of calls that TensorRT asks for: a profile before
shapes, shapes, addresses and memory before a run, a run before one is captured, and no shape that changes. What is
captured is not run, and a replay reads and writes the addresses of the time when it was captured.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tensorrt.evaluator import Evaluator
from tests.tensorrt.fake_runtime import at
from tests.tensorrt.plugin_rules import PluginRules

SCRATCH = 1 << 12
STREAM, CAPTURING = 7, 8
"""Handles of the engine's stream, and of the one on which launches are captured."""


@dataclass
class World:
    """What the stand-in was told, and how it is to behave.

    Attributes:
        networks: what was built, by the number in its plan.
        engines: those that live.
        cache_at: gives the KV cache at an address.
        calls: in order: ``("run" | "capture" | "replay", tokens of the bucket)``.
        steps: of each run and replay: tokens of each sequence that had any, and rows of padding.
        captured: what a capture under way has recorded.
        streaming: whether the engine is on its stream.
        refuse: what ``Runtime`` says of a plan, in place of loading it.
        failing: tokens of buckets whose runs fail.
        uncapturable: whether capturing fails.
        free_bytes: of the GPU, when the cache is sized.
    """

    networks: dict[int, Any] = field(default_factory=dict)
    evaluators: dict[int, Evaluator] = field(default_factory=dict)
    engines: weakref.WeakSet[Engine] = field(default_factory=weakref.WeakSet)
    contexts: weakref.WeakSet[Context] = field(default_factory=weakref.WeakSet)
    cache_at: Callable[[int], torch.Tensor] = lambda address: torch.empty(0)
    calls: list[tuple[str, int]] = field(default_factory=list)
    steps: list[tuple[list[int], int]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None
    streaming: bool = False
    refuse: str = ""
    failing: set[int] = field(default_factory=set)
    uncapturable: bool = False
    free_bytes: int = 1 << 40

    def reset(self) -> None:
        """Forget the calls, and fail nowhere."""
        self.calls, self.steps, self.captured, self.streaming = [], [], None, False
        self.refuse, self.failing, self.uncapturable, self.free_bytes = "", set(), False, 1 << 40

    @contextmanager
    def stream(self) -> Iterator[int]:
        """What stands for the engine's stream."""
        self.streaming = True
        try:
            yield STREAM
        finally:
            self.streaming = False

    def capture(self, run: Callable[[int], None]) -> Callable[[], None]:
        """What stands for the capture of a CUDA graph."""
        assert self.streaming and self.captured is None
        if self.uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured = recorded = []
        try:
            run(CAPTURING)
        finally:
            self.captured = None
        assert len(recorded) == 1

        def replay() -> None:
            assert self.streaming
            recorded[0]()

        return replay

    def evaluator(self, trt: Any, number: int) -> Evaluator:
        """Of a network; made once, as it changes the classes of its layers."""
        if number not in self.evaluators:
            rules = PluginRules(lambda address: self.cache_at(address))
            self.evaluators[number] = Evaluator(trt, self.networks[number], {"PLUGIN": rules})
        return self.evaluators[number]


def make_runtime(trt: Any, world: World) -> type:
    """``Runtime`` for the module."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            try:
                assert not world.refuse
                told = json.loads(bytes(plan))
                network = world.networks[told["network"]]
            except (ValueError, KeyError, AssertionError):
                self._logger.log(trt.ILogger.ERROR, world.refuse or "the stream holds no engine")
                return None
            return Engine(world, network, world.evaluator(trt, told["network"]), told["profiles"], trt)

    return Runtime


class Engine:
    """``ICudaEngine``."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, world: World, network: Any, evaluator: Evaluator, profiles: list[Any], trt: Any) -> None:
        self.world, self.evaluator, self.profiles, self._trt = world, evaluator, profiles, trt
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        self.inputs = {t.name: t for t in tensors}
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        self.types = evaluator._types
        self.num_io_tensors, self.num_optimization_profiles = len(tensors) + len(self.outputs), len(profiles)
        world.engines.add(self)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context:
    """``IExecutionContext`` that was made without memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._world = engine, engine.world
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._runs = 0
        self._world.contexts.add(self)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert self._profile is None
        self._profile = index
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory and size >= self._engine.device_memory_size_v2
        self._memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "shapes come after the profile"
        smallest, _, largest = self._engine.profiles[self._profile][name]
        if len(shape) != len(smallest) or not all(
            a <= s <= b for a, s, b in zip(smallest, shape, largest, strict=True)
        ):
            return False
        assert self._shapes.setdefault(name, shape) == shape, "a shape that changes leaks"
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        if name not in self._engine.inputs and name not in self._engine.outputs:
            return False
        assert self._addresses.setdefault(name, address) == address, "a captured address would be stale"
        return True

    def infer_shapes(self) -> list[str]:
        return [n for n, t in self._engine.inputs.items() if -1 in t.shape and n not in self._shapes]

    def execute_async_v3(self, stream: int) -> bool:
        assert self._world.streaming and self._memory is not None and not self.infer_shapes()
        assert {*self._engine.inputs, *self._engine.outputs} == set(self._addresses)
        tokens = self._shapes["input_ids"][0]
        if tokens in self._world.failing:
            return False
        if self._world.captured is not None:
            assert stream == CAPTURING and self._runs, "what is captured must have run once"
            self._world.calls.append(("capture", tokens))
            self._world.captured.append(lambda: self._compute("replay"))
            return True
        assert stream == STREAM
        self._runs += 1
        self._compute("run")
        return True

    def _compute(self, how: str) -> None:
        engine = self._engine
        inputs = {
            name: at(self._addresses[name], self._shapes.get(name, tuple(t.shape)), engine.types[t.dtype])
            for name, t in engine.inputs.items()
        }
        self._world.calls.append((how, len(inputs["input_ids"])))
        starts = inputs["query_start"].tolist()
        counts = [b - a for a, b in itertools.pairwise(starts)]
        self._world.steps.append(([c for c in counts if c], len(inputs["input_ids"]) - starts[-1]))
        assert int(inputs["logits_indices"].min()) >= 0
        for name, rows in engine.evaluator.run(inputs).items():
            at(self._addresses[name], tuple(rows.shape), rows.dtype).copy_(rows)


@dataclass
class Event:
    """What stands for a CUDA event: whether something is on its way that was not waited for."""

    pending: bool = False

    def record(self) -> None:
        assert not self.pending, "the copy before was not waited for"
        self.pending = True

    def synchronize(self) -> None:
        self.pending = False
