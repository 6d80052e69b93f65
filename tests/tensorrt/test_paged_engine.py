"""The plugin path's engine: in which order it calls TensorRT, its graphs, its memory, its end, and what it refuses."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmapi import BuildError, CacheError, CapacityError, ConfigError, EngineClosedError, SamplingParams
from llmapi._build.names import PLAN_FILE, PLAN_INFO_FILE
from llmapi._build.tensorrt.buckets import Bucket, buckets_in
from llmapi._build.tensorrt.plan import PlanInfo
from llmapi._kernels.plugins.pools import POOL_GUARD
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.device_tensorrt import TensorRTDevice
from llmapi._runtime.padded_step import ALIGNMENT, PaddedStep, empty_step
from llmapi._runtime.plan_rows import PlanRows
from llmapi._runtime.tensorrt_plan import gpu_problem, read_plan, refuse_ahead
from llmapi.config import EngineOptions, KvCacheConfig, resolve
from tests._runtime.test_engine_cpu import SPEC
from tests.api.truth import Truth, prompts_of, until
from tests.tensorrt.echo import EchoContext, drive, echo_engine, on_cpu
from tests.tensorrt.fake_paged_runtime import SCRATCH, Event, World
from tests.tensorrt.paged_llm import full_tensorrt, make
from tests.tensorrt.paged_models import SIZES
from tests.tiny import tiny_checkpoint

torch.set_num_threads(1)

DECODES = (1, 2, 4)
"""Tokens of the buckets that hold steps of decoding, for four sequences."""
BUCKETS = [1, 2, 4, 8, 16, 32, 48, 48]


@pytest.fixture(scope="module")
def machine(offline_and_quiet: None) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, full_tensorrt(patch) as world:
        yield world


@pytest.fixture
def world(machine: World) -> World:
    machine.reset()
    return machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", **SIZES["llama"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


# ---- a padded step


def test_what_is_beyond_a_step_is_filled() -> None:
    step = PaddedStep.of(Bucket(8, 4, 3), 3)
    memory = np.full(step.size + 5, 77, np.int32)
    batch = StepBatch(
        [5, 6, 7, 8, 9], [0, 1, 2, 70, 0], [64, 65, 66, 6, 128], [[1], [2, 0], [2]], [3, 71, 1], [0, 3, 4, 5], [2, 3],
        [1, 1, 0], [],
    )  # fmt: skip
    step.fill(memory, batch)
    found = {name: array.tolist() for name, array in step.views(torch.from_numpy(memory)).items()}
    assert found == {
        "input_ids": [5, 6, 7, 8, 9, 0, 0, 0],
        "positions": [0, 1, 2, 70, 0, 0, 0, 0],
        "slot_mapping": [64, 65, 66, 6, 128, -1, -1, -1],
        "block_tables": [[1, 0, 0], [2, 0, 0], [2, 0, 0], [0, 0, 0]],
        "seq_lens": [3, 71, 1, 0],
        "query_start": [0, 3, 4, 5, 5],
        "logits_indices": [2, 3, 0],
    }
    assert memory[step.size :].tolist() == [77] * 5
    step.fill(memory, empty_step())
    found = {name: array for name, array in step.views(torch.from_numpy(memory)).items() if name != "slot_mapping"}
    assert not any(array.any() for array in found.values()), "nothing of the step before is left"


@pytest.mark.parametrize("bucket", [Bucket(1, 1, 1), Bucket(7, 3, 2), Bucket(300, 256, 300)])
def test_arrays_lie_apart_where_tensorrt_takes_them(bucket: Bucket) -> None:
    step = PaddedStep.of(bucket, 5)
    taken = np.zeros(step.size, np.int32)
    for name, (at, shape) in step.sections.items():
        assert at * 4 % ALIGNMENT == 0 and shape == bucket.shapes(5)[name]
        taken[at : at + int(np.prod(shape))] += 1
    assert taken.max() == 1


def test_profiles_that_are_no_buckets() -> None:
    def profile(tokens: int, width: int) -> dict[str, Any]:
        return {name: [list(shape)] * 3 for name, shape in Bucket(tokens, 2, 2).shapes(width).items()}

    assert buckets_in([profile(2, 4), profile(8, 4)]) == ([Bucket(2, 2, 2), Bucket(8, 2, 2)], 4)
    growing = {**profile(8, 4), "positions": [[1], [8], [8]]}
    for bad in ([profile(2, 4), profile(8, 5)], [{}], [growing], [{**profile(2, 4), "seq_lens": []}], []):
        with pytest.raises(CacheError, match=r"no buckets of a paged step .*remove the entry, build again"):
            buckets_in(bad)


# ---- order of calls


def test_everything_runs_once_before_the_cache_takes_the_rest(model: Path, cache: Path, world: World) -> None:
    """On a step of nothing, and without a guard among the caches' addresses."""
    with make(model, cache) as llm:
        engine: Any = llm._loop._engine
        assert world.calls == [*(("run", n) for n in BUCKETS), ("wait", 0), ("size", 0), ("wait", 0)]
        assert world.steps == [([], n) for n in BUCKETS]
        assert all(not cache.any() for cache in engine._caches.values()), "nothing was written"
        assert engine._pools[0] == POOL_GUARD and engine._scratch.numel() == SCRATCH
        assert {c._memory for c in world.contexts} == {(engine._scratch.data_ptr(), SCRATCH)}, "one place for all"


