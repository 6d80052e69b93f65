"""Hidden states and embeddings are those of transformers, for every family, alone and beside generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, ConfigError, PromptTooLongError, RequestError, SamplingParams
from tests.api.truth import Truth, idle, mixed_steps, prompts_of, until
from tests.tiny import tiny_checkpoint

CLOSE = 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_every_family(family: str, tmp_path: Path, cache: Path) -> None:
    folder = tiny_checkpoint(tmp_path / family, family)
    truth = Truth(folder)
    texts = prompts_of([1, 5, 16, 17, 60], seed=1)
    with LLM(folder, cache_dir=cache, max_batch_size=4, max_num_tokens=32, kv_cache_config={"max_tokens": 512}) as llm:
        exact = [truth.states(ids) for ids in texts]
        for own, theirs in zip(llm.encode(texts), exact, strict=True):
            torch.testing.assert_close(own, theirs, atol=CLOSE, rtol=CLOSE)
        pooled = {"last": [x[-1] for x in exact], "mean": [x.mean(0) for x in exact], "cls": [x[0] for x in exact]}
        for pooling, rows in pooled.items():
            found = llm.embed(texts, pooling, normalize=False)
            torch.testing.assert_close(found, torch.stack(rows), atol=CLOSE, rtol=CLOSE)
            unit = torch.nn.functional.normalize(torch.stack(rows))
            torch.testing.assert_close(llm.embed(texts, pooling), unit, atol=CLOSE, rtol=CLOSE)
        until(lambda: idle(llm))


def test_beside_generation_and_scores(llm: LLM, truth: Truth) -> None:
    """Steps in which some rows are hidden states and others logits."""
    prompts = prompts_of([40, 3, 20], seed=2)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    running = [llm.generate_async(p, greedy) for p in prompts]
    texts = prompts_of([300, 12, 513 - 16, 9], seed=3)
    with mixed_steps(llm, 7) as mixed:
        for _ in range(2):
            for own, ids in zip(llm.encode(texts), texts, strict=True):
                torch.testing.assert_close(own, truth.states(ids), atol=CLOSE, rtol=CLOSE)
            found = llm.embed(texts, normalize=False)
            torch.testing.assert_close(found[0], truth.states(texts[0])[-1], atol=CLOSE, rtol=CLOSE)
    assert mixed
    for prompt, future in zip(prompts, running, strict=True):
        output = future.result(60).outputs[0]
        assert output.token_ids == truth.greedy(prompt, 40)
        exact = truth.logprobs(prompt + output.token_ids)
        assert output.logprobs is not None
        for i, (token, told) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            assert told[token].logprob == pytest.approx(exact[len(prompt) - 1 + i, token].item(), abs=CLOSE)
    until(lambda: idle(llm))


def test_embeddings_project_nothing_to_the_vocabulary(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = llm._loop._engine.step_hidden
    monkeypatch.setattr(llm._loop._engine, "step_hidden", lambda *a: seen.append(a) or original(*a))
    assert llm.embed(prompts_of([300], seed=4)).shape == (1, 64)
    assert seen and all(not projected for _, _, projected in seen)
    assert sum(len(batch.logits_indices) for batch, _, _ in seen) == 1  # the last token's row alone


def test_a_long_text_takes_its_beginning_from_the_prefix_cache(llm: LLM, truth: Truth) -> None:
    [ids] = prompts_of([90], seed=5)
    llm.embed(ids)
    pool = llm._loop._scheduler.pool
    before = pool.stats.hits
    found = llm.embed(ids, normalize=False)
    assert pool.stats.hits - before == 89 // 8
    torch.testing.assert_close(found, truth.states(ids)[-1], atol=CLOSE, rtol=CLOSE)


def test_shapes_and_forms(llm: LLM) -> None:
    one = llm.embed("hello world")
    assert one.shape == (64,) and one.dtype == torch.float32 and not one.is_inference()
    assert one.norm().item() == pytest.approx(1, abs=1e-5)
    assert llm.embed([]).shape[0] == 0 and llm.encode([]) == []
    ids = list(llm.tokenizer("hello world")["input_ids"])
    torch.testing.assert_close(llm.embed({"prompt_token_ids": ids}), one)
    whole = llm.encode("hello world")
    assert isinstance(whole, torch.Tensor) and whole.shape == (len(ids), 64)
    torch.testing.assert_close(whole[-1] / whole[-1].norm(), one)


def test_what_cannot_be_embedded(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="unknown pooling 'men'; did you mean 'mean'"):
        llm.embed("a", "men")
    with pytest.raises(ConfigError, match="normalize=1: give True or False"):
        llm.embed("a", normalize=1)  # type: ignore[arg-type]
    for call in (llm.embed, llm.encode):
        with pytest.raises(RequestError, match=r"^texts\[1\]: the prompt is empty"):
            call(["a", ""])
        with pytest.raises(RequestError, match=r"^the prompt is empty"):
            call("")
        with pytest.raises(PromptTooLongError, match=r"^texts\[2\]: 513 tokens of a text are to be run"):
            call(["a", "b", [5] * 513])
        with pytest.raises(RequestError, match=r"^texts\[0\]: token 300 is not in the model's vocabulary"):
            call([[300]])
    with pytest.raises(
        PromptTooLongError, match=r"^texts\[0\]: 513 tokens of a text are to be run, and max_seq_len=512"
    ):
        llm.encode(prompts_of([513], seed=6))
    until(lambda: idle(llm))
