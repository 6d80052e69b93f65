"""What a request changes in its logits and asks to know of them, against transformers in float64."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, LLMAPIError, RequestError, SamplingParams
from tests.api.truth import Truth, idle, prompts_of, until
from tests.tiny import VOCAB

CLOSE = 2e-4  # absolute, for logits of about ten: float32 in another order of summation


@pytest.fixture(scope="module", params=["whole", "chunked"])
def either(request: pytest.FixtureRequest, llm: LLM, checkpoint: Path, cache: Path) -> Iterator[LLM]:
    """The LLM as it is, and one that computes prompts in chunks of five tokens."""
    if request.param == "whole":
        yield llm
        return
    with LLM(
        checkpoint,
        cache_dir=cache,
        max_batch_size=4,
        max_num_tokens=5,
        kv_cache_config={"max_tokens": 1024, "block_size": 8},
    ) as chunked:
        yield chunked


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


# ---- what is told


def test_logprobs_are_those_of_the_model(either: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([23], seed=11)
    output = either.generate(prompt, greedy(9, logprobs=4, repetition_penalty=1.3, logit_bias={17: 4.0}))
    done = output.outputs[0]
    exact = truth.logprobs(prompt + done.token_ids)[len(prompt) - 1 : -1]
    assert done.logprobs is not None and len(done.logprobs) == 9
    for row, token, told in zip(exact, done.token_ids, done.logprobs, strict=True):
        best = row.topk(4).indices.tolist()
        assert next(iter(told)) == token and set(told) == {token, *best}
        for i, entry in told.items():
            assert entry.logprob == pytest.approx(row[i].item(), abs=CLOSE)
            assert entry.rank == int((row > row[i]).sum()) + 1
            assert entry.decoded_token == either.tokenizer.decode([i])
    total = sum(row[t].item() for row, t in zip(exact, done.token_ids, strict=True))
    assert done.cumulative_logprob == pytest.approx(total, abs=9 * CLOSE)
    assert any(
        next(iter(e.values())).rank > 1 for e in done.logprobs
    )  # the edits had their way; these tell of the model


def test_logprobs_zero_tells_of_the_token_alone(llm: LLM) -> None:
    done = llm.generate("hello", greedy(3, logprobs=0)).outputs[0]
    assert done.logprobs is not None
    assert [list(e) for e in done.logprobs] == [[t] for t in done.token_ids]
    none = llm.generate("hello", greedy(3)).outputs[0]
    assert none.logprobs is None and none.cumulative_logprob is None


@pytest.mark.parametrize("length", [1, 2, 5, 6, 33])
def test_prompt_logprobs_are_those_of_the_model(either: LLM, truth: Truth, length: int) -> None:
    [prompt] = prompts_of([length], seed=12)
    told = either.generate(prompt, greedy(2, prompt_logprobs=3)).prompt_logprobs
    assert told is not None and len(told) == length and told[0] is None
    exact = truth.logprobs(prompt)
    for row, token, entry in zip(exact, prompt[1:], told[1:], strict=False):
        assert entry is not None and next(iter(entry)) == token
        assert set(entry) == {token, *row.topk(3).indices.tolist()}
        for i, one in entry.items():
            assert one.logprob == pytest.approx(row[i].item(), abs=CLOSE)
            assert one.rank == int((row > row[i]).sum()) + 1


@pytest.mark.parametrize("which", ["context", "generation", "both", True])
@pytest.mark.parametrize("length", [1, 5, 29])
def test_logits_are_those_of_the_model(either: LLM, truth: Truth, which: Any, length: int) -> None:
    [prompt] = prompts_of([length], seed=13)
    for _ in range(2):  # the second time the prefix is in the cache
        output = either.generate(prompt, greedy(6, return_logits=which, repetition_penalty=1.5))
        done = output.outputs[0]
        exact = truth.logits(prompt + done.token_ids)
        if which in ("context", "both"):
            assert output.prompt_logits is not None and output.prompt_logits.shape == (length, VOCAB)
            assert output.prompt_logits.dtype == torch.float32
            torch.testing.assert_close(output.prompt_logits, exact[:length], atol=CLOSE, rtol=0)
            output.prompt_logits += 1  # the user's own
        else:
            assert output.prompt_logits is None
        if which == "context":
            assert done.logits is None
        else:
            assert done.logits is not None and done.logits.shape == (6, VOCAB) and done.logits.dtype == torch.float32
            torch.testing.assert_close(done.logits, exact[length - 1 : -1], atol=CLOSE, rtol=0)
            done.logits += 1


def test_prompt_logits_in_spite_of_a_cached_prefix(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([40], seed=14)
    llm.generate(prompt, greedy(1))
    assert llm.generate(prompt, greedy(1)).num_cached_tokens > 0
    output = llm.generate(prompt, greedy(1, return_logits="context", prompt_logprobs=0))
    assert output.prompt_logits is not None and output.prompt_logprobs is not None
    torch.testing.assert_close(output.prompt_logits, truth.logits(prompt), atol=CLOSE, rtol=0)
    exact = truth.logprobs(prompt)
    for at in range(1, 40):
        assert output.prompt_logprobs[at][prompt[at]].logprob == pytest.approx(
            exact[at - 1, prompt[at]].item(), abs=CLOSE
        )


def test_n_sequences_each_have_their_own_logits(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([10], seed=15)
    params = SamplingParams(
        n=3, temperature=1.5, seed=5, max_tokens=5, ignore_eos=True, return_logits="both", logprobs=0
    )
    output = llm.generate(prompt, params)
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    for done in output.outputs:
        exact = truth.logits(prompt + done.token_ids)
        torch.testing.assert_close(done.logits, exact[9:-1], atol=CLOSE, rtol=0)
        logprobs = exact.double().log_softmax(-1)[9:-1]
        for row, token, told in zip(logprobs, done.token_ids, done.logprobs, strict=True):
            assert told[token].logprob == pytest.approx(row[token].item(), abs=CLOSE)


# ---- what is changed


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"logit_bias": {9: 3.0, 40: -100.0}}, {"sequence_bias": {(9,): 3.0, (40,): -100.0}}),
        ({"min_tokens": 20, "stop_token_ids": [196, 224, 81]}, {"min_new_tokens": 20, "eos_token_id": [196, 224, 81]}),
        ({"bad_words": ["mo", "q"]}, {"bad_words_ids": "encoded"}),
    ],
    ids=["repetition", "bias", "min_tokens", "bad_words"],
)
def test_edits_are_those_of_transformers(llm: LLM, truth: Truth, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    different = 0
    if theirs.get("bad_words_ids") == "encoded":
        texts = [v for w in ours["bad_words"] for v in (w, " " + w)]
        theirs = {"bad_words_ids": [llm.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]}
    options = {"eos": theirs.get("eos_token_id"), **{k: v for k, v in theirs.items() if k != "eos_token_id"}}
    for prompt in prompts_of([3, 14, 30, 50], seed=21):
        expected = truth.greedy(prompt, 40, **options)
        assert llm.generate(prompt, greedy(40, **ours)).outputs[0].token_ids == expected
        different += expected != truth.greedy(prompt, 40)
    if "bad_words" not in ours:
        assert different


def test_bad_words_of_several_tokens_never_appear(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([14], seed=22)
    plain = truth.greedy(prompt, 60)
    text = llm.tokenizer.decode(plain)
    pairs = [p for p in itertools.pairwise(plain) if "\ufffd" not in llm.tokenizer.decode(list(p))]
    words = [
        w for p in pairs
        if list(llm.tokenizer(w := llm.tokenizer.decode(list(p)), add_special_tokens=False)["input_ids"]) == list(p)
    ]  # fmt: skip
    assert words and all(w in text for w in words)
    done = llm.generate(prompt, greedy(60, bad_words=words)).outputs[0]
    assert done.token_ids != plain
    for word in words:
        ids = llm.tokenizer(word, add_special_tokens=False)["input_ids"]
        assert all(done.token_ids[i : i + len(ids)] != ids for i in range(60))


def test_presence_and_frequency_penalties_by_definition(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([8], seed=23)
    ids: list[int] = []
    for _ in range(30):
        logits = truth.logits(prompt + ids)[-1].double()
        for token, count in Counter(ids).items():
            logits[token] -= 1.5 + 0.7 * count
        ids.append(int(logits.argmax()))
    done = llm.generate(prompt, greedy(30, presence_penalty=1.5, frequency_penalty=0.7)).outputs[0]
    assert done.token_ids == ids != truth.greedy(prompt, 30)


def test_truncation_to_one_token_is_greedy(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([8], seed=24)
    expected = truth.greedy(prompt, 20)
    for option in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}):
        params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, **option)
        assert llm.generate(prompt, params).outputs[0].token_ids == expected, option


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 3.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02}],
    ids=str,
)
def test_draws_follow_the_distribution(llm: LLM, truth: Truth, options: dict[str, float]) -> None:
    [prompt] = prompts_of([8], seed=25)
    base = {"temperature": 2.0, **options}
    wanted = _truncated(truth.logits(prompt)[-1].double(), **base)
    params = SamplingParams(n=1024, seed=3, max_tokens=1, ignore_eos=True, **base)
    counts = Counter(o.token_ids[0] for o in llm.generate(prompt, params).outputs)
    assert sum(counts.values()) == 1024
    assert all(wanted[t] > 0 for t in counts)
    # Pearson's statistic over the tokens that are expected five times or more, and all others together
    frequent = [t for t in range(VOCAB) if wanted[t] * 1024 >= 5]
    cells = [(counts[t], wanted[t].item() * 1024) for t in frequent]
    rest = 1 - sum(wanted[t].item() for t in frequent)
    if rest > 1e-9:
        cells.append((1024 - sum(c for c, _ in cells), rest * 1024))
    assert len(cells) > 3
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def _truncated(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The distribution after temperature, top_k, top_p and min_p, one after the other, by definition."""
    probs = (logits / temperature).softmax(0)
    if top_k:
        probs[probs < probs.topk(top_k).values[-1]] = 0
        probs /= probs.sum()
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= top_p]] = 0
    probs /= probs.sum()
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


