"""Scores of given continuations and texts are those of transformers."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, CapacityError, ConfigError, Perplexity, PromptTooLongError, RequestError, SamplingParams, Score
from llmapi._runtime.scoring import windows
from tests.api.truth import Truth, idle, prompts_of, together, until
from tests.tiny import VOCAB

CLOSE = 1e-4


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def exact(truth: Truth, ids: list[int], count: int) -> tuple[list[float], list[bool]]:
    """Log probabilities of the last ``count`` ids, and whether each is the most probable."""
    rows = truth.logits(ids)[-count - 1 : -1].double().log_softmax(-1)
    own = [row[token].item() for row, token in zip(rows, ids[-count:], strict=True)]
    return own, [int(row.argmax()) == token for row, token in zip(rows, ids[-count:], strict=True)]


def check(score: Score, truth: Truth, context: list[int], continuation: list[int]) -> None:
    own, best = exact(truth, context + continuation, len(continuation))
    assert score.token_ids == continuation
    assert score.logprobs == pytest.approx(own, abs=CLOSE)
    assert score.logprob == pytest.approx(sum(own), abs=CLOSE * len(own))
    assert score.is_greedy == all(best)


def test_pairs_of_every_length(llm: LLM, truth: Truth) -> None:
    """Contexts shorter and longer than a chunk; continuations that greedy decoding gives, and others."""
    rng = random.Random(1)
    contexts = prompts_of([1, 2, 8, 9, 30, 200, 450, 7, 16], seed=2)
    continuations = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 40]))] for _ in contexts]
    for i in (0, 4, 7):
        continuations[i] = truth.greedy(contexts[i], len(continuations[i]))
    scores = llm.score(contexts, continuations)
    assert isinstance(scores, list) and len(scores) == len(contexts)
    for context, continuation, score in zip(contexts, continuations, scores, strict=True):
        check(score, truth, context, continuation)
    assert [i for i, s in enumerate(scores) if s.is_greedy] == [0, 4, 7]
    until(lambda: idle(llm))


def test_company_and_prefixes_change_nothing(llm: LLM, truth: Truth) -> None:
    """Beside requests that generate; blocks of the context are reused, rows of the continuation never left out."""
    [context] = prompts_of([100], seed=3)
    choices = [[9, 9, 9], [50, 60], [7]]
    beside = llm.generate_async(context, greedy(30))
    for _ in range(2):
        scores = llm.score(context, choices)
        assert isinstance(scores, list)
        for score, choice in zip(scores, choices, strict=True):
            check(score, truth, context, choice)
    pool = llm._loop._scheduler.pool
    before = pool.stats.hits
    check(llm.score(context, choices[0]), truth, context, choices[0])  # type: ignore[arg-type]
    assert pool.stats.hits - before == 99 // 8  # the row at 99 is wanted, so no block that holds it is taken
    check(llm.score(context[:50], context[50:]), truth, context[:50], context[50:])  # type: ignore[arg-type]
    assert beside.result(60).outputs[0].token_ids == truth.greedy(context, 30)


def test_preempted_scores(checkpoint: Path, cache: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that lose their blocks in the middle are completed, no row twice."""
    options: dict[str, Any] = {"max_batch_size": 8, "max_num_tokens": 8}
    with LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 120, "block_size": 8}, **options) as llm:
        lost: list[Any] = []
        schedule = llm._loop._scheduler.schedule

        def watched() -> Any:
            plan = schedule()
            lost.extend(() if plan is None else plan.preempted)
            return plan

        monkeypatch.setattr(llm._loop._scheduler, "schedule", watched)
        texts = prompts_of([60, 62, 64, 66], seed=4)
        with together(llm, 6):
            running = [llm.generate_async(p, greedy(40)) for p in prompts_of([20, 22], seed=5)]
            scores = llm.score([t[:10] for t in texts], [t[10:] for t in texts])
        assert isinstance(scores, list)
        for text, score in zip(texts, scores, strict=True):
            check(score, truth, text[:10], text[10:])
        for future in running:
            assert len(future.result(60).outputs[0].token_ids) == 40
        assert any(seq.request.probe is not None for seq in lost)
        until(lambda: idle(llm))


