"""stream(): states that grow, end finished, and end the request when nobody reads on."""

from __future__ import annotations

import contextlib
import gc
import itertools
from typing import Any

import pytest
import torch

from llmapi import LLM, RequestError, SamplingParams
from tests.api.truth import Gate, Truth, idle, prompts_of, until


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def test_states_grow_and_the_last_is_the_answer(llm: LLM, truth: Truth) -> None:
    params = greedy(40, stop=["never said"], logprobs=1, return_logits="both")
    states = list(llm.stream("the quick brown fox", params))
    final = llm.generate("the quick brown fox", params)
    assert len(states) == 40
    for count, state in enumerate(states, 1):
        done = state.outputs[0]
        assert done.token_ids == final.outputs[0].token_ids[:count]
        assert done.logprobs is not None and len(done.logprobs) == count
        assert done.logits is not None and done.logits.shape[0] == count
        assert final.text.startswith(state.text)
        assert state.finished == done.finished == (count == 40)
        assert state.request_id == states[0].request_id
    for before, after in itertools.pairwise(states):
        assert after.text.startswith(before.text)
    assert states[-1].text == final.text
    assert states[-1].outputs[0].finish_reason == "length"
    assert sum(a.text != b.text for a, b in itertools.pairwise(states)) > 15  # a piece at a time


def test_a_stop_text_is_never_shown_in_part(llm: LLM) -> None:
    full = llm.generate("one two", greedy(60)).text
    at = next(
        i for i in range(10, len(full) - 3) if "\ufffd" not in full[i : i + 3] and full.find(full[i : i + 3]) == i
    )
    stop = full[at : at + 3]
    states = list(llm.stream("one two", greedy(60, stop=stop)))
    assert states[-1].text == full[:at] and states[-1].outputs[0].stop_reason == stop
    assert all(full[:at].startswith(s.text) for s in states)


def test_n_sequences_stream_together(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=12, ignore_eos=True)
    states = list(llm.stream("hello", params))
    final = llm.generate("hello", params)
    assert [o.token_ids for o in states[-1].outputs] == [o.token_ids for o in final.outputs]
    for state in states:
        for one, end in zip(state.outputs, final.outputs, strict=True):
            assert end.token_ids[: len(one.token_ids)] == one.token_ids
    assert [s.finished for s in states] == [False] * (len(states) - 1) + [True]


def test_two_streams_interleave(llm: LLM, truth: Truth) -> None:
    a, b = prompts_of([5, 9], seed=61)
    pairs = list(zip(llm.stream(a, greedy(15)), llm.stream(b, greedy(15)), strict=True))
    assert pairs[-1][0].outputs[0].token_ids == truth.greedy(a, 15)
    assert pairs[-1][1].outputs[0].token_ids == truth.greedy(b, 15)


@pytest.mark.parametrize("how", ["break", "raise", "close", "unread", "next"])
def test_leaving_early_ends_the_request(llm: LLM, how: str) -> None:
    gate = Gate(3)
    stream = llm.stream("hello", greedy(400, logits_processors=[gate]))
    before = llm._loop.steps
    if how == "break":
        for state in stream:
            if len(state.outputs[0].token_ids) == 2:
                break
        del state
    elif how == "raise":
        with contextlib.suppress(ZeroDivisionError):
            for _ in stream:
                1 / 0  # noqa: B018
    elif how == "close":
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert list(stream) == []
    elif how == "next":
        next(stream)
    del stream
    gc.collect()
    gate.opened.set()
    until(lambda: idle(llm))
    assert llm._loop.steps - before < 100


def test_an_interrupted_wait_ends_the_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def get(self) -> None:
            raise KeyboardInterrupt

    gate = Gate(3)
    stream = llm.stream("hello", greedy(400, logits_processors=[gate]))
    monkeypatch.setattr(stream, "_states", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    gate.opened.set()
    until(lambda: idle(llm))


def test_an_error_comes_out_of_the_stream(llm: LLM) -> None:
    def broken(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 2:
            raise ValueError("enough")
        return logits

    states = []
    with pytest.raises(RequestError, match="enough"):
        for state in llm.stream("hello", greedy(9, logits_processors=[broken])):
            states.append(state)
    assert [len(s.outputs[0].token_ids) for s in states] == [1, 2]
    with pytest.raises(RequestError, match="empty"):
        llm.stream("")


def test_abort_from_another_thread(llm: LLM, truth: Truth) -> None:
    gate = Gate(3)
    [prompt] = prompts_of([5], seed=62)
    stream = llm.stream(prompt, greedy(400, logits_processors=[gate]))
    first = next(stream)
    assert gate.reached.wait(20)
    llm.abort(first.request_id)
    gate.opened.set()
    *_, last = stream
    assert (last.finished, last.outputs[0].finish_reason, last.error) == (True, "abort", None)
    ids = last.outputs[0].token_ids
    assert 3 <= len(ids) < 100 and ids == truth.greedy(prompt, 400)[: len(ids)]
    until(lambda: idle(llm))


def test_abort_of_several_and_of_the_unknown(llm: LLM, truth: Truth) -> None:
    gate = Gate(2)
    prompts = prompts_of([5, 6, 7], seed=63)
    futures = [llm.generate_async(p, greedy(60, logits_processors=[gate])) for p in prompts]
    assert gate.reached.wait(20)
    llm.abort([futures[0].request_id or "", "no such request", futures[2].request_id or ""])
    llm.abort("no such request")
    llm.abort([])
    gate.opened.set()
    reasons = [f.result(20).outputs[0].finish_reason for f in futures]
    assert reasons == ["abort", "length", "abort"]
    assert futures[1].result().outputs[0].token_ids == truth.greedy(prompts[1], 60)
    llm.abort(futures[1].request_id or "")  # it has ended
    assert futures[1].result().outputs[0].finish_reason == "length"
    until(lambda: idle(llm))
