"""The command as a whole: help, imports, exit codes, and one clear line for each mistake."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmapi._build.store import Store
from tests.api.truth import until
from tests.cli.helpers import Cli, refused

VERBS = ["generate", "chat", "build", "cache", "bench", "doctor"]
CACHE_VERBS = ["path", "ls", "show", "why", "verify", "prune", "rm", "export", "import"]


@pytest.mark.parametrize("verb", [[], *([v] for v in VERBS), *(["cache", v] for v in CACHE_VERBS)], ids=" ".join)
def test_help(cli: Cli, verb: list[str]) -> None:
    result = cli(*verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(" ".join(["usage: llmapi", *verb]))
    if not verb:
        assert all(re.search(rf"^    {v} ", result.out, re.MULTILINE) for v in VERBS)


def test_the_command_imports_no_torch() -> None:
    code = (
        "import sys, llmapi.cli\n"
        "llmapi.cli.main(['generate', '--help'])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmapi", "cache", "path", "--cache-dir", str(tmp_path / "a b")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a b'}\n", "")
    assert not (tmp_path / "a b").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(cache: Path, unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmapi", "cache", "ls"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 141


def test_ctrl_c(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmapi.llm.LLM.__init__", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = cli("generate", "model", "prompt")
    assert (result.code, result.out, result.err) == (130, "", "\n")


def test_ctrl_c_in_the_middle_of_a_build_and_of_a_text(model: str, tmp_path: Path) -> None:
    """Two processes at once: one builds and is interrupted, the other waits for it, builds, answers, and is, too."""
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "llmapi", "generate", model, "hello", "--stream", "--max-tokens", "480"]
    environment = {**os.environ, "LLMAPI_CACHE_DIR": str(cache)}

    def start() -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, "--ignore-eos"], stdout=pipe, stderr=pipe, env=environment, bufsize=0)

    def interrupted(process: subprocess.Popen[bytes]) -> bytes:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode in (130, -signal.SIGINT), err) == (True, b"\n")  # the same to a shell
        return out

    first = start()
    until(lambda: first.poll() is not None or any(cache.glob("v1/locks/*")), 60)
    second = start()
    assert interrupted(first) == b""
    assert second.stdout is not None and second.stdout.read(1)
    interrupted(second)
    store = Store(cache)
    assert {e.kind for e in store.entries()} >= {"tokenizer", "weights", "graph", "engine"} and store.verify() == []
    assert not [p for name in ("staging", "locks", "quarantine") for p in cache.glob(f"v1/{name}/*")]


def test_a_bug_is_one_line_unless_debug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("llmapi.llm.LLM.__init__", broken)
    refused(cli("generate", "model", "prompt"), 1, "ZeroDivisionError: a b; --debug shows where")
    for words in (("--debug", "generate", "model", "prompt"), ("generate", "model", "prompt", "--debug")):
        with pytest.raises(ZeroDivisionError):
            cli(*words)


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ([], 2, ["VERB", "llmapi --help"]),
        (["genrate"], 2, ["'genrate'", "generate"]),
        (["generate"], 2, ["required: MODEL;", "llmapi generate --help"]),
        (["generate", "m", "p", "--temprature", "0"], 2, ["--temprature; did you mean --temperature?"]),
        (["generate", "m", "p", "--temp", "0"], 2, ["unknown option --temp"]),
        (["generate", "m", "p", "--top-k", "x"], 2, ["--top-k: 'x' is no whole number"]),
        (["generate", "m", "p", "--logit-bias", "3"], 2, ["'3' is no bias", "ID=VALUE"]),
        (["generate", "m", "p", "--kv-memory-bytes", "2 apples"], 2, ["'2 apples' is no size"]),
        (["generate", "m", "p", "q", "--stream"], 2, ["--stream is for one prompt, and there are 2"]),
        (["generate", "m", "p", "--stream", "--json"], 2, ["leave out --json"]),
        (["generate", "m", "p", "--stream", "--n", "2"], 2, ["leave out --n"]),
        (["generate", "m", "p", "--logprobs", "2"], 2, ["--json"]),
        (["generate", "m", "p", "--file", "f"], 2, ["--file"]),
        (["generate", "m", "p", "--jsonl"], 2, ["--jsonl"]),
        (["cache", "ls", "extra"], 2, ["unexpected argument 'extra'"]),
        (["cache"], 2, ["VERB"]),
        (["bench", "m", "--batch-sizes", "1,0"], 2, ["0 is too small"]),
        (["generate", "m", "p", "--top-p", "2"], 1, ["top_p=2.0", "(0, 1]"]),
        (["generate", "m", "p", "--n", "2", "--temperature", "0"], 1, ["n=2", "temperature above 0"]),
        (["generate", "/no/such/folder", "p"], 1, ["no folder /no/such/folder"]),
        (["chat", "/no/such/folder"], 1, ["no folder /no/such/folder"]),
        (["cache", "why", "/no/such/folder"], 1, ["no folder /no/such/folder"]),
        (["generate", "m", "--file", "/no/such/file"], 1, ["/no/such/file: No such file"]),
        (["generate", "m"], 1, ["stdin holds no prompt"]),
        (["generate", "m", "p\udcff"], 1, ["not UTF-8"]),
        (["cache", "show", "zz"], 1, ["no entry's digest starts with 'zz'", "llmapi cache ls"]),
        (["cache", "import", "/no/such/file"], 1, ["/no/such/file cannot be read"]),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_wrong_arguments(cli: Cli, cache: Path, words: list[str], code: int, parts: list[str]) -> None:
    refused(cli(*words), code, *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--backend", "cuda"], ["backend='cuda'", "'cpu'"]),
        (["--max-seq-len", "513"], ["max_seq_len=513", "512"]),
        (["--max-batch-size", "0"], ["max_batch_size=0"]),
        (["--kv-block-size", "7"], ["block_size=7"]),
        (["--load-format", "dumy"], ["did you mean 'dummy'"]),
    ],
    ids=" ".join,
)
def test_wrong_engine_arguments(cli: Cli, cache: Path, model: str, words: list[str], parts: list[str]) -> None:
    refused(cli("generate", model, "p", *words), 1, *parts)


def test_no_prompt_on_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmapi._cli.prompts.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    refused(cli("generate", "m"), 2, "no prompt")
