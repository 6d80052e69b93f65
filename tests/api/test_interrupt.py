"""The end of an LLM: close, del, the end of the process, and Ctrl-C in the middle."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, EngineClosedError, SamplingParams
from tests.api.truth import Truth, prompts_of, until

ROOT = Path(__file__).parents[2]


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def loop_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "llmapi-loop"}


# ---- close


def test_closing_twice_is_closing_once(checkpoint: Path, cache: Path) -> None:
    llm = LLM(checkpoint, cache_dir=cache)
    assert "closed" not in repr(llm)
    llm.generate("hello", greedy(3))
    thread = llm._loop._thread
    assert thread is not None and thread.is_alive()
    llm.close()
    assert not thread.is_alive()
    llm.close()
    assert "closed" in repr(llm)


def test_closing_before_any_use(checkpoint: Path, cache: Path) -> None:
    before = loop_threads()
    llm = LLM(checkpoint, cache_dir=cache)
    assert loop_threads() == before  # no thread until there is work
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("hello")


def test_use_after_close_is_refused(checkpoint: Path, cache: Path) -> None:
    with LLM(checkpoint, cache_dir=cache) as llm:
        future = llm.generate_async("hello", greedy(5))
        assert future.result(20).finished
    for use in (
        lambda: llm.generate("hello"),
        lambda: llm.generate(["hello", "world"]),
        lambda: llm.chat([{"role": "user", "content": "hello"}]),
        lambda: llm.stream("hello"),
        lambda: llm.generate_async("hello"),
    ):
        with pytest.raises(EngineClosedError, match="make a new one"):
            use()
    llm.abort("0")
    assert future.result().finished  # what was there stays


def test_leaving_the_block_by_an_error_closes(checkpoint: Path, cache: Path) -> None:
    with pytest.raises(ZeroDivisionError), LLM(checkpoint, cache_dir=cache) as llm:
        llm.generate("hello", greedy(2))
        1 / 0  # noqa: B018
    with pytest.raises(EngineClosedError):
        llm.generate("hello")


def test_close_ends_a_generate_of_another_thread(checkpoint: Path, cache: Path, truth: Truth) -> None:
    reached = threading.Event()

    def signal_third(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            reached.set()
        return logits

    llm = LLM(checkpoint, cache_dir=cache)
    prompts = prompts_of([5] * 40, seed=81)
    found: list[Any] = []

    def work() -> None:
        found.extend(llm.generate(prompts, greedy(480, logits_processors=[signal_third])))

    worker = threading.Thread(target=work)
    worker.start()
    assert reached.wait(30)
    llm.close()
    worker.join(20)
    assert not worker.is_alive() and len(found) == 40
    assert "abort" in {o.outputs[0].finish_reason for o in found}
    for prompt, output in zip(prompts, found, strict=True):
        ids = output.outputs[0].token_ids
        assert output.finished and ids[:10] == truth.greedy(prompt, 10)[: len(ids)]


def test_dropping_the_last_reference_frees_everything(checkpoint: Path, cache: Path) -> None:
    before = loop_threads()
    llm = LLM(checkpoint, cache_dir=cache)
    llm.generate(["hello", "world"], greedy(4))
    list(llm.stream("hello", SamplingParams(max_tokens=4, repetition_penalty=1.2, bad_words=["x"])))
    engine = weakref.ref(llm._loop._engine)
    memory = [weakref.ref(t) for t in llm._loop._engine._caches.values()]  # type: ignore[attr-defined]
    [thread] = loop_threads() - before
    assert memory and all(m() is not None for m in memory)
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and loop_threads() == before
    assert all(m() is None for m in memory)
    until(lambda: engine() is None)


def test_closing_frees_the_memory_of_an_llm_that_is_kept(checkpoint: Path, cache: Path) -> None:
    llm = LLM(checkpoint, cache_dir=cache)
    llm.generate(["hello", "world"], greedy(4))
    memory = [weakref.ref(t) for t in llm._loop._engine._caches.values()]  # type: ignore[attr-defined]
    llm.close()
    gc.collect()
    assert memory and all(m() is None for m in memory)


def test_dropping_it_while_it_runs(checkpoint: Path, cache: Path) -> None:
    before = loop_threads()
    llm = LLM(checkpoint, cache_dir=cache)
    future = llm.generate_async("hello", greedy(480))
    del llm
    gc.collect()
    assert future.result(20).outputs[0].finish_reason in ("abort", "length")
    until(lambda: loop_threads() == before)


def test_closed_llms_leave_the_cache_to_others(checkpoint: Path, tmp_path: Path) -> None:
    from llmapi._build.store import Store

    with LLM(checkpoint, cache_dir=tmp_path) as llm:
        llm.generate("hello", greedy(2))
        assert {str(e) for e in Store(tmp_path).prune(0).removed} == set()  # in use
    assert {e.kind for e in Store(tmp_path).prune(0).removed} == {"tokenizer", "weights", "graph", "engine"}


# ---- the process ends


def script(body: str, checkpoint: Path, cache: Path) -> list[str]:
    head = f"""
        import sys, threading, time, json
        import torch
        torch.set_num_threads(1)
        from llmapi import LLM, SamplingParams
        llm = LLM({str(checkpoint)!r}, cache_dir={str(cache)!r}, max_batch_size=8)
        long = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)
        """
    return [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(
    "body",
    [
        """
        futures = [llm.generate_async([5 + i % 90, 7], long) for i in range(300)]
        while llm._loop.steps < 3: time.sleep(0.001)
        print("leaving")
        """,
        """
        stream = llm.stream("hello", long)
        worker = threading.Thread(target=llm.generate, args=(["hello"] * 100, long), daemon=True)
        worker.start()
        next(stream)
        while len(llm._loop._jobs) < 101: time.sleep(0.001)
        print("leaving")
        sys.exit(0)
        """,
    ],
    ids=["falls off the end", "sys.exit"],
)
def test_a_process_ends_at_once_whatever_runs(body: str, checkpoint: Path, cache: Path) -> None:
    process = subprocess.Popen(
        script(body, checkpoint, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "leaving\n", process.stderr.read()
        left = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - left < 10  # torch itself takes a second to unload
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_a_forked_process_is_told_rather_than_left_waiting(checkpoint: Path, cache: Path) -> None:
    body = """
        import os
        llm.generate("hello", SamplingParams(max_tokens=2))
        child = os.fork()
        if child == 0:
            try:
                llm.generate("hello")
            except Exception as error:
                print(type(error).__name__, error)
            os._exit(0)
        os.waitpid(child, 0)
        print(llm.generate("hello", SamplingParams(max_tokens=2)).outputs[0].finish_reason)
        """
    done = subprocess.run(
        script(body, checkpoint, cache), capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60
    )
    told, after = done.stdout.splitlines()
    assert told.startswith("EngineClosedError this process was forked") and after == "length"


def test_ctrl_c_returns_within_a_second_and_the_next_generate_works(
    checkpoint: Path, cache: Path, truth: Truth
) -> None:
    prompts = prompts_of([6, 30], seed=82)
    body = f"""
        def tell():
            while llm._loop.steps < 5: time.sleep(0.001)
            print("running")
        for way in ("batch", "stream", "chat"):
            llm._loop.steps = 0
            threading.Thread(target=tell).start()
            try:
                if way == "batch":
                    llm.generate(["hello"] * 400, long)
                elif way == "chat":
                    llm.chat([[{{"role": "user", "content": "hello"}}]] * 400, long)
                else:
                    for i in range(400):
                        for state in llm.stream("hello", long): pass
                print("not interrupted")
            except KeyboardInterrupt:
                print(json.dumps(time.monotonic()))
            outputs = llm.generate({prompts}, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
            print(json.dumps([o.outputs[0].token_ids for o in outputs]))
            print(len(llm._loop._jobs))
        """
    process = subprocess.Popen(
        script(body, checkpoint, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        for _ in range(3):
            assert process.stdout.readline() == "running\n", process.stderr.read()
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            raised = float(process.stdout.readline())
            assert raised - sent < 1.0
            tokens = json.loads(process.stdout.readline())
            assert tokens == [truth.greedy(p, 20) for p in prompts]
            assert time.monotonic() - sent < 20
            assert int(process.stdout.readline()) == 0
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
