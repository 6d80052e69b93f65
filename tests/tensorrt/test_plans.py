"""Real plans, built by TensorRT-RTX with no GPU: every family, three targets and a portable one, and from the cache."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmapi import LLM, BuildError, ConfigError
from llmapi._build.artifact_keys import plan_key
from llmapi._build.export import export_graph
from llmapi._build.graph import Graph, Input, Node, Ref
from llmapi._build.names import PLAN_FILE, PLAN_INFO_FILE
from llmapi._build.store import Store
from llmapi._build.tensorrt.monitor import Stop, make_monitor, run_interruptible
from llmapi._build.tensorrt.package import Package, check_version, load_package
from llmapi._build.tensorrt.plan import STEPS, PlanInfo, build_plan
from llmapi._runtime.explain import explain
from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.errors import CacheError
from llmapi.models.transformer import constants
from tests._runtime.test_engine_cpu import SPEC
from tests.api.test_smollm2 import gguf_file
from tests.tensorrt.models import package
from tests.tiny import tiny_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "gpt2")
TARGETS = ("sm80", "sm89", "sm120", None)
LIMITS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 4, "max_num_tokens": 48}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny_checkpoint(folder / family, family) for family in FAMILIES}


def config(**options: Any) -> EngineConfig:
    return resolve(EngineOptions(**{"backend": "tensorrt", **LIMITS, **options}), SPEC)


def plan_of(cache: Path, report: Any) -> tuple[bytes, PlanInfo]:
    [entry] = [e for e in Store(cache).entries() if e.digest == report.keys["plan"]]
    folder = cache / "v1" / "plan" / entry.digest
    return (folder / PLAN_FILE).read_bytes(), PlanInfo.parse((folder / PLAN_INFO_FILE).read_text())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_every_family(family: str, target: str | None, checkpoints: dict[str, Path], plans: Path) -> None:
    found = package()
    arguments = {"backend": "tensorrt", "target": target, "cache_dir": plans, "dtype": "bfloat16", **LIMITS}
    report = LLM.build(checkpoints[family], **arguments)
    assert {p.name: p.note for p in report.phases}["plan"] == "built"
    plan, info = plan_of(plans, report)
    assert hashlib.sha256(plan).hexdigest() == info.sha256
    assert (info.package, info.version, info.targets) == (found.name, found.version, [target] if target else [])
    assert plan[:4] == b"vtrt" and b"k_cache.2.updated" in plan, "TensorRT tells no more of a plan without a GPU"
    heads = 4 if family == "gpt2" else 2
    row = [heads, 96, 16]
    assert info.inputs["input_ids"] == ["INT32", [-1, -1]] and info.inputs["k_cache.0"] == ["BF16", [-1, *row]]
    assert next(iter(info.outputs)) == "logits" and info.outputs["logits"] == ["BF16", [-1, 300]]
    assert info.outputs["hidden_states"] == ["BF16", [-1, 64]]
    assert info.outputs.keys() - {"logits", "hidden_states"} == {
        f"{k}_cache.{i}.updated" for i in range(3) for k in "kv"
    }
    decode, prefill = info.profiles
    assert decode["input_ids"] == [[1, 1], [2, 1], [4, 1]] and prefill["input_ids"] == [[1, 1], [1, 48], [1, 48]]
    assert decode["v_cache.2"][2] == [4, *row] and prefill["v_cache.2"][2] == [1, *row]
    again = LLM.build(checkpoints[family], **arguments)
    assert again.cached and again.keys == report.keys


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types(dtype: str, checkpoints: dict[str, Path], plans: Path) -> None:
    package()
    arguments = {"backend": "tensorrt", "cache_dir": plans, "dtype": dtype, **LIMITS}
    for targets in ([*["sm75"] * (dtype == "float16"), "sm86", "sm89"], []):
        report = LLM.build(checkpoints["llama"], target=",".join(targets) or None, **arguments)
        _, info = plan_of(plans, report)
        assert info.dtype == dtype and info.targets == targets


def test_smollm2(plans: Path) -> None:
    package()
    arguments = {"backend": "tensorrt", "target": "sm80,sm89,sm120", "cache_dir": plans, "max_seq_len": 2048}
    report = LLM.build(gguf_file(), **arguments)
    _, info = plan_of(plans, report)
    assert info.targets == ["sm80", "sm89", "sm120"]
    assert info.inputs["k_cache.29"][1] == [-1, 3, 2048, 64] and info.outputs["logits"][1] == [-1, 49152]
    assert LLM.build(gguf_file(), **arguments).cached


def test_attention_from_primitives_builds(tmp_path: Path) -> None:
    """Caps, biases and sinks, which no family of today uses, on every target."""
    base = export_graph(SPEC)
    extra = tuple(Input(name, "weight", (name,), (4,)) for name in ("slopes", "sinks"))

    def change(node: Node) -> Node:
        if "paged_attention" not in node.op:
            return node
        return replace(node, args=(*node.args[:8], 30.0, Ref("slopes"), Ref("sinks")))

    graph = Graph((*base.inputs, *extra), tuple(map(change, base.nodes)), base.output)
    for dtype in ("bfloat16", "float32"):
        wanted = config(dtype=dtype, target="sm80,sm89,sm120")
        plan, info = build_plan(package(), graph, SPEC, wanted, constants(SPEC))
        assert plan.nbytes and "sinks" in info.inputs


# ---- the key


def test_cache_why_explains_a_plan(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    package()
    arguments = {"backend": "tensorrt", "cache_dir": tmp_path, **LIMITS}
    assert [f.kind for f in explain(str(checkpoints["llama"]), **arguments)][-1] == "plan"
    LLM.build(checkpoints["llama"], target="sm89", **arguments)
    *_, engine, plan = explain(str(checkpoints["llama"]), target="sm89", **arguments)
    assert engine.found and plan.found and plan.kind == "plan"
    *_, engine, plan = explain(str(checkpoints["llama"]), target="sm120", **arguments)
    assert engine.found and not plan.found and plan.nearest is not None
    assert [str(d) for d in plan.nearest[1]] == ['targets: ["sm89"] -> ["sm120"]']


def test_each_part_alone_makes_another_plan_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_key(SPEC, config(), "g", "tensorrt_rtx", "1.7.1")

    def names(other: Any) -> list[str]:
        return [d.name for d in first.diff(other)]

    assert names(plan_key(SPEC, config(), "g", "tensorrt_rtx", "1.7.1")) == []
    assert names(plan_key(SPEC, config(), "h", "tensorrt_rtx", "1.7.1")) == ["graph"]
    assert names(plan_key(SPEC, config(), "g", "tensorrt_rtx", "1.7.2")) == ["tensorrt"]
    assert names(plan_key(SPEC, config(), "g", "tensorrt", "1.7.1")) == ["tensorrt"]
    assert names(plan_key(SPEC, config(target="sm89"), "g", "tensorrt_rtx", "1.7.1")) == ["targets"]
    assert names(plan_key(SPEC, config(max_batch_size=3), "g", "tensorrt_rtx", "1.7.1")) == ["max_batch_size"]
    assert names(plan_key(SPEC, config(dtype="float16"), "g", "tensorrt_rtx", "1.7.1")) == ["dtype", "kv_dtype"]
    assert names(plan_key(SPEC, config(max_seq_len=64), "g", "tensorrt_rtx", "1.7.1")) == ["max_seq_len", "block_size"]
    rope = replace(SPEC, rope=replace(SPEC.rope, theta=7.0))  # type: ignore[type-var]
    assert names(plan_key(rope, config(), "g", "tensorrt_rtx", "1.7.1")) == ["constants"]
    monkeypatch.setattr("llmapi._build.artifact_keys.sources", lambda *names: "other")
    assert names(plan_key(SPEC, config(), "g", "tensorrt_rtx", "1.7.1")) == ["lowering"]


def test_plans_are_not_taken_from_elsewhere(checkpoints: dict[str, Path], plans: Path, tmp_path: Path) -> None:
    """They hold machine code."""
    package()
    arguments = {"backend": "tensorrt", "target": "sm89", "cache_dir": plans, "dtype": "bfloat16", **LIMITS}
    report = LLM.build(checkpoints["llama"], **arguments)
    with pytest.raises(CacheError, match="plan"):
        Store(plans).export([f"plan/{report.keys['plan'][:16]}"], tmp_path / "plan.tar")


# ---- progress and Ctrl-C


def test_progress_is_counted_to_the_end() -> None:
    counts: list[int] = []
    build_plan(package(), export_graph(SPEC), SPEC, config(), constants(SPEC), counts.append)
    assert sum(counts) == STEPS and len(counts) > 2 and min(counts) >= 0


def test_ctrl_c_stops_a_build_and_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The signal comes at the first step that TensorRT reports; no thread and no entry is left."""
    package()
    steps: list[bool] = []

    def interrupting(trt: Any, stop: Stop, done: Any, total: int) -> Any:
        monitor = make_monitor(trt, stop, done, total)

        class Monitor(type(monitor)):  # type: ignore[misc]
            def step_complete(self, phase_name: str, step: int) -> bool:
                if not steps:
                    signal.raise_signal(signal.SIGINT)
                steps.append(bool(super().step_complete(phase_name, step)))
                while not stop.asked:  # until the caller's thread has heard of it
                    threading.Event().wait(0.01)
                return False

        return Monitor()

    monkeypatch.setattr("llmapi._build.tensorrt.plan.make_monitor", interrupting)
    with pytest.raises(KeyboardInterrupt):
        LLM.build(checkpoints["llama"], backend="tensorrt", cache_dir=tmp_path, **LIMITS)
    assert steps
    for thread in threading.enumerate():
        if thread.name == "llmapi-tensorrt":
            thread.join(10)  # its work is done; it may not have left yet
            assert not thread.is_alive()
    assert [e.kind for e in Store(tmp_path).entries() if e.kind == "plan"] == []
    assert list((tmp_path / "v1" / "staging").iterdir()) == []
    monkeypatch.undo()
    report = LLM.build(checkpoints["llama"], backend="tensorrt", cache_dir=tmp_path, progress=False, **LIMITS)
    assert {p.name: p.note for p in report.phases}["plan"] == "built"


