"""Several samples of one prompt share its blocks, and best_of returns the most probable of them."""

from __future__ import annotations

from typing import Any

import pytest

from llmapi import LLM, ConfigError, SamplingParams
from tests.api.truth import Truth, idle, prompts_of, until


def test_the_best_of_many(llm: LLM, truth: Truth) -> None:
    """The same sequences as n=12 draws, the three most probable of them first."""
    [prompt] = prompts_of([20], seed=1)
    common: dict[str, Any] = {"seed": 5, "max_tokens": 12, "temperature": 1.5, "ignore_eos": True}
    everything = llm.generate(prompt, SamplingParams(n=12, logprobs=0, **common)).outputs
    best = llm.generate(prompt, SamplingParams(n=3, best_of=12, **common)).outputs
    ranked = sorted(everything, key=lambda o: -(o.cumulative_logprob or 0))
    assert [o.token_ids for o in best] == [o.token_ids for o in ranked[:3]]
    assert [o.index for o in best] == [0, 1, 2] and all(o.logprobs is None for o in best)
    for output in best:
        exact = truth.logprobs(prompt + output.token_ids)[19:-1]
        total = sum(row[t].item() for row, t in zip(exact, output.token_ids, strict=True))
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
    with_logprobs = llm.generate(prompt, SamplingParams(n=3, best_of=12, logprobs=2, **common)).outputs
    assert [o.token_ids for o in with_logprobs] == [o.token_ids for o in best]
    assert all(o.logprobs is not None and all(len(e) in (2, 3) for e in o.logprobs) for o in with_logprobs)
    until(lambda: idle(llm))


def test_best_of_as_many_as_are_returned_is_n(llm: LLM) -> None:
    [prompt] = prompts_of([9], seed=2)
    common: dict[str, Any] = {"seed": 5, "max_tokens": 6, "ignore_eos": True}
    plain = llm.generate(prompt, SamplingParams(n=4, **common)).outputs
    same = llm.generate(prompt, SamplingParams(n=4, best_of=4, **common)).outputs
    assert [o.token_ids for o in plain] == [o.token_ids for o in same]
    assert all(o.cumulative_logprob is None for o in same)


def test_streams_show_the_best_so_far(llm: LLM) -> None:
    params = SamplingParams(n=2, best_of=6, seed=1, max_tokens=8, ignore_eos=True)
    states = list(llm.stream("hello", params))
    for state in states:
        totals = [o.cumulative_logprob for o in state.outputs]
        assert len(totals) == 2 and totals == sorted(totals, reverse=True)  # type: ignore[type-var]
    assert [o.token_ids for o in states[-1].outputs] == [o.token_ids for o in llm.generate("hello", params).outputs]


@pytest.mark.parametrize("params", [{"n": 12}, {"n": 2, "best_of": 12}], ids=str)
def test_samples_share_the_blocks_of_the_prompt(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    """Blocks of 8 tokens: 12 whole ones of the prompt once, and for each sample a tail and what it appends."""
    pool, engine = llm._loop._scheduler.pool, llm._loop._engine
    until(lambda: idle(llm))
    used: list[int] = []
    step = engine.step

    def watched(*args: Any) -> Any:
        used.append(pool.num_blocks - pool.num_free)
        return step(*args)

    monkeypatch.setattr(engine, "step", watched)
    [prompt] = prompts_of([100], seed=3)
    output = llm.generate(prompt, SamplingParams(seed=4, max_tokens=13, ignore_eos=True, **params))
    assert len({tuple(o.token_ids) for o in output.outputs}) == params["n"]
    # the last token of a sample is never written: 112 positions are 14 blocks, of which 12 are shared
    assert used[0] == 13 and max(used) == 12 + 12 * 2
    assert used[1] == 12 + 12  # each has a copy of the tail as soon as it writes to it
    until(lambda: idle(llm))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 3, "best_of": 2}, "best_of=2 is out of range: give a whole number from 3 to 1024"),
        ({"best_of": 1025}, "best_of=1025 is out of range"),
        ({"best_of": 2.0}, "best_of=2.0: give a whole number"),
        ({"best_of": 4, "temperature": 0}, "best_of=4 with temperature=0 would compare equal sequences"),
    ],
)
def test_what_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**params)
