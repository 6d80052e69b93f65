"""The whole loop over the plugin path: text, logits and scores are transformers', whatever shares a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.padded_step import PaddedStep
from tests.api.beam_truth import by_transformers
from tests.api.truth import Truth, check_half, idle, mixed_steps, prompts_of, until
from tests.tensorrt.fake_paged_runtime import World
from tests.tensorrt.paged_llm import full_tensorrt, make
from tests.tensorrt.paged_models import SIZES
from tests.tiny import tiny_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def machine(offline_and_quiet: None) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, full_tensorrt(patch) as world:
        yield world


@pytest.fixture
def world(machine: World) -> World:
    machine.reset()
    return machine


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny_checkpoint(folder / family, family, **sizes) for family, sizes in SIZES.items()}


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def computed(world: World) -> int:
    """Tokens that were computed, padding not counted."""
    return sum(sum(counts) for counts, _ in world.steps)


@pytest.mark.parametrize("family", SIZES)
def test_text_is_that_of_transformers(family: str, checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    """Ten prompts over four sequences: shorter and longer than a step, beside decoding, and beside each other."""
    truth = Truth(checkpoints[family])
    prompts = prompts_of([3, 100, 1, 17, 48, 49, 130, 60, 9, 64], seed=4)
    with make(checkpoints[family], cache) as llm:
        world.reset()
        outputs = llm.generate(prompts, greedy(14, repetition_penalty=1.3))
        assert [o.outputs[0].token_ids for o in outputs] == [
            truth.greedy(p, 14, repetition_penalty=1.3) for p in prompts
        ]
        assert idle(llm) and llm._loop._scheduler.pool.num_blocks == 4 * 4
    assert any(len(counts) == 4 and set(counts) == {1} for counts, _ in world.steps), "decoded together"
    assert any(1 in counts and max(counts) > 1 for counts, _ in world.steps), "a prompt beside decoding"
    assert any(sum(c > 1 for c in counts) > 1 for counts, _ in world.steps), "prompts together"
    assert any(padding for _, padding in world.steps) and any(not padding for _, padding in world.steps)
    assert {how for how, _ in world.calls} == {"run", "capture", "replay", "wait"}
    assert {tokens for _, tokens in world.calls} - {0} <= {1, 2, 4, 8, 16, 32, 48}


def test_logits_of_prompts_and_output(checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    """A prompt of several chunks, whose every row is wanted, beside one whose last row is."""
    truth = Truth(checkpoints["qwen2"])
    first, second = prompts_of([110, 20], seed=6)
    with make(checkpoints["qwen2"], cache) as llm:
        outputs = llm.generate([first, second], [greedy(5, return_logits="both"), greedy(9)])
        [whole, other] = outputs
        exact = truth.logits(first + whole.outputs[0].token_ids)
        assert whole.prompt_logits is not None and whole.outputs[0].logits is not None
        torch.testing.assert_close(whole.prompt_logits, exact[:110], atol=2e-4, rtol=0)
        torch.testing.assert_close(whole.outputs[0].logits, exact[109:114], atol=2e-4, rtol=0)
        assert other.outputs[0].token_ids == truth.greedy(second, 9)


def test_a_sequence_may_fill_all_that_it_can_have(checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    """The longest sequences, where the last block is full and where it is not."""
    truth = Truth(checkpoints["llama"])
    for limit in (200, 128):
        lengths = [limit - 6, limit - 2, limit - 1, 63]
        prompts = prompts_of(lengths, seed=8)
        counts = (6, 2, 1, 5)
        with make(checkpoints["llama"], cache, max_seq_len=limit) as llm:
            outputs = llm.generate(prompts, [greedy(n) for n in counts])
            for prompt, output, count in zip(prompts, outputs, counts, strict=True):
                assert output.outputs[0].token_ids == truth.greedy(prompt, count)


def test_a_known_beginning_is_not_computed_again(checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    truth = Truth(checkpoints["mistral"])
    [start, *ends] = prompts_of([130, 5, 9], seed=1)
    with make(checkpoints["mistral"], cache) as llm:
        for again, end in enumerate(ends):
            world.reset()
            output = llm.generate(start + end, greedy(6))
            assert output.outputs[0].token_ids == truth.greedy(start + end, 6)
            assert computed(world) == len(start + end) + 5 - 128 * again
    with make(checkpoints["mistral"], cache, enable_prefix_caching=False) as llm:
        for end in ends:
            world.reset()
            assert llm.generate(start + end, greedy(6)).outputs[0].token_ids == truth.greedy(start + end, 6)
            assert computed(world) == len(start + end) + 5


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The block copies of the steps to come."""
    copies: list[tuple[int, int]] = []
    fill = PaddedStep.fill

    def spy(self: PaddedStep, memory: Any, batch: StepBatch) -> None:
        copies.extend(batch.copies)
        fill(self, memory, batch)

    monkeypatch.setattr(PaddedStep, "fill", spy)
    return copies


