"""``LLM(..., backend="tensorrt")`` from plan to text, with the evaluator in the place of TensorRT's runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, CacheError, ConfigError, SamplingParams
from llmapi._build.graph import Graph
from llmapi._build.names import GRAPH_FILE
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.plan import PlanInfo, make_network
from llmapi._runtime import load_tensorrt as module
from llmapi._runtime.engine_tensorrt import TensorRTEngine
from llmapi._runtime.tensorrt_plan import LoadedPlan, refuse_misfits
from llmapi.models.transformer import constants
from tests.api.beam_truth import by_transformers
from tests.api.truth import Truth, check_half, mixed_steps, prompts_of
from tests.tensorrt.evaluator import Evaluator
from tests.tensorrt.fake_runtime import FakeEngine, no_stream
from tests.tensorrt.models import package
from tests.tiny import tiny_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "gpt2")


@dataclass
class Fakes:
    """What the fake runtime was asked to do."""

    engines: list[FakeEngine] = field(default_factory=list)
    caches: list[bytes | None] = field(default_factory=list)
    slots: int = 4


@pytest.fixture(autouse=True)
def everywhere(offline_and_quiet: None) -> None:
    """All tests here run so."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny_checkpoint(folder / family, family) for family in FAMILIES}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Loading goes its usual way, but for the device and TensorRT's own runtime."""
    made = Fakes()
    prepared: list[Any] = []
    found = package()

    class CpuDevice(module.TensorRTDevice):
        def __init__(self) -> None:
            self.device, self.name, self.driver = torch.device("cpu"), "a GPU", 13000

        def read_weights(self, graph: Graph, file: Any, done: Any) -> dict[str, torch.Tensor]:
            return {i.name: file.read(i.parts) for i in graph.inputs if i.kind == "weight"}

        def free_bytes(self, utilization: float) -> int:
            assert utilization == 0.9
            config, spec = prepared[-1].config, prepared[-1].spec
            return made.slots * spec.kv_bytes_per_token(4) * config.max_seq_len

        def stream(self) -> Any:
            return no_stream()

        def synchronize(self) -> None:
            pass

    def refuse(info: PlanInfo, pack: Package) -> None:
        refuse_misfits(info, pack, (8, 9), "a GPU")

    def open_fake(plan: bytes, info: PlanInfo, pack: Package, cache: Callable[[], bytes | None]) -> LoadedPlan:
        assert plan[:4] == b"vtrt" and pack == found
        refuse(info, pack)
        graph = Graph.parse((prepared[-1].engine / GRAPH_FILE).read_text())
        spec, config = prepared[-1].spec, prepared[-1].config
        builder, logger, net = make_network(found, graph, spec, config, constants(spec))
        engine = FakeEngine(found, Evaluator(found.trt, net.definition), info, (builder, logger, net))
        made.engines.append(engine)
        made.caches.append(cache())
        return LoadedPlan(found, engine, info, None, made.caches[-1])

    load = module.load_tensorrt

    def remember(asked: Any, *args: Any, **options: Any) -> TensorRTEngine:
        prepared.append(asked)
        return load(asked, *args, **options)

    monkeypatch.setattr("llmapi._runtime.tensorrt_plan.refuse_here", refuse)
    monkeypatch.setattr(module, "load_tensorrt", remember)
    monkeypatch.setattr(module, "TensorRTDevice", CpuDevice)
    monkeypatch.setattr(module, "open_plan", open_fake)
    return made


