"""generate_async() and astream(): from asyncio, from a notebook's running loop, and from plain threads."""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from llmapi import LLM, ConfigError, EngineClosedError, LLMAPIError, RequestError, SamplingParams
from llmapi._runtime.job import Job
from tests.api.truth import Gate, Truth, idle, prompts_of, until


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def run(coroutine: Any) -> Any:
    """Run it to its end; one that hangs fails."""

    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(limited())


def test_await_gives_the_answer(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([8], seed=71)

    async def main() -> None:
        future = llm.generate_async(prompt, greedy(12))
        assert not future.done()
        output = await future
        assert future.done() and output.finished
        assert output.outputs[0].token_ids == truth.greedy(prompt, 12)
        assert (await future).outputs[0].token_ids == output.outputs[0].token_ids  # again
        assert future.result(0).request_id == future.request_id == output.request_id

    run(main())


def test_many_at_once(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([2 + i % 13 for i in range(50)], seed=72)

    async def main() -> list[list[int]]:
        outputs = await asyncio.gather(*(llm.generate_async(p, greedy(10)) for p in prompts))
        return [o.outputs[0].token_ids for o in outputs]

    assert run(main()) == [truth.greedy(p, 10) for p in prompts]
    assert idle(llm)


def test_the_event_loop_goes_on(llm: LLM, truth: Truth) -> None:
    gate = Gate(2)
    [prompt] = prompts_of([8], seed=73)

    async def opener() -> None:
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        gate.opened.set()

    async def main() -> None:
        helper = asyncio.create_task(opener())  # runs only while the event loop is free
        output = await llm.generate_async(prompt, greedy(6, logits_processors=[gate]))
        assert output.outputs[0].token_ids == truth.greedy(prompt, 6)
        await helper

    run(main())


def test_async_for_sees_it_grow(llm: LLM, truth: Truth) -> None:
    async def main() -> None:
        texts, ids = [], []
        async for state in llm.generate_async("one two", greedy(20)):
            texts.append(state.text)
            ids.append(state.outputs[0].token_ids)
        assert [len(i) for i in ids] == list(range(1, 21))
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        expected = llm.generate("one two", greedy(20))
        assert (texts[-1], ids[-1]) == (expected.text, expected.outputs[0].token_ids)

    run(main())


def test_astream_sees_it_grow(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([5, 9, 30], seed=74)

    async def one(prompt: list[int]) -> list[int]:
        states = [s async for s in llm.astream(prompt, greedy(20))]
        assert [len(s.outputs[0].token_ids) for s in states] == list(range(1, 21))
        assert [s.finished for s in states] == [False] * 19 + [True]
        return states[-1].outputs[0].token_ids

    async def main() -> list[list[int]]:
        return list(await asyncio.gather(*(one(p) for p in prompts)))

    assert run(main()) == [truth.greedy(p, 20) for p in prompts]


def test_plain_calls_inside_a_running_loop(llm: LLM) -> None:
    """What a notebook does: an event loop runs, and the cell calls generate and stream as anywhere."""

    async def main() -> None:
        output = llm.generate("hello", greedy(5))
        assert list(llm.stream("hello", greedy(5)))[-1].text == output.text
        assert llm.generate_async("hello", greedy(5)).result(20).text == output.text

    run(main())


def test_two_event_loops_in_two_threads(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([3 + i for i in range(16)], seed=75)
    together = threading.Barrier(2)

    async def main(mine: list[list[int]]) -> list[list[int]]:
        together.wait(20)
        outputs = await asyncio.gather(*(llm.generate_async(p, greedy(12)) for p in mine))
        return [o.outputs[0].token_ids for o in outputs]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda half: run(main(prompts[half::2])), range(2)))
    assert found == [[truth.greedy(p, 12) for p in prompts[half::2]] for half in range(2)]


def test_one_future_awaited_by_many(llm: LLM) -> None:
    gate = Gate(2)
    future = llm.generate_async("hello", greedy(8, logits_processors=[gate]))

    async def main() -> list[str]:
        waiting = [asyncio.ensure_future(future) for _ in range(3)]
        await asyncio.sleep(0)
        gate.opened.set()
        return [o.text for o in await asyncio.gather(*waiting)]

    with ThreadPoolExecutor(4) as threads:
        plain = [threads.submit(future.result, 30) for _ in range(3)]
        texts = [*run(main()), *(p.result(30).text for p in plain)]
    assert texts == [llm.generate("hello", greedy(8)).text] * 6


def test_a_future_made_in_one_loop_is_awaited_in_another(llm: LLM) -> None:
    async def make() -> Any:
        return llm.generate_async("hello", greedy(8))

    async def wait(future: Any) -> Any:
        return await future

    future = run(make())
    assert run(wait(future)).text == llm.generate("hello", greedy(8)).text


@pytest.mark.parametrize("wrong", ["x", "5", b"", [1], True, float("nan")])
def test_a_timeout_that_is_no_number(llm: LLM, wrong: Any) -> None:
    future = llm.generate_async("hello", greedy(3))
    with pytest.raises(ConfigError, match=rf"^timeout={re.escape(repr(wrong))}: give a number of seconds, or None"):
        future.result(wrong)
    assert future.result(10**400).finished and future.result(float("inf")).finished  # for ever


def test_result_gives_up_and_the_request_goes_on(llm: LLM, truth: Truth) -> None:
    gate = Gate(2)
    [prompt] = prompts_of([6], seed=76)
    future = llm.generate_async(prompt, greedy(8, logits_processors=[gate]))
    with pytest.raises(TimeoutError, match=r"0\.05 s; the request goes on"):
        future.result(timeout=0.05)
    assert not future.done()
    gate.opened.set()
    assert future.result(30).outputs[0].token_ids == truth.greedy(prompt, 8)


def test_the_limit_of_result_is_for_all_of_it(llm: LLM) -> None:
    """States that keep coming do not renew the limit."""
    slow = threading.Event()

    def wait(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        slow.wait(0.02)
        return logits

    future = llm.generate_async("hello", greedy(200, logits_processors=[wait]))
    with pytest.raises(TimeoutError):
        future.result(timeout=0.2)
    slow.set()
    future.abort()
    assert future.result(30).outputs[0].finish_reason == "abort"
    until(lambda: idle(llm))


def test_abort_through_the_future(llm: LLM) -> None:
    gate = Gate(3)
    future = llm.generate_async("hello", greedy(400, logits_processors=[gate]))
    assert gate.reached.wait(20)
    future.abort()
    gate.opened.set()
    output = future.result(20)
    assert output.outputs[0].finish_reason == "abort" and output.finished
    future.abort()
    until(lambda: idle(llm))


@pytest.mark.parametrize("how", ["await", "astream", "async for", "wait_for"])
def test_cancelling_a_task_ends_its_request(llm: LLM, how: str) -> None:
    gate = Gate(3)
    params = greedy(400, logits_processors=[gate])
    before = llm._loop.steps

    async def work() -> None:
        if how == "await":
            await llm.generate_async("hello", params)
        elif how == "astream":
            async for _ in llm.astream("hello", params):
                pass
        elif how == "async for":
            async for _ in llm.generate_async("hello", params):
                pass
        else:
            await asyncio.wait_for(llm.generate_async("hello", params), 0.05)

    async def main() -> None:
        task = asyncio.create_task(work())
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        if how != "wait_for":
            task.cancel()
        with pytest.raises((asyncio.CancelledError, TimeoutError)):
            await task

    run(main())
    gate.opened.set()
    until(lambda: idle(llm))
    assert llm._loop.steps - before < 100


def test_leaving_astream_early_ends_its_request(llm: LLM) -> None:
    gate = Gate(3)

    async def main() -> None:
        async for _ in llm.astream("hello", greedy(400, logits_processors=[gate])):
            break
        gc.collect()

    before = llm._loop.steps
    run(main())
    gate.opened.set()
    until(lambda: idle(llm))
    assert llm._loop.steps - before < 100


def test_errors_come_where_the_answer_would(llm: LLM) -> None:
    def broken(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("enough")

    async def main() -> None:
        for bad, params, message in (
            ("", greedy(3), "empty"),
            ([999], greedy(3), "999"),
            ("hello", greedy(3, logits_processors=[broken]), "enough"),
        ):
            future = llm.generate_async(bad, params)
            with pytest.raises(RequestError, match=message):
                await future
            with pytest.raises(RequestError, match=message):
                future.result(5)
            with pytest.raises(RequestError, match=message):
                async for _ in llm.astream(bad, params):
                    pass
        good, bad = await asyncio.gather(
            llm.generate_async("hello", greedy(3)), llm.generate_async("", greedy(3)), return_exceptions=True
        )
        assert good.finished and isinstance(bad, RequestError)

    run(main())
    until(lambda: idle(llm))


def test_close_while_they_wait(checkpoint: Any, cache: Any) -> None:
    gate = Gate(3)

    async def main() -> list[Any]:
        llm = LLM(checkpoint, cache_dir=cache)
        futures = [llm.generate_async("hello", greedy(400, logits_processors=[gate])) for _ in range(3)]
        waiting = asyncio.gather(*futures)
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        gate.opened.set()
        llm.close()
        with pytest.raises(EngineClosedError):
            await llm.generate_async("hello")
        return list(await waiting)

    outputs = run(main())
    assert [o.outputs[0].finish_reason for o in outputs] == ["abort"] * 3
    assert all(not isinstance(o, LLMAPIError) for o in outputs)


def test_states_are_made_while_somebody_iterates(llm: LLM, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt] = prompts_of([6], seed=81)
    made: list[int] = []
    real = Job.output
    monkeypatch.setattr(Job, "output", lambda job: made.append(job.request.sequences[0].num_output) or real(job))
    gate = Gate(40)
    future = llm.generate_async(prompt, greedy(60, logits_processors=[gate]))
    assert gate.reached.wait(20)
    assert made == list(range(1, 17))  # nobody has shown what this is for

    async def main() -> list[list[int]]:
        states = future.__aiter__()
        seen = [(await anext(states)).outputs[0].token_ids for _ in range(16)]
        task = asyncio.ensure_future(anext(states))
        await asyncio.sleep(0.01)
        gate.opened.set()
        seen.append((await task).outputs[0].token_ids)
        return seen + [state.outputs[0].token_ids async for state in states]

    seen = run(main())
    assert [len(ids) for ids in seen[:16]] == list(range(1, 17))
    later = [len(ids) for ids in seen[16:]]
    assert later == list(range(later[0], 61)) and later[0] in (40, 41)
    expected = truth.greedy(prompt, 60)
    assert all(ids == expected[: len(ids)] for ids in seen)

    made.clear()
    assert llm.generate_async(prompt, greedy(60)).result(20).outputs[0].token_ids == expected
    assert made[-1] == 60 and len(made) < 20
    made.clear()
    assert run(waited(llm, prompt)) == expected
    assert made[-1] == 60 and len(made) < 20


async def waited(llm: LLM, prompt: list[int]) -> list[int]:
    return (await llm.generate_async(prompt, greedy(60))).outputs[0].token_ids