def test_several_sequences_of_one_prompt_share_its_blocks(
    checkpoints: dict[str, Path], cache: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = spied(monkeypatch)
    [prompt, other] = prompts_of([70, 5], seed=2)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    with make(checkpoints["llama"], cache) as llm, LLM(checkpoints["llama"], cache_dir=cache, backend="cpu") as cpu:
        world.reset()
        ours, theirs = (engine.generate([prompt, other], [params, greedy(20)]) for engine in (llm, cpu))
        assert [o.token_ids for o in ours[0].outputs] == [o.token_ids for o in theirs[0].outputs]
        assert ours[1].outputs[0].token_ids == theirs[1].outputs[0].token_ids
        assert len({tuple(o.token_ids) for o in ours[0].outputs}) == 3
        assert len(copies) == 2, "two of the three got a copy of the last, partial block"
        assert computed(world) == 70 + 3 * 11 + 5 + 19
        assert idle(llm)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_beams(
    family: str, checkpoints: dict[str, Path], cache: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two searches and a greedy request in one batch; beams fork in the middle of a block and at its end."""
    copies = spied(monkeypatch)
    truth = Truth(checkpoints[family])
    prompts = prompts_of([60, 12, 30], seed=9)
    search = SamplingParams(use_beam_search=True, beam_width=2, n=2, max_tokens=9, ignore_eos=True, detokenize=False)
    wide = SamplingParams(use_beam_search=True, beam_width=3, n=1, max_tokens=6, ignore_eos=True, detokenize=False)
    with make(checkpoints[family], cache) as llm:
        outputs = llm.generate(prompts, [search, wide, greedy(8)])
        assert idle(llm)
    for prompt, output, width, count, n in zip(prompts, outputs, (2, 3), (9, 6), (2, 1), strict=False):
        expected = by_transformers(truth, prompt, width, count=count, eos=[], n=n)
        assert [o.token_ids for o in output.outputs] == [ids for ids, _ in expected]
        assert [o.score for o in output.outputs] == pytest.approx([score for _, score in expected], abs=1e-3)
    assert outputs[2].outputs[0].token_ids == truth.greedy(prompts[2], 8)
    assert copies


def test_a_sequence_without_room_is_computed_again(checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    """Four sequences that grow to two blocks each, over six."""
    truth = Truth(checkpoints["llama"])
    prompts = prompts_of([50, 52, 54, 56], seed=3)
    with make(checkpoints["llama"], cache, blocks=6) as llm:
        assert llm._loop._engine.num_blocks == 6
        world.reset()
        outputs = llm.generate(prompts, greedy(30))
        assert [o.outputs[0].token_ids for o in outputs] == [truth.greedy(p, 30) for p in prompts]
        assert computed(world) > sum(len(p) + 29 for p in prompts), "none was preempted"
        assert idle(llm)


def test_scores(checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    truth = Truth(checkpoints["gpt2"])
    [prompt, continuation] = prompts_of([55, 20], seed=8)
    with make(checkpoints["gpt2"], cache) as llm:
        score = llm.score(prompt, continuation)
        logprobs = truth.logprobs(prompt + continuation)[54:-1]
        exact = float(logprobs.gather(1, torch.tensor(continuation)[:, None]).sum())
        assert score.logprob == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype: str, checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    with make(checkpoints["qwen2"], cache, dtype=dtype) as llm:
        check_half(llm, checkpoints["qwen2"], prompts_of([33, 3, 110], seed=6), getattr(torch, dtype))


@pytest.mark.parametrize("family", SIZES)
def test_hidden_states(family: str, checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    """Of texts longer than a step, whose beginnings are kept the second time, beside requests that choose tokens."""
    truth = Truth(checkpoints[family])
    prompts = prompts_of([5, 40], seed=3)
    with make(checkpoints[family], cache) as llm:
        with mixed_steps(llm, 4) as mixed:
            running = [llm.generate_async(p, greedy(14)) for p in prompts]
            for _ in range(2):
                truth.check_probes(llm, *prompts_of([140, 9], seed=8), 2e-3)
        assert mixed
        assert [f.result(60).outputs[0].token_ids for f in running] == [truth.greedy(p, 14) for p in prompts]
        until(lambda: idle(llm))


def test_a_second_start_finds_everything(checkpoints: dict[str, Path], tmp_path: Path, world: World) -> None:
    texts = []
    for start in range(2):
        with make(checkpoints["llama"], tmp_path) as llm:
            report = llm.build_report
            notes = {p.name: p.note for p in report.phases}
            assert notes["plan"] == ("cache hit" if start else "built") and report.cached == bool(start)
            assert list(report.keys) == ["tokenizer", "weights", "graph", "engine", "plan"]
            assert notes["load"] == "16 KV blocks of 64 tokens"
            texts.append(llm.generate("hello world", greedy(5)).text)
    assert texts[0] == texts[1]
    assert {e.name for e in (tmp_path / "v1").iterdir()} >= {"plan"}
    assert not list(tmp_path.rglob("*runtime*")), "full TensorRT makes nothing at run time that could be kept"


def test_a_saved_engine_runs(checkpoints: dict[str, Path], cache: Path, tmp_path: Path, world: World) -> None:
    """Its plan is not saved: it is built, or found, where it is loaded."""
    with make(checkpoints["qwen2"], cache) as llm:
        text = llm.generate("hello world", greedy(5)).text
        llm.save(tmp_path / "saved")
    for _ in range(2):
        with make(tmp_path / "saved", tmp_path / "cache") as llm:
            assert llm.generate("hello world", greedy(5)).text == text
    assert llm.build_report.cached


def test_auto_never_takes_it(checkpoints: dict[str, Path], cache: Path, world: World) -> None:
    from llmapi._device import cuda_problem

    assert cuda_problem() is not None
    with LLM(checkpoints["llama"], cache_dir=cache) as llm:
        assert llm._prepared.config.backend == "cpu"
