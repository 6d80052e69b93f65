"""Many requests at once: chunked prefill, preemption, prefix reuse and threads change no token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, LLMAPIError, RequestOutput, SamplingParams
from tests.api.truth import Gate, Truth, idle, prompts_of
from tests.tiny import tiny_checkpoint

FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": 11}, "qwen2": {}, "gpt2": {}}
LENGTHS = [1, 60, 2, 17, 100, 8, 33, 5, 90, 3, 47, 16, 71, 1, 25, 9]
TIGHT = {"max_batch_size": 16, "max_num_tokens": 24, "kv_cache_config": {"max_tokens": 192, "block_size": 8}}


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def ids_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


def preemptions(outputs: list[RequestOutput]) -> int:
    return sum(o.metrics.preemptions for o in outputs if o.metrics is not None)


@pytest.fixture(scope="module")
def tight(checkpoint: Path, cache: Path) -> Iterator[LLM]:
    """The tiny llama with so little KV memory that a batch cannot stay in it, and prompts computed in chunks."""
    with LLM(checkpoint, cache_dir=cache, **TIGHT) as llm:
        yield llm


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_crowded_batch_is_greedy_too(
    family: str, caching: bool, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> None:
    folder, truth = _family(family, tmp_path_factory)
    prompts = prompts_of(LENGTHS, seed=31)
    params = [greedy(20 + i, repetition_penalty=1.6) for i in range(16)]
    with LLM(folder, cache_dir=cache, enable_prefix_caching=caching, **TIGHT) as llm:
        outputs = llm.generate(prompts, params)
        assert preemptions(outputs) > 0
        expected = [truth.greedy(p, 20 + i, repetition_penalty=1.6) for i, p in enumerate(prompts)]
        assert ids_of(outputs) == expected
        assert ids_of(llm.generate(prompts[::-1], params[::-1])) == expected[::-1]
        assert idle(llm)


_made: dict[str, tuple[Path, Truth]] = {}


def _family(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    if name not in _made:
        folder = tiny_checkpoint(tmp_path_factory.mktemp("families") / name, name, seed=3, **FAMILIES[name])
        _made[name] = folder, Truth(folder)
    return _made[name]


def test_a_shared_prefix_is_computed_once(checkpoint: Path, cache: Path, truth: Truth) -> None:
    [head, tail, other] = prompts_of([50, 9, 13], seed=32)
    with LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 1024, "block_size": 8}) as llm:
        first = llm.generate(head + tail, greedy(10))
        again = llm.generate(head + tail, greedy(10))
        branch = llm.generate(head + other, greedy(10))
        assert [first.num_cached_tokens, again.num_cached_tokens, branch.num_cached_tokens] == [0, 56, 48]
        assert first.outputs[0].token_ids == again.outputs[0].token_ids == truth.greedy(head + tail, 10)
        assert first.text == again.text
        assert branch.outputs[0].token_ids == truth.greedy(head + other, 10)
        longer = llm.generate(head + tail + first.outputs[0].token_ids, greedy(10))  # the answer is in the cache too
        assert longer.num_cached_tokens == 64
        assert longer.outputs[0].token_ids == truth.greedy(head + tail, 20)[10:]
    with LLM(checkpoint, cache_dir=cache, enable_prefix_caching=False) as llm:
        for _ in range(2):
            plain = llm.generate(head + tail, greedy(10))
            assert (plain.num_cached_tokens, plain.outputs[0].token_ids) == (0, first.outputs[0].token_ids)


def test_a_block_is_found_only_behind_its_own_prefix(llm: LLM, truth: Truth) -> None:
    a, b, c, d, tail = prompts_of([8, 8, 8, 8, 3], seed=42)
    for prompt, cached in ((a + b, 0), (c + d, 0), (a + d + tail, 8), (c + b + tail, 8), (a + b + tail, 16)):
        output = llm.generate(prompt, greedy(8))
        assert (output.num_cached_tokens, output.outputs[0].token_ids) == (cached, truth.greedy(prompt, 8))


def test_prefixes_in_one_batch_are_shared(llm: LLM, truth: Truth) -> None:
    [head, *tails] = prompts_of([64, 1, 4, 9, 17, 30], seed=33)
    llm.generate([*head, 5], greedy(1))
    outputs = llm.generate([head + t for t in tails], greedy(12))
    assert [o.num_cached_tokens >= 64 for o in outputs] == [True] * 5
    assert ids_of(outputs) == [truth.greedy(head + t, 12) for t in tails]


def test_many_more_requests_than_a_batch_holds(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([3 + i % 11 for i in range(120)], seed=34)
    outputs = llm.generate(prompts, greedy(6))
    assert ids_of(outputs) == [truth.greedy(p, 6) for p in prompts]
    assert idle(llm)


def test_n_samples_under_preemption(tight: LLM, llm: LLM) -> None:
    prompts = prompts_of([30, 45, 12, 7], seed=35)
    params = [
        SamplingParams(n=5, temperature=1.2, seed=i, max_tokens=60, ignore_eos=True, logprobs=0) for i in range(4)
    ]
    crowded, roomy = tight.generate(prompts, params), llm.generate(prompts, params)
    assert preemptions(crowded) > 0 and preemptions(roomy) == 0
    for a, b in zip(crowded, roomy, strict=True):
        assert [o.index for o in a.outputs] == list(range(5))
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
        assert [o.text for o in a.outputs] == [o.text for o in b.outputs]
        assert len({tuple(o.token_ids) for o in a.outputs}) == 5
    assert idle(tight) and idle(llm)


def test_n_samples_share_the_prompt(checkpoint: Path, cache: Path) -> None:
    [prompt] = prompts_of([120], seed=36)
    most_live = 0

    def watch(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        nonlocal most_live
        pool = llm._loop._scheduler.pool
        most_live = max(most_live, pool.num_blocks - pool.num_free)
        return logits

    with LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 2048, "block_size": 8}) as llm:
        params = SamplingParams(n=8, seed=1, max_tokens=10, ignore_eos=True, logits_processors=[watch])
        llm.generate(prompt, params)
        assert 15 + 8 <= most_live <= 15 + 8 * 3  # not 8 * 17


def test_prompt_logits_under_preemption(tight: LLM, truth: Truth) -> None:
    prompts = prompts_of([60, 50, 40, 30, 20], seed=37)
    outputs = tight.generate(prompts, greedy(60, return_logits="both", prompt_logprobs=1))
    assert preemptions(outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        done = output.outputs[0]
        exact = truth.logits(prompt + done.token_ids)
        torch.testing.assert_close(output.prompt_logits, exact[: len(prompt)], atol=2e-4, rtol=0)
        torch.testing.assert_close(done.logits, exact[len(prompt) - 1 : -1], atol=2e-4, rtol=0)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)


def test_generate_from_many_threads(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([4 + i for i in range(24)], seed=38)
    expected = [truth.greedy(p, 15) for p in prompts]
    texts = [llm.tokenizer.decode(p) for p in prompts]
    together = threading.Barrier(8)

    def work(worker: int) -> list[list[int]]:
        together.wait(20)
        llm.generate(texts[worker::8], greedy(3))  # tokenizers of several threads at work at once
        return ids_of(llm.generate(prompts[worker::8], greedy(15)))

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(work, range(8)))
    assert found == [expected[worker::8] for worker in range(8)]
    assert idle(llm)


def test_siblings_fail_together_and_alone(llm: LLM, truth: Truth) -> None:
    def broken(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 4:
            raise ValueError("enough")
        return logits

    [prompt, other] = prompts_of([9, 10], seed=39)
    several = SamplingParams(n=3, seed=2, max_tokens=20, ignore_eos=True, logits_processors=[broken])
    bad, good = llm.generate([prompt, other], [several, greedy(20)])
    assert [o.finish_reason for o in bad.outputs] == ["error"] * 3 and "enough" in str(bad.error)
    assert (good.error, good.outputs[0].token_ids) == (None, truth.greedy(other, 20))
    assert idle(llm)


def test_a_tokenizer_that_fails_fails_one_request(llm: LLM, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt, other] = prompts_of([9, 10], seed=40)
    poison = truth.greedy(prompt, 8)[5]
    tokenizer = llm._prepared.tokenizer
    assert tokenizer is not None and poison not in truth.greedy(other, 8)
    decode = tokenizer.decode

    def fails(ids: Any, *args: Any) -> str:
        if poison in ids:
            raise RuntimeError("cannot decode")
        return decode(ids, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode", fails)
        bad, good = llm.generate([prompt, other], greedy(8))
        assert isinstance(bad.error, LLMAPIError) and "cannot decode" in str(bad.error)
        assert (good.error, good.outputs[0].token_ids) == (None, truth.greedy(other, 8))
        first, eighth = Gate(1), Gate(8)
        future = llm.generate_async(prompt, greedy(50, logits_processors=[first, eighth]))
        assert first.reached.wait(20)
        future._skip_states()
        first.opened.set()
        assert eighth.reached.wait(20)
        future.abort()
        eighth.opened.set()
        with pytest.raises(LLMAPIError, match="cannot decode"):
            future.result(20)
    assert idle(llm)
    assert llm.generate(prompt, greedy(8)).outputs[0].token_ids == truth.greedy(prompt, 8)


def test_an_engine_that_fails_fails_what_runs_and_goes_on(
    llm: LLM, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of([9, 10], seed=41)

    def fails(*args: Any) -> Any:
        raise MemoryError("out of it")

    with monkeypatch.context() as patch:
        patch.setattr(llm._loop._engine, "step", fails)
        with pytest.raises(LLMAPIError, match="out of it"):
            llm.generate(prompts, greedy(8))
    assert idle(llm)
    assert ids_of(llm.generate(prompts, greedy(8))) == [truth.greedy(p, 8) for p in prompts]


def test_tokens_of_one_step_are_one_moment(llm: LLM) -> None:
    """With n sequences a step gives n tokens at one time."""
    output = llm.generate("hello world", SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True))
    assert output.metrics is not None and len(output.metrics.token_times) == 6
    assert output.metrics.token_times == sorted(output.metrics.token_times)