def test_decoding_is_captured_after_it_ran(model: Path, cache: Path, world: World) -> None:
    truth = Truth(model)
    prompts = prompts_of([20, 21, 22], seed=1)
    with make(model, cache) as llm:
        world.reset()
        outputs = llm.generate(prompts, [greedy(9), greedy(7), greedy(4)])
        assert [o.outputs[0].token_ids for o in outputs] == [
            truth.greedy(p, n) for p, n in zip(prompts, (9, 7, 4), strict=True)
        ]
    calls = [call for call in world.calls if call[1]]
    for tokens in DECODES:
        own = [how for how, n in calls if n == tokens]
        assert own[:2] == ["run", "capture"] and set(own[2:]) <= {"replay"}, own
    assert {how for how, n in calls if n not in DECODES} == {"run"}, "steps with prompts are launched"
    assert ("replay", 1) in calls and ("replay", 4) in calls


def test_graphs_can_be_switched_off(model: Path, cache: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMAPI_TENSORRT_GRAPHS", "0")
    [prompt] = prompts_of([20], seed=1)
    with make(model, cache) as llm:
        assert llm.generate(prompt, greedy(6)).outputs[0].token_ids == Truth(model).greedy(prompt, 6)
    assert {how for how, n in world.calls if n} == {"run"}


@pytest.mark.parametrize("how", ["cuda", "tensorrt"])
def test_what_cannot_be_captured_is_launched(
    how: str, model: Path, cache: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses the capture, or TensorRT the launch in it: the step had run before, and it is tried once."""
    [prompt] = prompts_of([20], seed=1)
    with make(model, cache) as llm, caplog.at_level(logging.WARNING, "llmapi"):
        if how == "cuda":
            world.uncapturable = True
        else:
            capture = world.capture

            def refused(run: Any) -> Any:
                world.failing = {1}
                try:
                    return capture(run)
                finally:
                    world.failing = set()

            monkeypatch.setattr(world, "capture", refused)
        assert llm.generate(prompt, greedy(6)).outputs[0].token_ids == Truth(model).greedy(prompt, 6)
    assert [how for how, n in world.calls[len(BUCKETS) :] if n] == ["run"] * 6
    [line] = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert ("stream is capturing" if how == "cuda" else "could not run a step of 1 tokens") in line


def test_tokens_that_the_host_does_not_know(model: Path, cache: Path, world: World) -> None:
    """``~row`` stands for what the step before chose in that row."""
    ids, truth = prompts_of([4], seed=7)[0], Truth(model)
    with make(model, cache) as llm:
        step = StepBatch([ids[0], ~2, ids[2], ~0], [0, 1, 2, 3], [0, 1, 2, 3], [[0]], [4], [0, 4], [3], [1], [])
        logits = llm._loop._engine.step(step, torch.tensor([ids[3], 9, ids[1]], dtype=torch.int32))
        torch.testing.assert_close(logits, truth.logits(ids)[3:], atol=2e-4, rtol=0)


def test_a_step_without_a_bucket(model: Path, cache: Path, world: World) -> None:
    with make(model, cache) as llm:
        too_many = replace_tokens(49)
        with pytest.raises(CapacityError, match=r"a step of 49 tokens .*larger than the plan's 48, 4 and 48"):
            llm._loop._engine.step(too_many)


def replace_tokens(count: int) -> StepBatch:
    """A step of one sequence of so many tokens."""
    places = list(range(count))
    return StepBatch([5] * count, places, places, [[0]], [count], [0, count], [count - 1], [1], [])


def test_a_bucket_that_does_not_run(model: Path, cache: Path, world: World) -> None:
    world.failing = {16}
    with pytest.raises(BuildError, match=r"could not run a step of 16 tokens of 4 sequences \(it gives no reason\)"):
        make(model, cache)
    world.failing = set()
    with make(model, cache) as llm:
        world.failing = {1}
        prompt, other = prompts_of([20, 9], seed=1)
        with pytest.raises(BuildError, match=r"could not run a step of 1 tokens .*lower max_batch_size"):
            llm.generate(prompt, greedy(4))
        world.failing = set()
        assert llm.generate(other, greedy(4)).outputs[0].token_ids == Truth(model).greedy(other, 4)


# ---- its end


def test_closing_lets_go_of_everything(model: Path, cache: Path, world: World) -> None:
    llm = make(model, cache)
    llm.generate(prompts_of([20, 30], seed=2), greedy(4))
    engine: Any = llm._loop._engine
    memory = [
        weakref.ref(t) for t in [*engine._caches.values(), engine._scratch, *engine._out.by_name.values(), engine._ints]
    ]
    contexts = [weakref.ref(c) for c in world.contexts]
    world.reset()
    llm.close()
    assert ("wait", 0) in world.calls, "the GPU was waited for"
    gc.collect()
    assert len(contexts) >= len(BUCKETS) and not [c for c in contexts if c() is not None]
    assert not [m for m in memory if m() is not None] and not list(world.engines)
    llm.close()
    with pytest.raises(EngineClosedError, match="make a new one"):
        llm.generate("hello")
    with pytest.raises(EngineClosedError):
        engine.step(empty_step())


def test_dropping_the_last_reference_lets_go(model: Path, cache: Path, world: World) -> None:
    before = set(threading.enumerate())  # other tests' loops
    llm = make(model, cache)
    future = llm.generate_async(prompts_of([20], seed=2)[0], greedy(150))
    assert [t for t in threading.enumerate() if t.name == "llmapi-loop" and t not in before]
    del llm
    gc.collect()
    assert future.result(30).outputs[0].finish_reason in ("abort", "length")
    until(lambda: not [t for t in threading.enumerate() if t.name == "llmapi-loop" and t not in before])
    del future
    gc.collect()
    assert not list(world.engines) and not list(world.contexts)


def test_ctrl_c_leaves_it_usable_and_idle(model: Path, cache: Path, world: World) -> None:
    prompts = prompts_of([20] * 12, seed=3)
    with make(model, cache) as llm:

        def press() -> None:
            until(lambda: llm._loop.steps >= 5)
            os.kill(os.getpid(), signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, greedy(150))
        presser.join(10)
        pool = llm._loop._scheduler.pool
        until(lambda: not llm._loop._jobs and pool.num_free == pool.num_blocks)
        assert llm.generate(prompts[0], greedy(4)).outputs[0].token_ids == Truth(model).greedy(prompts[0], 4)
    gc.collect()
    assert not list(world.engines) and not list(world.contexts)


def test_a_start_that_fails_leaves_nothing(model: Path, cache: Path, world: World) -> None:
    world.free_bytes = 1000
    with pytest.raises(ConfigError, match=r"no room for one block of 64 tokens"):
        make(model, cache)
    gc.collect()
    assert not list(world.engines) and not list(world.contexts)
    block = 64 * 3 * 2 * 2 * 64 * 4  # layers, keys and values, heads, channels, bytes
    world.free_bytes = 5 * block
    with make(model, cache) as llm:
        assert llm._loop._engine.num_blocks == 5


# ---- refusals


def described(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Let every plan say something else of itself."""

    def read(folder: Path) -> tuple[bytes, PlanInfo]:
        plan, info = read_plan(folder)
        return plan, replace(info, **fields)

    monkeypatch.setattr("llmapi._runtime.load_tensorrt.read_plan", read)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"targets": ["sm90"]}, ConfigError, r"is for sm90, and this is a GPU \(sm89\): .*build it again here"),
        ({"version": "10.14.1"}, ConfigError, "built by tensorrt 10.14.1, and tensorrt 10.15.0 is installed"),
        ({"attention": "native"}, ConfigError, "by the native path, and plans of tensorrt by the plugin path"),
        ({"block_size": 32}, CacheError, "the plan has blocks of 32 tokens, and the engine of 64: remove the entry"),
        ({"profiles": [{}] * len(BUCKETS)}, CacheError, "no buckets of a paged step"),
        ({"profiles": []}, CacheError, r"the plan and its description differ \(8 profiles\)"),
        ({"inputs": {}}, CacheError, "the plan and its description differ"),
    ],
)  # fmt: skip
def test_a_description_of_another_plan(
    fields: dict[str, Any], error: type[Exception], said: str, model: Path, cache: Path, world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    described(monkeypatch, **fields)
    with pytest.raises(error, match=said):
        make(model, cache)
    gc.collect()
    assert not list(world.engines) and not list(world.contexts)


def test_a_plan_for_smaller_steps(model: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make(model, tmp_path).close()
    [path] = tmp_path.rglob(PLAN_INFO_FILE)
    profiles = PlanInfo.parse(path.read_text()).profiles
    narrow = [{**p, "block_tables": [[rows, 2] for rows, _ in p["block_tables"]]} for p in profiles]
    described(monkeypatch, profiles=narrow)
    with pytest.raises(CacheError, match="is for sequences of 128 tokens, and max_seq_len is 200: remove the entry"):
        make(model, tmp_path)
    described(monkeypatch, profiles=[*profiles[:4], *profiles[3:4] * 4])
    with pytest.raises(CacheError, match=r"the plan is none for these limits \(a step of 48 tokens"):
        make(model, tmp_path)


def test_a_damaged_plan_is_built_again(model: Path, tmp_path: Path, world: World) -> None:
    make(model, tmp_path).close()
    [file] = tmp_path.rglob(PLAN_FILE)
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-7])
    with make(model, tmp_path) as llm:
        assert {p.name: p.note for p in llm.build_report.phases}["plan"] == "built"


