"""Beam search on a GPU: float32 against transformers on the CPU, beside other requests, with kernels and graphs."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from tests._runtime.played import watch_tables
from tests.api.beam_truth import by_transformers
from tests.api.truth import Truth, idle, prompts_of, until
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.gpu


def test_beams_are_those_of_transformers(tmp_path: Path, cache: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "llama", hidden_size=256)
    truth = Truth(checkpoint)
    prompts = prompts_of([30, 3, 17, 90, 21, 8], seed=5)
    stop = truth.greedy(prompts[2], 6)[2]
    settings: list[tuple[int, int, list[int], dict[str, Any]]] = [
        (4, 20, [1], {}), (2, 30, [1], {}), (8, 25, [1, stop], {}), (3, 40, [1], {"repetition_penalty": 1.3}),
        (16, 9, [1], {}), (1, 20, [1], {}),
    ]  # fmt: skip
    params = [
        SamplingParams(use_beam_search=True, beam_width=w, n=w, max_tokens=t, stop_token_ids=ends[1:], **more)
        for w, t, ends, more in settings
    ]
    others = [SamplingParams(temperature=0, max_tokens=20), SamplingParams(seed=1, max_tokens=20)] * 2
    torch.backends.cuda.matmul.allow_tf32 = False
    kv = {"max_tokens": 4096, "block_size": 16}
    with LLM(
        checkpoint, backend="cuda", dtype="float32", cache_dir=cache, max_batch_size=64, kv_cache_config=kv
    ) as llm:
        outputs = llm.generate([*prompts, *prompts_of([9, 40, 5, 66])], [*params, *others], use_tqdm=False)
        assert llm._loop._sampler.candidates._select.launches > 10  # type: ignore[attr-defined]
        for prompt, (width, count, ends, more), output in zip(prompts, settings, outputs, strict=False):
            expected = by_transformers(truth, prompt, width, count=count, eos=ends, n=width, **more)
            assert [o.token_ids for o in output.outputs] == [ids for ids, _ in expected]
            for one, (_, score) in zip(output.outputs, expected, strict=True):
                assert score != score or one.score == pytest.approx(score, abs=1e-3)
        until(lambda: idle(llm))


@pytest.mark.parametrize("block_size", [16, 32])
def test_planning_ahead_changes_nothing(tmp_path: Path, cache: Path, block_size: int) -> None:
    """Searches of many widths beside greedy and sampled requests, through a pool that preempts, in both ways. Penalties
    have no part in it: they are computed by kernels in one way and by torch in the other, and ties may fall otherwise.
    What the host decides or reports has: texts that end beams, grammars, processors, log probabilities and logits.

    After each launch the device's tables are the host's, and every search but its first step is ahead.
    """
    checkpoint = tiny_checkpoint(tmp_path / "llama", hidden_size=256)
    truth = Truth(checkpoint)
    rng = random.Random(block_size)
    prompts = prompts_of([rng.randint(1, 60) for _ in range(40)], seed=block_size)
    params = []
    for i, prompt in enumerate(prompts):
        count, width = rng.randint(2, 50), rng.choice([1, 2, 3, 4, 8, 16])
        stops = rng.sample(sorted(set(truth.greedy(prompt, 8))), 1) if i % 3 == 0 else []
        if i % 4 == 3:
            params.append(SamplingParams(temperature=0.8 * (i % 8 == 3), seed=i, max_tokens=count))
        else:
            early: Any = rng.choice([True, False, "never"])
            edits: list[dict[str, Any]] = [
                {}, {},
                {"min_tokens": rng.randint(1, count)}, {"logit_bias": {9: 3.0, 12: -100.0}},
                {"stop": ["e", "th"]}, {"logprobs": 2}, {"logprobs": 0, "return_logits": "generation"},
                {"logits_processors": [lambda ids, x: x.roll(len(ids))]}, {"bad_words": ["ab", "the", " o"]},
            ]  # fmt: skip
            if importlib.util.find_spec("llguidance") is not None:
                edits += [{"guided_decoding": {"regex": "([a-e]{2,5}|[f-z]{7,9})"}, "logprobs": 1}] * 2
            params.append(
                SamplingParams(
                    use_beam_search=True, beam_width=width, n=width, max_tokens=count, stop_token_ids=stops,
                    early_stopping=early, **rng.choice(edits),
                )
            )  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = False
    kv = {"max_tokens": 2560, "block_size": block_size}
    with LLM(
        checkpoint, backend="cuda", dtype="float32", cache_dir=cache, max_batch_size=48, kv_cache_config=kv
    ) as llm:
        engine: Any = llm._loop._engine
        compared = watch_tables(llm, lambda row: engine._buffers.tables[row].tolist())
        ahead = llm.generate(prompts, params, use_tqdm=False)
        until(lambda: idle(llm))
        moved = engine._mover.launches
        assert moved > 50 and compared() > 500
        llm._loop.plans_beams_ahead = False
        plain = llm.generate(prompts, params, use_tqdm=False)
        assert engine._mover.launches == moved
        until(lambda: idle(llm))
    for one, other in zip(ahead, plain, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
        assert [o.finish_reason for o in one.outputs] == [o.finish_reason for o in other.outputs]
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert a.score == (None if b.score is None else pytest.approx(b.score, abs=1e-3))
            for entry, other_entry in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert list(entry) == list(other_entry)
                near = [pytest.approx(one.logprob, abs=1e-3) for one in other_entry.values()]
                assert [one.logprob for one in entry.values()] == near
            if b.logits is not None:
                torch.testing.assert_close(a.logits, b.logits, atol=1e-2, rtol=1e-3)


def test_launching_a_step_waits_for_nothing(tmp_path: Path, cache: Path) -> None:
    """While a step flies, nothing that launches the next one waits for the stream: PyTorch would raise."""
    checkpoint = tiny_checkpoint(tmp_path / "llama", hidden_size=256)
    search: dict[str, Any] = {"use_beam_search": True, "beam_width": 4, "max_tokens": 20, "ignore_eos": True}
    kinds: list[dict[str, Any]] = [
        {}, {"logprobs": 2, "return_logits": "generation"}, {"stop": ["no such text"]}, {"repetition_penalty": 1.2},
        {"bad_words": ["some words"], "frequency_penalty": 0.1, "logit_bias": {7: 1.0}},
    ]  # fmt: skip
    if importlib.util.find_spec("llguidance") is not None:
        kinds.append({"guided_decoding": {"regex": "[a-z ]*"}})
    params = [SamplingParams(**search, **kind) for kind in kinds]
    params += [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), SamplingParams(max_tokens=20, logprobs=1)]
    with LLM(checkpoint, backend="cuda", dtype="bfloat16", cache_dir=cache, max_batch_size=32) as llm:
        launch, checked = llm._loop._launch, 0

        def watched(plan: Any) -> Any:
            nonlocal checked
            if llm._loop._flight is None:
                return launch(plan)
            checked += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        prompts = prompts_of([9] * len(params), seed=2)
        llm.generate(prompts, params, use_tqdm=False)  # compiles and captures
        llm._loop._launch = watched  # type: ignore[method-assign]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert checked > 15 and all(o.finished for o in outputs)