def test_texts_are_divided_where_the_prompt_ends(llm: LLM, truth: Truth) -> None:
    encode = lambda text: list(llm.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    whole, context = encode("the quick brown fox"), encode("the quick")
    pairs = [("the quick", " brown fox"), ("the quick ", "brown fox"), ({"prompt": "the quick"}, " brown fox")]
    for prompt, continuation in pairs:
        score = llm.score(prompt, continuation)
        assert isinstance(score, Score)
        check(score, truth, context, whole[len(context) :])
    check(llm.score("", "hello"), truth, [llm.tokenizer.bos_token_id], encode("hello"))  # type: ignore[arg-type]
    check(llm.score("the quick", encode(" fox")), truth, context, encode(" fox"))  # type: ignore[arg-type]
    shared = llm.score(["one", "two"], " three")
    assert isinstance(shared, list) and [s.token_ids for s in shared] == [encode(" three")] * 2
    assert llm.score([], []) == []


def test_the_longest_pair_and_one_more(llm: LLM, truth: Truth) -> None:
    most = llm._maker.max_seq_len + 1  # the last token is never run
    [ids] = prompts_of([most + 1], seed=6)
    score = llm.score(ids[: most - 5], ids[most - 5 : most])
    assert isinstance(score, Score) and len(score.logprobs) == 5
    with pytest.raises(
        PromptTooLongError, match=rf"more than the {most} that fit max_seq_len={most - 1}: give truncate=True"
    ):
        llm.score(ids[:-5], ids[-5:])
    cut = llm.score(ids[:-5], ids[-5:], truncate=True)
    same = llm.score(ids[1:-5], ids[-5:])
    assert isinstance(cut, Score) and isinstance(same, Score)
    assert cut.logprobs == pytest.approx(same.logprobs, abs=1e-5)
    with pytest.raises(PromptTooLongError):
        llm.score([5], ids, truncate=True)


def test_a_pair_that_is_longer_than_the_cache(checkpoint: Path, cache: Path) -> None:
    with LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 64, "block_size": 8}) as llm:
        for continuation, truncate, remedy in (
            ([6] * 3, False, "give truncate=True to drop the prompt's oldest"),
            ([6] * 65, True, "shorten the continuation"),
        ):
            with pytest.raises(
                CapacityError, match=f"than the 65 that fit a KV cache of 64 tokens: {remedy}, or give kv_cache_config"
            ):
                llm.score([5] * 80, continuation, truncate=truncate)
        assert isinstance(llm.score([5] * 80, [6] * 64, truncate=True), Score)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        (["a", "b"], ["c"], "1 continuations for 2 prompts"),
        ("a", "", "^the continuation is empty"),
        ([5, 6], [VOCAB], f"^continuation token {VOCAB} is not in the model's vocabulary"),
        ([VOCAB], [5], f"^prompt token {VOCAB} is not in the model's vocabulary"),
        (["a", "b"], ["c", ""], r"^prompts\[1\] and continuations\[1\]: the continuation is empty"),
        ("a", ["c", ""], r"^continuations\[1\]: the continuation is empty"),
        (["a", "b", None], "c", r"^prompts\[2\]: a prompt of type NoneType is not known"),
        ([5], "\ud800", "^the text is not valid Unicode"),
        (7, "a", "of type int"),
    ],
)
def test_what_cannot_be_scored(llm: LLM, prompts: Any, continuations: Any, message: str) -> None:
    with pytest.raises((ConfigError, RequestError), match=message):
        llm.score(prompts, continuations)
    with pytest.raises(ConfigError, match="truncate='yes': give True or False"):
        llm.score("a", "b", truncate="yes")  # type: ignore[arg-type]
    until(lambda: idle(llm))