def test_errors_of_a_build_come_to_the_caller() -> None:
    def fails() -> None:
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        run_interruptible(fails, Stop())


# ---- bad input


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    monkeypatch.setattr("llmapi._tensorrt.installed", list)
    with pytest.raises(
        ConfigError, match=r"neither tensorrt_rtx nor tensorrt is installed: pip install .*tensorrt-rtx"
    ):
        LLM.build(checkpoints["llama"], backend="tensorrt", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"tensorrt is not installed: pip install .*NVIDIA's own package index"):
        load_package("tensorrt")


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [
        ("tensorrt_rtx", "1.3.0.7", "1.4 to 1.x"),
        ("tensorrt", "10.12.0", "10.13 to 11.x"),
        ("tensorrt", "12.0", "10.13 to 11.x"),
    ],
)
def test_wrong_versions(name: str, version: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_version(name, version)
    assert f"{name} {version} is installed, and this llmapi works with {wanted}: pip install" in str(caught.value)
    for fine in {"tensorrt_rtx": ("1.4", "1.7.1.116"), "tensorrt": ("10.13.2", "11.1.0")}[name]:
        check_version(name, fine)


def test_a_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    package()

    def breaks(name: str) -> Any:
        raise OSError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", breaks)
    with pytest.raises(ConfigError, match=r"installed but cannot be loaded \(libtensorrt_rtx"):
        load_package()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"target": "sm90"}, "only for sm75, sm80, sm86, sm89, sm120, sm121; run the model there with backend='cuda'"),
        ({"target": "sm98"}, "unknown target 'sm98'; did you mean 'sm89'?"),
        ({"target": 89}, "unknown target 89; did you mean 'sm89'?"),
        ({"target": "sm75,sm89", "dtype": "bfloat16"}, "compute in bfloat16 on sm75, but on sm80 and newer"),
        (
            {"target": "sm75", "dtype": "float32"},
            "compute in float32 on sm75, but on sm80 and newer: use dtype='float16'",
        ),
        ({"target": "sm89", "backend": "cpu"}, "only backend='tensorrt' takes a target"),
        ({"kv_cache_config": {"block_size": 16}}, "the tensorrt backend keeps a sequence in one block"),
        ({"kv_cache_config": {"dtype": "float16"}, "dtype": "float32"}, "leave it at 'auto'"),
        ({"tarqet": "sm89"}, "did you mean 'target'?"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM.build(checkpoints["llama"], **{"backend": "tensorrt", "cache_dir": tmp_path, **arguments})
    assert said in str(caught.value)


def test_types_follow_the_targets() -> None:
    assert config(target="sm75").dtype == "float16"
    assert config(target="sm80").dtype == config().dtype == "bfloat16"
    assert config(target=["sm120", "SM_89"]).targets == ("sm89", "sm120")


def test_tensorrt_builds_for_the_gpu_at_hand_only() -> None:
    found = package()
    other = Package("tensorrt", "10.15.0", found.trt)
    with pytest.raises(ConfigError, match="tensorrt builds for the GPU at hand only; leave target out"):
        build_plan(other, export_graph(SPEC), SPEC, config(target="sm89"), constants(SPEC))


def test_what_tensorrt_says_is_passed_on() -> None:
    """A network that lowers and does not build: bfloat16 for a GPU that has none, past our own check."""
    wanted = replace(config(dtype="bfloat16"), targets=("sm75",))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BuildError) as caught:
        patch.setattr("llmapi._build.tensorrt.plan.lacking", lambda *args: None)
        build_plan(package(), export_graph(SPEC), SPEC, wanted, constants(SPEC))
    assert "cannot build this model in bfloat16 for sm75: " in str(caught.value)
    assert "Cannot compile for target(s) sm75" in str(caught.value)


def test_a_description_is_read_back() -> None:
    info = PlanInfo(
        "tensorrt_rtx", "1.7", ["sm89"], "float16", {"x": ["HALF", [-1]]}, {}, [{"x": [[1], [1], [2]]}], "0f"
    )
    assert PlanInfo.parse(info.text) == info
    for text in ("", "[]", json.dumps({"package": "x"})):
        with pytest.raises(CacheError, match="remove the entry"):
            PlanInfo.parse(text)