@pytest.mark.parametrize(
    ("refuse", "error", "said"),
    [
        ("magic tag does not match", CacheError, r"cannot load the plan: magic tag does not match\. Remove the entry"),
        (
            "getPluginCreator could not find plugin: paged_attention version: 1", ConfigError,
            r"does not find llmapi's plugins, whose kernels the plan for sm89 carries: .*paged_attention.*build again",
        ),
    ],
)  # fmt: skip
def test_what_tensorrt_does_not_load(
    refuse: str, error: type[Exception], said: str, model: Path, cache: Path, world: World
) -> None:
    make(model, cache).close()
    world.refuse = refuse
    with pytest.raises(error, match=said):
        make(model, cache)


def test_what_is_refused_before_anything_is_fetched(
    model: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="target=sm89: tensorrt builds for the GPU at hand only; leave target out"):
        make(model, tmp_path, target="sm89")
    small = tiny_checkpoint(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"heads have 16 channels, and llmapi's plugins .* take 64, 80.*tensorrt-rtx"):
        make(small, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"block_size=16: plans of the full TensorRT have blocks of 64 tokens"):
        make(model, tmp_path / "cache", kv_cache_config={"block_size": 16})
    monkeypatch.setattr("llmapi._device.cuda_capability", lambda: (7, 0))
    with pytest.raises(ConfigError, match=r"a GPU has compute capability 7\.0, and llmapi's plugins need 7\.5"):
        make(model, tmp_path / "cache")
    monkeypatch.setattr("llmapi._device.cuda_visible", lambda: False)
    with pytest.raises(
        ConfigError, match=r"for the GPU that it is built on, and this machine has no NVIDIA GPU .*on one"
    ):
        refuse_ahead(())
    with pytest.raises(ConfigError, match="Use backend='cpu', or install tensorrt-rtx-cu13"):
        make(model, tmp_path / "cache")
    assert not (tmp_path / "cache" / "v1").exists() or not list((tmp_path / "cache" / "v1").rglob("*.plan"))