def test_scoring_keeps_no_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of T rows, only those that predict the continuation are projected, and none of V numbers is kept."""
    sizes: list[int] = []
    engine = llm._loop._engine
    step = engine.step

    def watched(batch: Any, sampled: Any = None) -> torch.Tensor:
        out = step(batch, sampled)
        sizes.append(len(out))
        return out

    monkeypatch.setattr(engine, "step", watched)
    [ids] = prompts_of([300], seed=7)
    llm.score(ids[:280], ids[280:])
    assert sum(sizes) == 20


def test_seeds_of_others_do_not_count_scores(checkpoint: Path, cache: Path) -> None:
    texts = []
    for scores in (0, 3):
        with LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 512}) as llm:
            for _ in range(scores):
                llm.score("the quick", " brown")
            texts.append(llm.generate("one", SamplingParams(max_tokens=8)).outputs[0].token_ids)
    assert texts[0] == texts[1]


# ---- whole texts


def test_windows_score_each_token_once() -> None:
    rng = random.Random(8)
    for _ in range(300):
        ids = [rng.randrange(1000) for _ in range(rng.randrange(1, 50))]
        length = rng.randrange(1, 20)
        stride = rng.randrange(1, length + 1)
        done: list[int] = []
        whole = [-1, *ids]
        for run, targets in windows(ids, -1, length, stride):
            done += targets
            assert 0 < len(targets) <= len(run) <= length
            assert run == whole[len(done) - len(run) : len(done)]
            assert len(run) == min(length, len(done))  # as much context as there is
        assert done == ids


@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (16, None), (16, 4), (16, 1), (1, 1)])
def test_perplexity_is_that_of_transformers(llm: LLM, truth: Truth, max_length: int | None, stride: int | None) -> None:
    texts = prompts_of([1, 2, 15, 16, 17, 40], seed=9)
    found = llm.perplexity(texts, max_length=max_length, stride=stride)
    assert isinstance(found, list)
    for ids, one in zip(texts, found, strict=True):
        total = 0.0
        for run, targets in windows(ids, 0, max_length or 512, stride or max_length or 512):
            total += sum(exact(truth, [*run, targets[-1]], len(targets))[0])
        assert one.num_tokens == len(ids)
        assert one.logprob == pytest.approx(total, abs=CLOSE * len(ids))
        assert one.perplexity == pytest.approx(math.exp(-total / len(ids)), rel=1e-3)


def test_perplexity_of_texts(llm: LLM) -> None:
    one = llm.perplexity("the quick brown fox")
    assert isinstance(one, Perplexity)
    assert one == llm.perplexity(["the quick brown fox"])[0]  # type: ignore[index]
    for options in ({"max_length": 0}, {"max_length": 10**6}, {"stride": 0}, {"max_length": 8, "stride": 9}):
        with pytest.raises(ConfigError, match="give a whole number from 1 to"):
            llm.perplexity("a", **options)
    with pytest.raises(RequestError, match=r"^the prompt is empty"):
        llm.perplexity("")
    with pytest.raises(RequestError, match=r"^texts\[1\]: the prompt is empty"):
        llm.perplexity(["a", ""])
    with pytest.raises(RequestError, match=rf"^texts\[1\]: token {VOCAB} is not in the model's vocabulary"):
        llm.perplexity([[7], [7, VOCAB]])  # the last token is asked about and never run


def test_without_a_tokenizer(checkpoint: Path, cache: Path, truth: Truth) -> None:
    with LLM(checkpoint, cache_dir=cache, skip_tokenizer_init=True, kv_cache_config={"max_tokens": 512}) as llm:
        check(llm.score([5, 6], [7]), truth, [5, 6], [7])  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.score("", [7])
        with pytest.raises(RequestError, match="needs a tokenizer"):
            llm.score([5], "a")
        with pytest.raises(RequestError, match="nothing stands before the first token"):
            llm.perplexity([5, 6])
