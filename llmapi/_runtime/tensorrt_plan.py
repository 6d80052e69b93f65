"""LoadedPlan: a TensorRT plan on the GPU at hand, and why one cannot be loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmapi import _device
from llmapi._build.names import PLAN_FILE, PLAN_INFO_FILE
from llmapi._build.tensorrt.log import make_logger
from llmapi._build.tensorrt.package import Package, load_package
from llmapi._build.tensorrt.plan import PlanInfo
from llmapi._targets import RTX_TARGETS
from llmapi.errors import BuildError, CacheError, ConfigError


class LoadedPlan:
    """An engine of TensorRT with one execution context for each profile.

    Contexts share nothing but the engine, so that no step has to switch a profile. Those of a plan with plugins are
    many and run one at a time: they are made without memory for intermediate results, and are given one block of
    ``scratch_bytes``, the same for all, before they run.

    Args:
        package: the TensorRT that built the plan.
        engine: an ``ICudaEngine``.
        info: what the plan says of itself.
        owner: what must live as long as the engine: runtime, logger (the last).
        cache: an earlier runtime cache of TensorRT-RTX, kernels that it made for this GPU; None for none.

    Raises:
        CacheError: the engine is not what its description says.
    """

    def __init__(self, package: Package, engine: Any, info: PlanInfo, owner: Any, cache: bytes | None = None) -> None:
        self.info = info
        self._package, self._engine, self._owner = package, engine, owner
        self._check()
        self._runtime_cache: Any = None
        self._config = self._configured(cache)
        self.contexts = []
        for profile in range(len(info.profiles)):
            context = engine.create_execution_context(*self._how())
            if context is None:
                raise BuildError(
                    f"{package.name} {package.version} makes no execution context: is the GPU's memory full?"
                )
            context.set_optimization_profile_async(profile, 0)
            self.contexts.append(context)

    def _check(self) -> None:
        found = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        wanted = {*self.info.inputs, *self.info.outputs}
        if found != wanted or self._engine.num_optimization_profiles != len(self.info.profiles):
            odd = ", ".join(sorted(found ^ wanted)[:4]) or f"{self._engine.num_optimization_profiles} profiles"
            raise CacheError(f"the plan and its description differ ({odd}): remove the entry and build again")

    def _how(self) -> list[Any]:
        """Arguments that a context is made with."""
        if self.info.attention == "plugin":
            return [self._package.trt.ExecutionContextAllocationStrategy.USER_MANAGED]
        return [] if self._config is None else [self._config]

    @property
    def scratch_bytes(self) -> int:
        """Memory that contexts without any of their own need while they run; 0 where they have their own."""
        return int(self._engine.device_memory_size_v2) if self.info.attention == "plugin" else 0

    def said(self) -> str:
        """What TensorRT said of the errors since it was last asked."""
        *_, logger = self._owner
        return "; ".join(logger.take()) or "it gives no reason"

    def _configured(self, cache: bytes | None) -> Any:
        """RTX makes kernels for the sizes that come up, under CUDA graphs of its own, and keeps them in a cache."""
        if not self._package.is_rtx:
            return None
        trt = self._package.trt
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._runtime_cache = config.create_runtime_cache()
        if cache:
            self._runtime_cache.deserialize(cache)  # says no to that of another GPU or version, and stays empty
        config.set_runtime_cache(self._runtime_cache)
        return config

    def runtime_cache(self) -> bytes | None:
        """What to hand in as ``cache`` the next time; None where the package keeps none."""
        if self._runtime_cache is None:
            return None
        blob = self._runtime_cache.serialize()
        return None if blob is None else bytes(memoryview(blob))

    def close(self) -> None:
        """Let go of contexts, engine and runtime, in this order."""
        self.contexts = []
        self._config = self._runtime_cache = self._engine = self._owner = None


def read_plan(folder: Path) -> tuple[bytes, PlanInfo]:
    """A plan and its description; nothing of it is run before its digest is known to be right.

    Args:
        folder: the artifact.

    Raises:
        CacheError: they cannot be read, or the plan is damaged.
    """
    try:
        plan = (folder / PLAN_FILE).read_bytes()
        info = PlanInfo.parse((folder / PLAN_INFO_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CacheError(f"the plan in {folder} cannot be read ({error}): remove the entry and build again") from error
    if hashlib.sha256(plan).hexdigest() != info.sha256:
        raise CacheError(
            f"the plan in {folder} is damaged: its digest is not that of the build. 'llmapi cache verify' sets "
            "it aside, and the next start builds it again"
        )
    return plan, info


def gpu_problem(package: Package) -> str | None:
    """Why TensorRT cannot run on the GPU that torch sees; None where it can."""
    import torch

    return capability_problem(package, _device.cuda_capability(), torch.cuda.get_device_name())


def capability_problem(package: Package, capability: tuple[int, int], gpu: str) -> str | None:
    """Why TensorRT cannot run on a GPU; None where it can.

    Args:
        package: the TensorRT.
        capability: of the GPU.
        gpu: its name.
    """
    here = f"sm{capability[0]}{capability[1]}"
    if not package.is_rtx:
        if capability >= _device.OLDEST_CAPABILITY:
            return None
        return f"{gpu} has compute capability {capability[0]}.{capability[1]}, and llmapi's plugins need 7.5 or newer"
    if here in RTX_TARGETS:
        return None
    return f"TensorRT-RTX does not run on {gpu} ({here}), only on {', '.join(RTX_TARGETS)}: use backend='cuda'"


def refuse_misfits(info: PlanInfo, package: Package, capability: tuple[int, int] | None, gpu: str) -> None:
    """Refuse a plan that cannot run here, before TensorRT is asked.

    Args:
        info: what the plan was built for.
        package: the TensorRT at hand.
        capability: of the GPU at hand; None where there is none.
        gpu: its name, for the message.

    Raises:
        ConfigError: it was built by another TensorRT, or for other GPUs; with what to do.
    """
    if (info.package, info.version) != (package.name, package.version):
        raise ConfigError(
            f"the plan was built by {info.package} {info.version}, and {package.name} {package.version} is installed, "
            f"which cannot read it: build it again, or pip install {_distribution(info.package)}=={info.version}"
        )
    if info.attention != package.attention:
        raise ConfigError(
            f"the plan does attention by the {info.attention} path, and plans of {package.name} by the "
            f"{package.attention} path: build it again"
        )
    everywhere = "any GPU of TensorRT-RTX" if package.is_rtx else "the GPU that it is built on"
    built = f"the plan is for {', '.join(info.targets) or everywhere}"
    if capability is None and not package.is_rtx:
        raise ConfigError(
            f"{built}, and this machine has no NVIDIA GPU that torch can use ({gpu}): the full TensorRT builds "
            "and runs on one alone. Use backend='cpu', or install tensorrt-rtx-cu13 to build plans for other machines"
        )
    if capability is None:
        raise ConfigError(
            f"{built}, and this machine has no NVIDIA GPU that torch can use ({gpu}): run it on one that has, or use "
            "backend='cpu'. 'llmapi build' and LLM.build() build plans without a GPU"
        )
    here = f"sm{capability[0]}{capability[1]}"
    if problem := capability_problem(package, capability, gpu):
        raise ConfigError(f"{built}, and {problem}")
    if info.targets and here not in info.targets and not package.is_rtx:
        raise ConfigError(
            f"{built}, and this is {gpu} ({here}): the full TensorRT's plans run where they are built, "
            "so build it again here"
        )
    if info.targets and here not in info.targets:
        raise ConfigError(f"{built}, and this is {gpu} ({here}): build it with target='{here}', or without a target")


def refuse_here(info: PlanInfo, package: Package) -> None:
    """:func:`refuse_misfits` for the GPU at hand.

    Args:
        info: what the plan was built for.
        package: the TensorRT at hand.

    Raises:
        ConfigError: it cannot run here.
    """
    if not _device.cuda_visible():
        refuse_misfits(info, package, None, _device.cuda_problem() or "torch sees no GPU")
        return
    import torch

    refuse_misfits(info, package, _device.cuda_capability(), torch.cuda.get_device_name())


def refuse_ahead(targets: Sequence[str]) -> None:
    """Refuse what cannot run here before a model is fetched, converted and built for it.

    Args:
        targets: that a plan is to be built for.

    Raises:
        ConfigError: no TensorRT is installed, or its plan could not run on this machine.
    """
    package = load_package()
    package.check_targets(targets)
    refuse_here(PlanInfo(package.name, package.version, list(targets), "", {}, {}, [], "", package.attention), package)


def open_plan(plan: bytes, info: PlanInfo, package: Package, cache: Callable[[], bytes | None]) -> LoadedPlan:
    """Load a plan onto the GPU at hand.

    Args:
        plan: the bytes.
        info: their description.
        package: the TensorRT that built them.
        cache: gives an earlier runtime cache.

    Raises:
        ConfigError: it cannot run on this machine.
        CacheError: it is damaged.
    """
    refuse_here(info, package)
    logger = make_logger(package.trt)
    runtime = package.trt.Runtime(logger)
    if package.is_rtx:
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == package.trt.EngineValidity.INVALID:
            raise _invalid(package, diagnostics)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        said = "; ".join(logger.take()) or "it gives no reason"
        if info.attention == "plugin" and "plugin" in said.lower():
            raise ConfigError(
                f"{package.name} {package.version} does not find llmapi's plugins, whose kernels the plan for "
                f"{', '.join(info.targets)} carries: {said}. Remove the entry and build again, or use backend='cuda'"
            )
        raise CacheError(
            f"{package.name} {package.version} cannot load the plan: {said}. Remove the entry, build again"
        )
    return LoadedPlan(package, engine, info, (runtime, logger), cache())


def _invalid(package: Package, diagnostics: int) -> Exception:
    """What TensorRT-RTX's bits say of a plan that it would not load."""
    kinds = package.trt.EngineInvalidityDiagnostics
    found = [name for name, kind in kinds.__members__.items() if int(diagnostics) & int(kind)]
    remedies = {
        "VERSION_MISMATCH": "it was built by another version: build it again",
        "UNSUPPORTED_CC": "it was not built for this GPU: build it with its target, or without one",
        "OLD_CUDA_DRIVER": "the GPU's driver is too old: install a newer one",
        "OLD_CUDA_RUNTIME": "the CUDA runtime is too old: install a newer one",
        "INSUFFICIENT_GPU_MEMORY": "the GPU has too little free memory: end other programs, or use a smaller model",
        "MALFORMED_ENGINE": "it is damaged: remove the entry from the cache and build again",
        "CUDA_ERROR": "CUDA does not work here: check the driver with nvidia-smi",
    }
    said = "; ".join(remedies.get(name, name) for name in found) or "it gives no reason: build it again"
    text = f"{package.name} {package.version} cannot run this plan: {said}"
    return CacheError(text) if "MALFORMED_ENGINE" in found else ConfigError(text)


def _distribution(package: str) -> str:
    return "tensorrt-rtx-cu13" if package == "tensorrt_rtx" else "tensorrt-cu13"
