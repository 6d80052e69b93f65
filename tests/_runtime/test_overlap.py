"""The loop with steps in flight: planning a step before the last one's tokens are known changes no token.

The engine is the CPU's; what a GPU does is played: tokens stay in a tensor that the next step's references are filled
in from, and the host hears of them one step later.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, GuidedDecodingParams, SamplingParams
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine_cpu import CpuEngine
from llmapi._runtime.sampler import Sampled, Sampler, SampleRow
from tests.api.truth import idle, prompts_of, until
from tests.tiny import tiny_checkpoint


class Late:
    """Tokens that the host must not look at before it asks."""

    def __init__(self, sampled: list[Sampled]) -> None:
        self._sampled = sampled
        self.ids = torch.tensor([s.token_ids[0] if s.token_ids else -1 for s in sampled], dtype=torch.int32)

    def result(self) -> list[Sampled]:
        return self._sampled


class OverlappingSampler(Sampler):
    """Rows overlap unless they draw several tokens; the host must know what came before where it has a part in it."""

    def overlaps(self, row: SampleRow) -> bool:
        return row.count == 1

    def waits(self, row: SampleRow) -> bool:
        params = row.sequence.request.params
        host = params.logits_processors or params.repetition_penalty != 1 or params.guided_decoding or params.bad_words
        return row.count > 1 or bool(host)

    def start(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> Any:
        for row in rows:
            assert not row.sequence.finished, "a row that has ended is chosen for"
            if self.waits(row):
                assert all(t >= 0 for t in row.sequence.token_ids), "a row that needs the host meets a reference"
        return Late(self(logits, rows))


class OverlappingEngine(CpuEngine):
    """Fills in references as the GPU does."""

    filled = 0

    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        for i, token in enumerate(batch.input_ids):
            if token < 0:
                assert sampled is not None
                batch.input_ids[i] = max(0, int(sampled[~token]))
                OverlappingEngine.filled += 1
        return super().step(batch)

    def sampler(self, tokenizer: Any) -> Sampler:
        return OverlappingSampler(self.spec.vocab_size, tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


def start(checkpoint: Path, cache: Path, **options: Any) -> LLM:
    limits = {"max_batch_size": 6, "max_num_tokens": 40, "kv_cache_config": {"max_tokens": 8 * 24, "block_size": 8}}
    return LLM(checkpoint, cache_dir=cache, progress=False, backend="cpu", **(limits | options))


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_of_the_plain_loop(
    seed: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, sampled, stopping, forking and host-bound requests, more than fit at once, with preemption."""
    rng = random.Random(seed)
    prompts = prompts_of([rng.randint(1, 60) for _ in range(24)], seed)
    params = []
    for i in range(24):
        count = rng.randint(1, 40)
        options: dict[str, Any] = {"max_tokens": count, "seed": i, "temperature": rng.choice([0, 0.8])}
        if i % 5 == 1:
            options |= {"n": 2, "temperature": 0.9}
        if i % 5 == 2:
            options["repetition_penalty"] = 1.3
        if i % 5 == 3:
            options["stop"] = ["a", "e"]
        if i % 5 == 4:
            options["guided_decoding"] = GuidedDecodingParams(regex=rng.choice(["[a-z]{1,9}", "(yes|no)+", "[^x]*"]))
        if i % 7 == 4:
            options |= {"prompt_logprobs": 1, "logprobs": 2}
        if i % 7 == 5:
            options["bad_words"] = ["a b", "the"]
        params.append(SamplingParams(**options))
    with start(checkpoint, tmp_path) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    monkeypatch.setattr("llmapi._runtime.engine_cpu.CpuEngine", OverlappingEngine)
    OverlappingEngine.filled = 0
    with start(checkpoint, tmp_path) as llm:
        actual = llm.generate(prompts, params, use_tqdm=False)
        until(lambda: idle(llm))
    assert OverlappingEngine.filled > 50
    assert sum(o.metrics.preemptions for o in actual if o.metrics) > 0
    for a, e in zip(actual, expected, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in e.outputs]
        assert [c.text for c in a.outputs] == [c.text for c in e.outputs]
        assert [c.finish_reason for c in a.outputs] == [c.finish_reason for c in e.outputs]


@pytest.mark.parametrize(
    "options",
    [
        {"guided_decoding": GuidedDecodingParams(regex="[a-z ]{40,}")},
        {"logits_processors": [lambda ids, logits: logits]},
        {"bad_words": ["a b"]},
    ],
    ids=["guided", "processor", "bad_words"],
)
def test_a_row_that_needs_the_host_holds_no_step_back(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decoding step is launched before the tokens of the one before are known here, this row's, too."""
    monkeypatch.setattr("llmapi._runtime.engine_cpu.CpuEngine", OverlappingEngine)
    with start(checkpoint, tmp_path) as llm:
        plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        params = SamplingParams(temperature=0, max_tokens=30, min_tokens=30, **options)
        OverlappingEngine.filled = 0
        outputs = llm.generate(prompts_of([7, 5]), [plain, params])
        assert [len(o.outputs[0].token_ids) for o in outputs] == [30, 30]
        assert OverlappingEngine.filled == 2 * 29
        until(lambda: idle(llm))


def test_streams_and_aborts_never_show_a_reference(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmapi._runtime.engine_cpu.CpuEngine", OverlappingEngine)
    with start(checkpoint, tmp_path) as llm:
        params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        expected = llm.generate(prompts_of([7])[0], params).outputs[0].token_ids
        for leave in (1, 9):
            for seen, output in enumerate(llm.stream(prompts_of([7])[0], params)):
                ids = output.outputs[0].token_ids
                assert ids == expected[: len(ids)]
                if seen == leave:
                    llm.abort(output.request_id)
            assert output.outputs[0].finish_reason == "abort"
        until(lambda: idle(llm))


def test_a_failing_step_ends_its_requests_and_the_next_one_works(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmapi._runtime.engine_cpu.CpuEngine", OverlappingEngine)
    with start(checkpoint, tmp_path) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        [prompt] = prompts_of([7])
        expected = llm.generate(prompt, params).outputs[0].token_ids
        engine, calls = llm._loop._engine, []
        real = engine.step

        def failing(batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("the cable came loose")
            return real(batch, sampled)

        monkeypatch.setattr(engine, "step", failing)
        with pytest.raises(Exception, match="the cable came loose"):
            llm.generate(prompt, params)
        assert llm.generate(prompt, params).outputs[0].token_ids == expected
        until(lambda: idle(llm))
