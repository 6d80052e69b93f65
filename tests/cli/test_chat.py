"""``llmapi chat``: from a pipe, from a person, and on a real terminal."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmapi import LLM, CompletionOutput, RequestOutput, SamplingParams
from llmapi._cli import chat
from tests.cli.helpers import GREEDY, SAMPLING, Cli, refused


def test_chat_from_a_pipe(cli: Cli, cache: Path, model: str) -> None:
    params = SAMPLING

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    with LLM(model, cache_dir=cache) as llm:
        first = llm.chat([user("hello world")], params).text.strip("\n")
        answer = {"role": "assistant", "content": llm.chat([user("hello world")], params).text}
        second = llm.chat([user("hello world"), answer, user("one two")], params).text
        system = {"role": "system", "content": "brown fox"}
        third = llm.chat([system, user("one two")], params).text
    assert second != third  # or the history would not show
    lines = "hello world\n\none two\n/reset\n/system brown fox\none two\n/exit\nnever read\n"
    result = cli("chat", model, *GREEDY, stdin=lines)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{first}\n{second}\n{third}\n"
    assert cli("chat", model, "--system", "brown fox", *GREEDY, stdin="one two").out == third + "\n"


def test_chat_goes_on_after_an_error(cli: Cli, cache: Path, model: str) -> None:
    good = cli("chat", model, *GREEDY, stdin="hello world\none two\n")
    assert good.code == 0
    too_long = "the quick brown fox " * 300
    result = cli("chat", model, *GREEDY, stdin=f"hello world\n{too_long}\n/foo\none two\n")
    assert result.code == 1
    assert result.out == good.out  # the message that failed left nothing behind
    first, second = result.err.splitlines()
    assert re.match(r"llmapi: error: the prompt has .* /reset starts anew$", first)
    assert second.startswith("llmapi: error: unknown command /foo; ")


class FakeLLM:
    """Answers "a b c" and, at the given turns, is interrupted after that many words."""

    model = "fake"

    def __init__(self, interrupts: dict[int, int]) -> None:
        self.interrupts = interrupts
        self.talks: list[list[dict[str, str]]] = []
        self.aborted: list[str] = []

    def _need_tokenizer(self, what: str) -> Any:
        return SimpleNamespace(apply_chat_template=lambda talk: self.talks.append(talk) or [1])

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        turn = len(self.talks)
        for words in range(4):
            if self.interrupts.get(turn) == words:
                raise KeyboardInterrupt
            if words:
                text = " ".join("abc"[:words])
                reason = "stop" if words == 3 else None
                yield RequestOutput(
                    str(turn), None, [1], [CompletionOutput(0, text, [], finish_reason=reason)], words == 3
                )

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What a person types: lines, Ctrl-C and Ctrl-D."""
    left = [*lines, EOFError]

    def read(prompt: str = "") -> str:
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_ctrl_c_stops_an_answer_and_keeps_the_session(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM({1: 2, 2: 0})
    typed(monkeypatch, "one", "two", KeyboardInterrupt, "three")
    talk = chat.Talk(llm, SamplingParams(), None, interactive=True)  # type: ignore[arg-type]
    assert talk.run() == 0
    assert llm.aborted == ["1"]
    # What was answered before Ctrl-C is remembered; a message that got no answer is not.
    roles = [[m["content"] for m in t] for t in llm.talks]
    assert roles == [["one"], ["one", "a", "two"], ["one", "a", "three"]]
    out, err = capsys.readouterr()
    assert out == "a [stopped]\n [stopped]\na b c\n\n"
    assert "Ctrl-D or /exit leaves" in err


def test_ctrl_c_ends_a_chat_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one", "two")
    llm = FakeLLM({1: 2})
    with pytest.raises(KeyboardInterrupt):
        chat.Talk(llm, SamplingParams(), None, interactive=False).run()  # type: ignore[arg-type]
    assert len(llm.talks) == 1


def test_chat_without_a_template(cli: Cli, cache: Path, model: str, tmp_path: Path) -> None:
    for file in Path(model).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    refused(cli("chat", str(tmp_path), *GREEDY, stdin="hello"), 1, "no chat template")


def test_chat_on_a_terminal(cache: Path, model: str) -> None:
    """The real thing: a terminal, a process, Ctrl-C while it answers, Ctrl-D."""
    import pty

    keeper, terminal = pty.openpty()
    words = [*GREEDY[:2], "--ignore-eos", "--max-seq-len", "512"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmapi", "chat", model, *words],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def read() -> None:
        nonlocal seen
        assert select.select([keeper], [], [], 60)[0], f"nothing more came after {seen!r}"
        seen += os.read(keeper, 4096).decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(text: str) -> None:
        nonlocal seen
        while text not in seen:
            read()
        seen = seen.partition(text)[2]

    try:
        wait_for("/help lists commands")
        wait_for("> ")
        os.write(keeper, b"hello world\n")
        wait_for("hello world\n")
        while not seen.strip():  # the answer begins
            read()
        process.send_signal(signal.SIGINT)
        wait_for(" [stopped]\n")
        wait_for("> ")
        os.write(keeper, b"/reset\n")
        wait_for("forgotten")
        wait_for("> ")
        os.write(keeper, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(keeper)