def make(checkpoint: Path, cache: Path, **options: Any) -> LLM:
    return LLM(
        checkpoint, backend="tensorrt", cache_dir=cache,
        **{"dtype": "float32", "max_seq_len": 96, "max_batch_size": 4, "max_num_tokens": 24, **options},
    )  # fmt: skip


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_transformers(family: str, checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    """Nine prompts over four rows, longer and shorter than a chunk, in flight together."""
    truth = Truth(checkpoints[family])
    prompts = prompts_of([3, 40, 1, 17, 24, 25, 2, 60, 9], seed=4)
    with make(checkpoints[family], cache) as llm:
        outputs = llm.generate(prompts, greedy(20, repetition_penalty=1.3))
        assert [o.outputs[0].token_ids for o in outputs] == [
            truth.greedy(p, 20, repetition_penalty=1.3) for p in prompts
        ]
        runs = fakes.engines[0].runs
        assert any(profile == 0 and shape[0] == 4 for profile, shape in runs), "decoded together"
        assert llm._loop._scheduler.watermark == 0, "every row may be taken"
        assert {shape for profile, shape in runs if profile == 1} <= {(1, n) for n in (16, 20, 24)}
        assert llm._loop._scheduler.pool.num_blocks == 4


def test_a_second_start_finds_plan_and_runtime_cache(
    checkpoints: dict[str, Path], tmp_path: Path, fakes: Fakes
) -> None:
    for start in range(2):
        with make(checkpoints["llama"], tmp_path) as llm:
            report = llm.build_report
            notes = {p.name: p.note for p in report.phases}
            assert notes["plan"] == ("cache hit" if start else "built")
            assert report.cached == bool(start)
            assert list(report.keys) == ["tokenizer", "weights", "graph", "engine", "plan"]
    assert fakes.caches == [None, b"kernels"]


def test_a_sequence_may_fill_its_row(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    """The last token that fits is chosen; idle rows of the same window write beside it."""
    truth = Truth(checkpoints["llama"])
    prompts = prompts_of([90, 94, 95, 2], seed=8)
    with make(checkpoints["llama"], cache) as llm:
        outputs = llm.generate(prompts, [greedy(6), greedy(2), greedy(1), greedy(30)])
        for prompt, output, count in zip(prompts, outputs, (6, 2, 1, 30), strict=True):
            assert output.outputs[0].token_ids == truth.greedy(prompt, count)


def test_several_sequences_of_one_prompt_fork_rows(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    with make(checkpoints["llama"], cache) as llm, LLM(checkpoints["llama"], cache_dir=cache, backend="cpu") as other:
        [prompt] = prompts_of([14], seed=2)
        params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
        ours, theirs = llm.generate(prompt, params), other.generate(prompt, params)
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
        assert len({tuple(o.token_ids) for o in ours.outputs}) > 1


def test_logits_of_prompts(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    truth = Truth(checkpoints["qwen2"])
    with make(checkpoints["qwen2"], cache) as llm:
        [prompt] = prompts_of([33], seed=6)
        output = llm.generate(prompt, greedy(3, return_logits="both"))
        exact = truth.logits(prompt + output.outputs[0].token_ids)
        assert output.prompt_logits is not None
        torch.testing.assert_close(output.prompt_logits, exact[:33], atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype: str, checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    with make(checkpoints["qwen2"], cache, dtype=dtype) as llm:
        check_half(llm, checkpoints["qwen2"], prompts_of([33, 3, 60], seed=6), getattr(torch, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_scores(family: str, checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    """Of texts of one chunk and of several, twice."""
    truth = Truth(checkpoints[family])
    with make(checkpoints[family], cache) as llm:
        for _ in range(2):
            truth.check_probes(llm, *prompts_of([70, 9], seed=8), 1e-3)
        assert llm.embed(prompts_of([3, 24], seed=9)).shape == (2, 64)


def test_hidden_states_beside_text(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    """Steps in which some rows are hidden states and others choose tokens."""
    truth = Truth(checkpoints["llama"])
    prompts, texts = prompts_of([5, 30], seed=3), prompts_of([20, 60, 7], seed=4)
    with make(checkpoints["llama"], cache) as llm:
        with mixed_steps(llm, 5) as mixed:
            running = [llm.generate_async(p, greedy(30)) for p in prompts]
            for own, ids in zip(llm.encode(texts), texts, strict=True):
                torch.testing.assert_close(own, truth.states(ids), atol=1e-3, rtol=1e-3)
        assert mixed
        assert [f.result(60).outputs[0].token_ids for f in running] == [truth.greedy(p, 30) for p in prompts]


def test_beams_over_slots(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    truth = Truth(checkpoints["qwen2"])
    [prompt] = prompts_of([12], seed=9)
    params = SamplingParams(use_beam_search=True, beam_width=2, max_tokens=6, ignore_eos=True, detokenize=False)
    with make(checkpoints["qwen2"], cache) as llm:
        output = llm.generate(prompt, params)
    [(ids, score), *_] = by_transformers(truth, prompt, 2, count=6, eos=[], n=1)
    assert output.outputs[0].token_ids == ids
    assert output.outputs[0].score == pytest.approx(score, abs=1e-3)


def test_one_row_serves_one_after_the_other(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    fakes.slots = 1
    truth = Truth(checkpoints["llama"])
    prompts = prompts_of([5, 30, 8], seed=3)
    with make(checkpoints["llama"], cache) as llm:
        outputs = llm.generate(prompts, greedy(8))
        assert [o.outputs[0].token_ids for o in outputs] == [truth.greedy(p, 8) for p in prompts]
        assert {shape[0] for _, shape in fakes.engines[0].runs} == {1}


def test_a_plan_whose_description_differs_is_refused(
    checkpoints: dict[str, Path], cache: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeEngine.__init__

    def fewer(self: FakeEngine, *args: Any) -> None:
        original(self, *args)
        self.num_optimization_profiles = 1

    monkeypatch.setattr(FakeEngine, "__init__", fewer)
    with pytest.raises(CacheError, match="remove the entry and build again"):
        make(checkpoints["llama"], cache)


def test_a_plan_for_another_gpu_is_refused(checkpoints: dict[str, Path], cache: Path, fakes: Fakes) -> None:
    with pytest.raises(ConfigError, match=r"is for sm120, and this is a GPU \(sm89\): build it with target='sm89'"):
        make(checkpoints["llama"], cache, target="sm120")


def test_a_cache_without_room_for_a_sequence_is_refused(
    checkpoints: dict[str, Path], cache: Path, fakes: Fakes
) -> None:
    fakes.slots = 0
    with pytest.raises(ConfigError, match="no room for one block of 96 tokens"):
        make(checkpoints["llama"], cache)


def test_without_a_gpu_the_start_says_what_the_plan_is_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    package()
    with pytest.raises(ConfigError, match=r"is for sm89, .* no NVIDIA GPU .* LLM\.build\(\) build plans without a GPU"):
        make(checkpoints["llama"], tmp_path, target="sm89")
    assert list(tmp_path.iterdir()) == [], "nothing is fetched, converted or built for it"
