"""Plan: a graph through TensorRT's builder, to the bytes that a GPU's runtime loads, and a description of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmapi._build.graph import Graph
from llmapi._build.tensorrt.log import make_logger
from llmapi._build.tensorrt.lower import lower
from llmapi._build.tensorrt.monitor import Stop, make_monitor, run_interruptible
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.path import NATIVE, AttentionPath
from llmapi._targets import lacking, set_targets
from llmapi._kernels.tensorrt_network import Network
from llmapi.config import EngineConfig
from llmapi.errors import BuildError, CacheError, ConfigError
from llmapi.models.spec import TransformerSpec

STEPS = 1000
"""What a build counts as on a bar."""


@dataclass(frozen=True)
class PlanInfo:
    """What a plan says of itself, kept beside it: TensorRT tells nothing of a plan without a GPU.

    Attributes:
        package, version: what built it; no other version reads it.
        targets: GPU architectures it holds code for, full TensorRT's being the one that it was built on; empty for any
            that the package supports.
        dtype: of weights, activations and caches.
        inputs, outputs: name to type and sizes, -1 where they vary.
        profiles: for each, name to smallest, most common and largest shape.
        sha256: of the plan's bytes.
        attention: how it is done, ``native`` or ``plugin``.
        block_size: tokens of a block of the paged cache; 0 for a linear one.
    """

    package: str
    version: str
    targets: list[str]
    dtype: str
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    profiles: list[dict[str, list[list[int]]]]
    sha256: str
    attention: str = "native"
    block_size: int = 0

    @property
    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def parse(cls, text: str) -> PlanInfo:
        """From :attr:`text`.

        Raises:
            CacheError: it is not the text of one.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise CacheError(f"the plan's description cannot be read ({error}): remove the entry, build again") from error


def make_network(
    package: Package,
    graph: Graph,
    spec: TransformerSpec,
    config: EngineConfig,
    constants: Mapping[str, torch.Tensor],
    path: AttentionPath = NATIVE,
) -> tuple[Any, Any, Network]:
    """A builder, its logger, and the lowered network; the first must outlive the last.

    Args:
        package: TensorRT.
        graph: the exported, rewritten step.
        spec: the model.
        config: limits and types.
        constants: the graph's small tables by name.
        path: how attention is done.

    Raises:
        BuildError: the graph cannot be lowered.
    """
    trt = package.trt
    if missing := [name for name in path.layers if not hasattr(trt.INetworkDefinition, name)]:
        raise BuildError(
            f"{package.name} {package.version} has no {', '.join(missing)}, which attention over a cache needs: "
            f"{path.remedy}"
        )
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if typed is None else 1 << int(typed))
    net = Network(trt, definition, config.dtype, logger.take)
    definition.name = spec.family
    lower(net, graph, constants, max_seq_len=config.max_seq_len, path=path)
    return builder, logger, net


def build_plan(
    package: Package,
    graph: Graph,
    spec: TransformerSpec,
    config: EngineConfig,
    constants: Mapping[str, torch.Tensor],
    done: Callable[[int], None] = lambda more: None,
    path: AttentionPath = NATIVE,
) -> tuple[memoryview, PlanInfo]:
    """Build.

    Args:
        package: TensorRT.
        graph: the exported, rewritten step.
        spec: the model.
        config: limits, types and targets.
        constants: the graph's small tables by name.
        done: told how much more of :data:`STEPS` is done.
        path: how attention is done.

    Raises:
        BuildError: a layer is not supported, or TensorRT cannot build the network; with what it says.
        ConfigError: a target lacks the type, or this package cannot build for it.
        KeyboardInterrupt: Ctrl-C, once TensorRT has let go.
    """
    targets: Sequence[str] = config.targets
    if why := lacking(targets, config.dtype):
        raise ConfigError(why)
    package.check_targets(targets)
    trt = package.trt
    builder, logger, net = make_network(package, graph, spec, config, constants, path)
    settings = builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32
    settings.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    set_targets(trt, settings, targets)
    found: list[dict[str, list[list[int]]]] = []
    for shapes in path.profiles(graph, spec, config):
        profile = builder.create_optimization_profile()
        for name, (smallest, common, largest) in shapes.items():
            profile.set_shape(name, smallest, common, largest)
        settings.add_optimization_profile(profile)
        found.append({name: [list(s) for s in sizes] for name, sizes in shapes.items()})
    counted = 0

    def count(more: int) -> None:
        nonlocal counted
        counted += more
        done(more)

    stop = Stop()
    settings.progress_monitor = make_monitor(trt, stop, count, STEPS)
    plan = run_interruptible(lambda: builder.build_serialized_network(net.definition, settings), stop)
    if plan is None:
        said = "; ".join(logger.take()) or "it gives no reason"
        where = ", ".join(targets) or "any GPU"
        raise BuildError(f"{package.name} {package.version} cannot build this model in {config.dtype} for {where}: {said}")
    done(STEPS - counted)
    definition = net.definition
    info = PlanInfo(
        package.name,
        package.version,
        list(targets or path.targets()),
        config.dtype,
        dict(_described(definition.get_input(i)) for i in range(definition.num_inputs)),
        dict(_described(definition.get_output(i)) for i in range(definition.num_outputs)),
        found,
        hashlib.sha256(plan).hexdigest(),
        path.name,
        path.block_size,
    )
    return memoryview(plan), info


def _described(tensor: Any) -> tuple[str, list[Any]]:
    return tensor.name, [tensor.dtype.name, list(tensor.shape)]
