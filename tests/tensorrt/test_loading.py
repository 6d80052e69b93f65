"""Plans that cannot be loaded: other GPUs, another TensorRT, damaged files. Every refusal says what to do."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmapi import LLM, CacheError, ConfigError
from llmapi._build.names import PLAN_FILE, PLAN_INFO_FILE
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.plan import PlanInfo
from llmapi._runtime.tensorrt_plan import LoadedPlan, open_plan, read_plan, refuse_misfits
from tests.tensorrt.fake_runtime import FakeEngine
from tests.tensorrt.models import package
from tests.tiny import tiny_checkpoint

RTX = Package("tensorrt_rtx", "1.7.1.116", None)
LIMITS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 4, "max_num_tokens": 48}


def info(*targets: str, version: str = "1.7.1.116", name: str = "tensorrt_rtx") -> PlanInfo:
    return PlanInfo(name, version, list(targets), "bfloat16", {}, {}, [{}, {}], hashlib.sha256(b"plan").hexdigest())


@pytest.mark.parametrize(
    ("plan", "capability", "said"),
    [
        (info("sm89"), (12, 0), "is for sm89, and this is a GPU (sm120): build it with target='sm120', or without"),
        (info("sm80", "sm89"), (8, 6), "the plan is for sm80, sm89, and this is a GPU (sm86)"),
        (info("sm89"), (9, 0), "does not run on a GPU (sm90), only on sm75, sm80, sm86, sm89, sm120, sm121"),
        (info(), (9, 0), "the plan is for any GPU of TensorRT-RTX, and TensorRT-RTX does not run on a GPU (sm90)"),
        (info("sm89"), None, "the plan is for sm89, and this machine has no NVIDIA GPU that torch can use (a GPU)"),
        (info(version="1.6.0.3"), (8, 9), "built by tensorrt_rtx 1.6.0.3, and tensorrt_rtx 1.7.1.116 is installed"),
        (info(version="1.6.0.3"), (8, 9), "or pip install tensorrt-rtx-cu13==1.6.0.3"),
        (info(name="tensorrt", version="10.15"), (8, 9), "build it again, or pip install tensorrt-cu13==10.15"),
    ],
)  # fmt: skip
def test_misfits(plan: PlanInfo, capability: tuple[int, int] | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_misfits(plan, RTX, capability, "a GPU")
    assert said in str(caught.value)


def test_what_fits_is_let_through() -> None:
    refuse_misfits(info("sm80", "sm89"), RTX, (8, 9), "a GPU")
    refuse_misfits(info(), RTX, (12, 1), "a GPU")
    full = PlanInfo("tensorrt", "10.15", ["sm90"], "float16", {}, {}, [], "", "plugin", 64)
    refuse_misfits(full, Package("tensorrt", "10.15", None), (9, 0), "a GPU")


# ---- TensorRT's own refusals


class Validity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class Diagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 8.9, as far as torch tells."""
    monkeypatch.setattr("llmapi._device.cuda_visible", lambda: True)
    monkeypatch.setattr("llmapi._device.cuda_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an Ada")


def pretended(validity: Validity, bits: int = 0, engine: Any = None) -> Package:
    """TensorRT-RTX with a runtime that answers so."""

    class Logger:
        ERROR, INTERNAL_ERROR, WARNING = range(3)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def get_engine_validity(self, plan: bytes) -> tuple[Validity, int]:
            return validity, bits

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            self.logger.log(Logger.ERROR, "magic tag does not match")
            return engine

    trt = SimpleNamespace(
        ILogger=Logger, Runtime=Runtime, EngineValidity=Validity, EngineInvalidityDiagnostics=Diagnostics,
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY=0),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1),
    )  # fmt: skip
    Logger.__init__ = lambda self: None  # type: ignore[method-assign,misc]
    return Package("tensorrt_rtx", "1.7.1.116", trt)


@pytest.mark.parametrize(
    ("bits", "error", "said"),
    [
        (1, ConfigError, "built by another version: build it again"),
        (2, ConfigError, "not built for this GPU"),
        (4, ConfigError, "driver is too old: install a newer one"),
        (16, ConfigError, "too little free memory"),
        (32, CacheError, "it is damaged: remove the entry from the cache and build again"),
        (64, ConfigError, "check the driver with nvidia-smi"),
        (5, ConfigError, "build it again; the GPU's driver is too old"),
        (0, ConfigError, "it gives no reason: build it again"),
    ],
)
def test_what_tensorrt_says_of_a_plan(bits: int, error: type[Exception], said: str, ada: None) -> None:
    with pytest.raises(error) as caught:
        open_plan(b"plan", info("sm89"), pretended(Validity.INVALID, bits), lambda: None)
    assert said in str(caught.value)


def test_a_plan_that_does_not_deserialize(ada: None) -> None:
    with pytest.raises(
        CacheError, match=r"cannot load the plan: magic tag does not match\. Remove the entry, build again"
    ):
        open_plan(b"plan", info("sm89"), pretended(Validity.VALID), lambda: None)


def test_a_plan_is_opened_with_a_context_for_each_profile(ada: None) -> None:
    fake = FakeEngine(RTX, None, info("sm89"))  # type: ignore[arg-type]
    plan = open_plan(b"plan", info("sm89"), pretended(Validity.SUBOPTIMAL, engine=fake), lambda: b"old ")
    assert isinstance(plan, LoadedPlan) and [c._profile for c in plan.contexts] == [0, 1]
    assert plan.runtime_cache() == b"old kernels"
    plan.close()
    assert plan.contexts == [] and plan.runtime_cache() is None


def test_the_real_runtime_refuses_garbage(ada: None) -> None:
    """The very package, told that there is a GPU: it finds none, and says so without a crash."""
    found = package()
    plan = PlanInfo(found.name, found.version, [], "bfloat16", {}, {}, [], "")
    with pytest.raises((ConfigError, CacheError), match=f"{found.name} {found.version} cannot"):
        open_plan(b"not a plan" * 100, plan, found, lambda: None)


# ---- files


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be read"):
        read_plan(tmp_path)
    (tmp_path / PLAN_FILE).write_bytes(b"plan")
    (tmp_path / PLAN_INFO_FILE).write_text("{")
    with pytest.raises(CacheError, match="description cannot be read"):
        read_plan(tmp_path)
    (tmp_path / PLAN_INFO_FILE).write_text(info("sm89").text)
    assert read_plan(tmp_path) == (b"plan", info("sm89"))
    (tmp_path / PLAN_FILE).write_bytes(b"plam")
    with pytest.raises(CacheError, match=r"is damaged.*llmapi cache verify"):
        read_plan(tmp_path)


def test_a_damaged_plan_in_the_cache_is_built_again(tmp_path: Path, offline_and_quiet: None) -> None:
    package()
    model = tiny_checkpoint(tmp_path / "model")
    arguments = {"backend": "tensorrt", "cache_dir": tmp_path / "cache", **LIMITS}
    LLM.build(model, **arguments)
    [file] = (tmp_path / "cache").rglob(PLAN_FILE)
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-7])
    report = LLM.build(model, **arguments)
    assert {p.name: p.note for p in report.phases}["plan"] == "built"
    [file] = (tmp_path / "cache" / "v1" / "plan").rglob(PLAN_FILE)
    read_plan(file.parent)  # whole again; not to the byte what it was, for TensorRT's builds vary a little
