"""LLM on a GPU: the same tokens as transformers, alone and in any company, with everything that sampling offers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmapi import LLM, SamplingParams
from tests.api.truth import Truth, idle, prompts_of, until
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", hidden_size=256)


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Truth:
    return Truth(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint: Path, cache: Path) -> Iterator[LLM]:
    kv = {"max_tokens": 4096, "block_size": 16}
    with LLM(
        checkpoint, backend="cuda", dtype="float32", cache_dir=cache, max_batch_size=16, kv_cache_config=kv
    ) as llm:
        yield llm


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def test_greedy_tokens_are_those_of_transformers(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([1, 5, 17, 40, 100, 3, 64, 33], seed=1)
    counts = [20, 1, 12, 33, 7, 2, 25, 18]
    outputs = llm.generate(prompts, [greedy(n) for n in counts], use_tqdm=False)
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.outputs[0].token_ids == truth.greedy(prompt, count)


def test_a_stop_token_ends_a_sequence_in_the_middle_of_a_batch(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([9, 10, 11, 12], seed=2)
    expected = [truth.greedy(p, 16) for p in prompts]
    stops = [e[5 + i] for i, e in enumerate(expected)]
    params = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop_token_ids=[s]) for s in stops]
    for output, ids, stop in zip(llm.generate(prompts, params, use_tqdm=False), expected, stops, strict=True):
        assert output.outputs[0].token_ids == ids[: ids.index(stop) + 1]
        assert output.outputs[0].finish_reason == "stop"
    until(lambda: idle(llm))


def test_seeded_text_does_not_depend_on_company(llm: LLM) -> None:
    prompts = prompts_of([6, 20, 35, 8, 50, 12], seed=3)
    params = [SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=i, max_tokens=24) for i in range(6)]
    alone = [llm.generate(p, s).outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    assert alone == together


def test_a_mix_of_everything_ends_with_every_block_free(llm: LLM, truth: Truth) -> None:
    rng = random.Random(4)
    prompts = prompts_of([rng.randint(1, 120) for _ in range(60)], seed=4)
    params, plain = [], []
    for i in range(60):
        kind = i % 6
        count = rng.randint(1, 30)
        if kind == 0:
            params.append(greedy(count))
            plain.append(i)
        elif kind == 1:
            params.append(SamplingParams(temperature=1.0, n=3, max_tokens=count, seed=i))
        elif kind == 2:
            params.append(SamplingParams(temperature=0.7, repetition_penalty=1.2, max_tokens=count, logprobs=3))
        elif kind == 3:
            params.append(SamplingParams(temperature=0, logit_bias={7: 5.0}, min_tokens=2, max_tokens=max(2, count)))
        elif kind == 4:
            params.append(SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=count))
        else:
            params.append(SamplingParams(temperature=1.2, min_p=0.05, presence_penalty=0.5, max_tokens=count))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(o.error is None for o in outputs)
    for i in plain:
        assert outputs[i].outputs[0].token_ids == truth.greedy(prompts[i], params[i].max_tokens or 0)
    until(lambda: idle(llm))


def test_more_tokens_than_blocks_preempt_and_go_on(checkpoint: Path, cache: Path, truth: Truth) -> None:
    kv = {"max_tokens": 256, "block_size": 16}
    with LLM(
        checkpoint, backend="cuda", dtype="float32", cache_dir=cache, max_batch_size=8, kv_cache_config=kv
    ) as small:
        prompts = prompts_of([20, 30, 25, 40, 22], seed=5)
        outputs = small.generate(prompts, greedy(60), use_tqdm=False)
        assert sum(o.metrics.preemptions for o in outputs if o.metrics) > 0
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == truth.greedy(prompt, 60)
        until(lambda: idle(small))


def test_prefixes_are_reused(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([80], seed=6)
    llm.generate(prompt, greedy(4))
    again = llm.generate(prompt, greedy(12))
    assert (again.num_cached_tokens or 0) >= 64
    assert again.outputs[0].token_ids == truth.greedy(prompt, 12)


def test_abort_in_the_middle(llm: LLM) -> None:
    stream = llm.stream(prompts_of([10], seed=7)[0], greedy(300))
    for seen, output in enumerate(stream):
        assert all(t >= 0 for t in output.outputs[0].token_ids)
        if seen == 5:
            llm.abort(output.request_id)
    assert output.outputs[0].finish_reason == "abort"
    until(lambda: idle(llm))


def test_guided_requests_beside_free_ones(llm: LLM, truth: Truth) -> None:
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    prompts = prompts_of([12, 30, 9, 7], seed=8)
    kind = {"regex": "[a-f]{3}-([0-9]|xy){2,4}!"}
    params = [
        greedy(20),
        SamplingParams(seed=1, max_tokens=30, guided_decoding=kind),
        SamplingParams(seed=2, max_tokens=30, guided_decoding=kind, n=4, best_of=8, top_k=20),
        SamplingParams(temperature=0, max_tokens=30, guided_decoding=kind, repetition_penalty=1.2, min_tokens=2),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == truth.greedy(prompts[0], 20)
    for output in outputs[1:]:
        assert all(re.fullmatch(kind["regex"], one.text) for one in output.outputs)
    alone = [llm.generate(p, s) for p, s in zip(prompts, params, strict=True)]
    assert [[o.text for o in a.outputs] for a in alone] == [[o.text for o in b.outputs] for b in outputs]
    until(lambda: idle(llm))


def test_scores_and_hidden_states_beside_generation(llm: LLM, truth: Truth) -> None:
    [prompt, text, other] = prompts_of([12, 300, 21], seed=9)
    running = llm.generate_async(prompt, greedy(60))
    for _ in range(2):
        truth.check_probes(llm, text, other, 1e-3)
    assert running.result(60).outputs[0].token_ids == truth.greedy(prompt, 60)
    until(lambda: idle(llm))


def test_close_leaves_nothing_on_the_gpu(checkpoint: Path, cache: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    other = LLM(checkpoint, backend="cuda", cache_dir=cache, max_batch_size=4, kv_cache_config={"max_tokens": 1024})
    other.generate(prompts_of([5])[0], greedy(5))
    assert torch.cuda.memory_allocated() > before
    other.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before  # less, where cuBLAS had kept something