def test_limits_are_those_of_the_paged_cache(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmapi._build.tensorrt.package import load_package

    assert gpu_problem(load_package()) is None, "the doctor says that it runs"
    spec = replace(SPEC, head_dim=64)
    config = resolve(EngineOptions(backend="tensorrt"), spec)
    assert (config.block_size, config.dtype) == (64, "bfloat16")
    given = EngineOptions(backend="tensorrt", kv_cache=KvCacheConfig(block_size=64), dtype="float32")
    assert resolve(given, spec).block_size == 64
    monkeypatch.setattr("llmapi._device.cuda_capability", lambda: (7, 5))
    assert resolve(EngineOptions(backend="tensorrt"), spec).dtype == "float16"
    assert resolve(given, spec).dtype == "float32"
    with pytest.raises(ConfigError, match="needs a GPU of compute capability 8"):
        resolve(EngineOptions(backend="tensorrt", dtype="bfloat16"), spec)


def test_weights_come_to_addresses_that_tensorrt_takes(tmp_path: Path) -> None:
    """A tensor that does not lie at a multiple of 256 bytes is copied to one; here, on the CPU, of 64."""
    from llmapi._runtime.weights_cuda import _aligned

    whole = torch.arange(64, dtype=torch.float32)
    moved = _aligned(whole[3:40], 64)
    assert moved.data_ptr() % 64 == 0 and moved.tolist() == whole[3:40].tolist()
    assert _aligned(whole, 64).data_ptr() == whole.data_ptr() or whole.data_ptr() % 64


def test_rows_of_a_plan() -> None:
    """Parts lie in the same memory; what is put goes to its places; logits are those of the places asked for."""
    config = resolve(EngineOptions(backend="cpu"), SPEC)
    rows, more = (PlanRows.empty(count, SPEC, config, torch.device("cpu")) for count in (5, 2))
    for part, own in enumerate((rows, more)):
        for tensor in own.by_name.values():
            tensor.copy_(torch.arange(len(tensor))[:, None] + 10 * part)
    assert [x.shape[1] for x in rows.by_name.values()] == [SPEC.vocab_size, SPEC.hidden_size]
    rows.put([3, 1], more)
    states, logits = rows.first(4).projected([3, 2])
    assert states[:, 0].tolist() == [0, 11, 2, 10] and logits[:, 0].tolist() == [10, 2]
    assert states.data_ptr() == rows.hidden_states.data_ptr()
    assert rows.projected([])[1].shape == (0, SPEC.vocab_size)


def test_steps_on_contexts_that_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/gpu/test_engine_tensorrt_paged.py asks of a GPU, asked of the CPU: the test's own sums are right."""
    pinned = torch.zeros(1 << 12, dtype=torch.int32)
    world = World()

    class Device(TensorRTDevice):
        def __init__(self) -> None:
            self.device, self.name, self.driver = torch.device("cpu"), "none", 0

        def stream(self) -> Any:
            return world.stream()

        def pinned(self, count: int) -> torch.Tensor:
            return pinned[:count]

        def event(self) -> Any:
            return Event()

        def capture(self, run: Any) -> Any:
            return lambda: run(0)

        def synchronize(self) -> None:
            pass

    engine = echo_engine(Device(), lambda: EchoContext(on_cpu, lambda: None), monkeypatch)
    drive(engine, 12)
    assert sorted(engine._graphs) == [0, 1, 2]
    engine.close()