# ---- logits processors


def test_processors_of_both_arities(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([8], seed=26)
    seen: list[Any] = []

    def short(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((list(output), logits.clone()))
        logits[50] += 2  # in place, and given back
        return logits

    def full(prompt_ids: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert prompt_ids == prompt
        return logits * 2 - 1

    class Callable:
        def __call__(self, output: list[int], logits: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.arange(VOCAB) % 2 == 0, logits, -torch.inf)

    params = greedy(12, logits_processors=[short, full, Callable()], return_logits=True)
    done = llm.generate(prompt, params).outputs[0]
    assert [s[0] for s in seen] == [done.token_ids[:i] for i in range(12)]
    exact = truth.logits(prompt + done.token_ids)[7:-1]
    torch.testing.assert_close(torch.stack([s[1] for s in seen]), exact, atol=CLOSE, rtol=0)
    torch.testing.assert_close(done.logits, exact, atol=CLOSE, rtol=0)  # what is told is the model's own
    exact[:, 50] += 2
    exact[:, 1::2] = -torch.inf
    assert done.token_ids == exact.argmax(1).tolist()


def test_a_processor_that_raises_fails_only_its_own_request(llm: LLM, truth: Truth) -> None:
    def broken(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise KeyError("no such thing")
        return logits

    prompts = prompts_of([6, 9, 12], seed=27)
    params = [greedy(15), greedy(15, logits_processors=[broken]), greedy(15)]
    outputs = llm.generate(prompts, params)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert [o.outputs[0].token_ids for o in outputs[::2]] == [truth.greedy(p, 15) for p in prompts[::2]]
    assert outputs[1].outputs[0].token_ids == truth.greedy(prompts[1], 3)
    assert isinstance(outputs[1].error, RequestError) and outputs[0].error is None
    assert "broken" in str(outputs[1].error) and "KeyError: 'no such thing'" in str(outputs[1].error)
    with pytest.raises(RequestError, match="no such thing"):
        llm.generate(prompts[1], params[1])
    until(lambda: idle(llm))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda output, logits: None, "returned NoneType, not a torch.Tensor"),
        (lambda output, logits: logits[:-1], r"returned the shape \[299\]"),
        (lambda output, logits: logits.argmax(), r"returned the shape \[\]"),
        (lambda output, logits: logits * float("nan"), "NaN"),
        (lambda output, logits: logits - torch.inf, "no token is left of 300"),
        (lambda logits: logits, "has the signature"),
    ],
)
def test_a_processor_that_returns_nonsense(llm: LLM, processor: Any, message: str) -> None:
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=4, logits_processors=[processor])
        with pytest.raises(RequestError, match=message):
            llm.generate("hello", params)
    until(lambda: idle(llm))


def test_a_processor_that_ends_the_thread_ends_the_request(llm: LLM, truth: Truth) -> None:
    def leaves(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise SystemExit("bye")

    with pytest.raises(LLMAPIError, match="SystemExit: bye"):
        llm.generate_async("hello", greedy(4, logits_processors=[leaves])).result(30)
    [prompt] = prompts_of([6], seed=28)
    assert llm.generate_async(prompt, greedy(5)).result(30).outputs[0].token_ids == truth.greedy(prompt, 5)
