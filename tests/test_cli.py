"""The command line: what each verb prints, its exit codes and its messages."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmapi import LLM, CompletionOutput, KvCacheConfig, RequestOutput, SamplingParams
from llmapi._build.key import Key, Part
from llmapi._build.store import Staging, Store
from llmapi._cli import chat, options
from llmapi._cli.text import age_text
from llmapi._cli.values import size
from llmapi.cli import main
from tests.fakehub import FakeHub
from tests.tiny import tiny_checkpoint

PROMPTS = ["the quick brown fox", "hello world, what is", "one two"]
GREEDY = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]
VERBS = ["generate", "chat", "build", "cache", "bench", "doctor"]
CACHE_VERBS = ["path", "ls", "show", "why", "verify", "prune", "rm", "export", "import"]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMAPI_PROGRESS", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A cache that holds the model. Tests that change a cache take their own."""
    root = tmp_path_factory.mktemp("cache")
    with LLM(model, cache_dir=root):
        pass
    return root


@pytest.fixture
def cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMAPI_CACHE_DIR", str(built))
    return built


@pytest.fixture
def own_cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache, made by the verbs themselves."""
    archive, root = tmp_path / "all.tar", tmp_path / "own cache"
    keys = [e.digest for e in Store(built).entries()]
    assert main(["cache", "export", "--cache-dir", str(built), *keys, str(archive)]) == 0
    assert main(["cache", "import", "--cache-dir", str(root), str(archive)]) == 0
    monkeypatch.setenv("LLMAPI_CACHE_DIR", str(root))
    return root


Cli = Callable[..., SimpleNamespace]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command: its exit code, stdout and stderr."""

    def run(*words: str, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="module")
def truth(built: Path, model: str) -> list[RequestOutput]:
    with LLM(model, cache_dir=built) as llm:
        return llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))


def refused(result: SimpleNamespace, code: int, *parts: str) -> None:
    """One line on stderr that holds the parts, nothing on stdout."""
    assert result.code == code
    assert result.out == ""
    assert re.fullmatch(r"llmapi: error: [^\n]+\n", result.err), result.err
    for part in parts:
        assert part in result.err


# ---- the options are those of the API


def test_every_argument_of_the_api_can_be_typed() -> None:
    known = {o.name for o in options.SAMPLING}
    assert known == {f.name for f in fields(SamplingParams)} - {"logits_processors", "return_logits"}
    known = {o.name for o in options.ENGINE} | {"model", "kv_cache_config"}
    assert known == set(signature(LLM).parameters) - {"unknown"}
    assert {o.name for o in options.KV_CACHE} == {f.name for f in fields(KvCacheConfig)}


def test_every_option_arrives_as_it_was_typed() -> None:
    words = ["--n", "2", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.1", "--presence-penalty", "-0.5", "--frequency-penalty", "0.5", "--seed", "7", "--stop", "END", "--stop", ".", "--stop-token-ids", "3,4", "--bad-words", "bad", "--logit-bias", "3=-1.5,4=2", "--ignore-eos", "--include-stop-str-in-output", "--no-skip-special-tokens", "--no-spaces-between-special-tokens", "--min-tokens", "2", "--max-tokens", "none", "--logprobs", "1", "--prompt-logprobs", "0", "--no-detokenize"]
    given = options.sampling_arguments(parse("generate", "model", *words))
    assert given == {
        "n": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.5, "seed": 7, "stop": ["END", "."], "stop_token_ids": [3, 4],
        "bad_words": ["bad"], "logit_bias": {3: -1.5, 4: 2.0}, "ignore_eos": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "min_tokens": 2, "max_tokens": None,
        "logprobs": 1, "prompt_logprobs": 0, "detokenize": False,
    }  # fmt: skip
    words = ["--revision", "r", "--tokenizer", "t", "--tokenizer-mode", "slow", "--skip-tokenizer-init", "--trust-remote-code", "--hf-token", "x", "--refresh", "--load-format", "dummy", "--backend", "cpu", "--dtype", "bfloat16", "--max-seq-len", "64", "--max-batch-size", "2", "--max-num-tokens", "32", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5", "--tensor-parallel-size", "1", "--engine-seed", "none", "--cache-dir", "c", "--no-progress", "--kv-block-size", "32", "--kv-max-tokens", "96", "--kv-memory-bytes", "2GB", "--kv-memory-fraction", "0.5", "--kv-dtype", "bfloat16"]
    args = parse("generate", "model", "--engine-seed", "5", *words)
    assert options.sampling_arguments(args) == {}
    assert options.engine_arguments(args) == {
        "revision": "r", "tokenizer": "t", "tokenizer_mode": "slow", "skip_tokenizer_init": True,
        "trust_remote_code": True, "hf_token": "x", "refresh": True, "load_format": "dummy", "backend": "cpu",
        "dtype": "bfloat16", "max_seq_len": 64, "max_batch_size": 2, "max_num_tokens": 32,
        "enable_prefix_caching": False, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 1, "seed": None,
        "cache_dir": "c", "progress": False,
        "kv_cache_config": {
            "block_size": 32, "max_tokens": 96, "memory_bytes": 2_000_000_000, "memory_fraction": 0.5,
            "dtype": "bfloat16",
        },
    }  # fmt: skip


def parse(*words: str) -> Any:
    from llmapi.cli import _parser

    args, rest = _parser().parse_known_args(words)
    assert rest == []
    return args


def test_what_was_not_typed_is_left_to_the_api() -> None:
    args = parse("generate", "model", "--top-k", "3", "prompt")
    assert options.sampling_arguments(args) == {"top_k": 3}
    assert options.engine_arguments(args).keys() == {"progress"}


def test_prompts_may_stand_between_options() -> None:
    args = parse("generate", "--top-k", "3", "model", "one", "--json", "two", "--top-p", "1", "--", "-three")
    assert (args.model, args.prompts) == ("model", ["one", "two", "-three"])


# ---- help, import, entry points


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


def test_a_reader_that_goes_away_is_no_error(cache: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmapi", "cache", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
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


def test_a_bug_is_one_line_unless_debug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("llmapi.llm.LLM.__init__", broken)
    refused(cli("generate", "model", "prompt"), 1, "ZeroDivisionError: a b; --debug shows where")
    for words in (("--debug", "generate", "model", "prompt"), ("generate", "model", "prompt", "--debug")):
        with pytest.raises(ZeroDivisionError):
            cli(*words)


# ---- wrong arguments


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ([], 2, ["VERB", "llmapi --help"]),
        (["genrate"], 2, ["'genrate'", "'generate'"]),
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
    monkeypatch.setattr(io.StringIO, "isatty", lambda self: True)
    refused(cli("generate", "m"), 2, "no prompt")


# ---- generate


def test_one_prompt_prints_its_text(cli: Cli, cache: Path, model: str, truth: list[RequestOutput]) -> None:
    result = cli("generate", model, PROMPTS[0], *GREEDY)
    assert (result.code, result.out, result.err) == (0, truth[0].text + "\n", "")
    streamed = cli("generate", model, PROMPTS[0], "--stream", *GREEDY)
    assert (streamed.code, streamed.out) == (0, truth[0].text + "\n")


def test_several_prompts_print_their_texts(
    cli: Cli, cache: Path, model: str, truth: list[RequestOutput], tmp_path: Path
) -> None:
    expected = "".join(f"> {p}\n{o.text}\n\n" for p, o in zip(PROMPTS, truth, strict=True))
    assert cli("generate", model, *PROMPTS, *GREEDY).out == expected
    lines = f"{PROMPTS[0]}\n\n{PROMPTS[1]}\r\n{PROMPTS[2]}"
    assert cli("generate", model, *GREEDY, stdin=lines).out == expected
    (tmp_path / "prompts.txt").write_text("\ufeff" + lines, encoding="utf-8")
    assert cli("generate", model, "--file", str(tmp_path / "prompts.txt"), *GREEDY).out == expected


def test_json_lines_in_and_out(cli: Cli, cache: Path, model: str, truth: list[RequestOutput], tmp_path: Path) -> None:
    lines = [
        json.dumps(PROMPTS[0]),
        json.dumps({"prompt": PROMPTS[1], "id": "second"}),
        json.dumps({"prompt_token_ids": truth[2].prompt_token_ids, "sampling_params": {"max_tokens": 2}}),
        json.dumps({"prompt": PROMPTS[0], "sampling_params": {"logit_bias": {"42": 100}, "logprobs": 1}}),
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    result = cli("generate", model, "--file", str(tmp_path / "prompts.jsonl"), "--json", *GREEDY)
    assert (result.code, result.err) == (0, "")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [f["index"] for f in found] == [0, 1, 2, 3]
    assert [f.get("id") for f in found] == [None, "second", None, None]
    assert [f.get("prompt") for f in found] == [PROMPTS[0], PROMPTS[1], None, PROMPTS[0]]
    assert [f["prompt_token_ids"] for f in found[:3]] == [o.prompt_token_ids for o in truth]
    texts = [f["outputs"][0]["text"] for f in found]
    assert texts[:2] == [truth[0].text, truth[1].text]
    assert found[2]["outputs"][0]["token_ids"] == truth[2].outputs[0].token_ids[:2]
    assert found[2]["outputs"][0]["finish_reason"] == "length"
    assert found[3]["outputs"][0]["token_ids"] == [42] * 6
    assert len(found[3]["outputs"][0]["logprobs"]) == 6
    assert {p["token_id"] for p in found[3]["outputs"][0]["logprobs"][0]} >= {42}
    assert found[0]["seconds"]["all"] >= found[0]["seconds"]["first_token"] > 0
    piped = cli("generate", model, "--jsonl", "--json", *GREEDY, stdin="\n".join(lines))
    assert [json.loads(line)["outputs"] for line in piped.out.splitlines()] == [f["outputs"] for f in found]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["stdin, line 2 is not JSON"]),
        ("3", ["line 2: give a text"]),
        ('{"promt": "a"}', ["line 2: unknown key 'promt'; did you mean 'prompt'"]),
        ('{"prompt": "a", "messages": []}', ["line 2: give one of"]),
        ('{"id": 1}', ["line 2: give one of", "none"]),
        ('{"prompt": "a", "sampling_params": {"top_p": 3}}', ["line 2: top_p=3"]),
        ('{"prompt": "a", "sampling_params": {"logits_processors": []}}', ["'logits_processors'"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', ["two runs"]),
    ],
)
def test_wrong_json_lines(cli: Cli, line: str, parts: list[str]) -> None:
    refused(cli("generate", "m", "--jsonl", stdin=f'"good"\n{line}\n'), 1, *parts)


def test_a_bad_prompt_leaves_the_others_alone(cli: Cli, cache: Path, model: str, truth: list[RequestOutput]) -> None:
    too_long = "the quick brown fox jumps " * 300
    lines = "\n".join(map(json.dumps, [PROMPTS[0], too_long, PROMPTS[1]]))
    result = cli("generate", model, "--jsonl", "--json", *GREEDY, stdin=lines)
    assert result.code == 1
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [f["outputs"][0]["text"] for f in (found[0], found[2])] == [truth[0].text, truth[1].text]
    assert "max_seq_len=512" in found[1]["error"]
    assert result.err.startswith("llmapi: warning: 1 of 3 requests failed")
    result = cli("generate", model, *GREEDY, PROMPTS[0], too_long)
    assert result.code == 1
    assert f"{truth[0].text}\n" in result.out
    assert "[failed: the prompt has" in result.out
    refused(cli("generate", model, *GREEDY, too_long), 1, "max_seq_len=512")


def test_chat_prompts(cli: Cli, cache: Path, model: str) -> None:
    talk = [{"role": "user", "content": PROMPTS[0]}]
    with LLM(model, cache_dir=cache) as llm:
        expected = llm.chat(talk, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)).text
    assert cli("generate", model, "--chat", PROMPTS[0], *GREEDY).out == expected + "\n"
    assert cli("generate", model, "--chat", "--stream", PROMPTS[0], *GREEDY).out == expected + "\n"
    line = cli("generate", model, "--json", "--jsonl", *GREEDY, stdin=json.dumps({"messages": talk}))
    found = json.loads(line.out)
    assert (found["messages"], found["outputs"][0]["text"]) == (talk, expected)
    refused(cli("generate", model, "--chat", "--jsonl", stdin="[3, 4]"), 1, "token ids")


def test_several_sequences(cli: Cli, cache: Path, model: str) -> None:
    words = ["generate", model, PROMPTS[0], "--n", "2", "--seed", "3", "--max-tokens", "6", "--ignore-eos"]
    with LLM(model, cache_dir=cache) as llm:
        [*both] = llm.generate(PROMPTS[0], SamplingParams(n=2, seed=3, max_tokens=6, ignore_eos=True)).outputs
    assert cli(*words).out == f"[0] {both[0].text}\n[1] {both[1].text}\n"


def test_verbose_tells_hits(cli: Cli, cache: Path, model: str) -> None:
    result = cli("-v", "generate", model, PROMPTS[0], *GREEDY)
    assert re.search(r"^llmapi: hit: engine ", result.err, re.MULTILINE)


# ---- chat


def test_chat_from_a_pipe(cli: Cli, cache: Path, model: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

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
    lines = f"hello world\n{'the quick brown fox ' * 300}\n/foo\n/reset\nhello world\n"
    result = cli("chat", model, *GREEDY, stdin=lines)
    assert result.code == 1
    first, again = result.out.splitlines()
    assert first == again
    assert re.match(
        r"llmapi: error: the prompt has .* /reset starts anew\nllmapi: error: unknown command /foo", result.err
    )


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

    def wait_for(text: str) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(keeper, 4096).decode("utf-8", "replace").replace("\r\n", "\n")
        seen = seen.partition(text)[2]

    try:
        wait_for("/help lists commands")
        wait_for("> ")
        os.write(keeper, b"hello world\n")
        wait_for("hello world\n")
        while len(seen.strip()) < 3:  # some of the answer
            seen += os.read(keeper, 4096).decode("utf-8", "replace")
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


# ---- build and bench


def test_build_and_save(cli: Cli, cache: Path, model: str, truth: list[RequestOutput], tmp_path: Path) -> None:
    result = cli("build", model, "--output", str(tmp_path / "saved"))
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^build .* cache hit$", result.out, re.MULTILINE)
    assert re.search(r"^hit: weights ", result.out, re.MULTILINE)
    assert result.out.endswith(f"saved to {tmp_path / 'saved'}\n")
    empty = str(tmp_path / "empty")
    saved = cli("generate", str(tmp_path / "saved"), PROMPTS[0], *GREEDY, "--cache-dir", empty)
    assert saved.out == truth[0].text + "\n"
    why = cli("cache", "why", str(tmp_path / "saved"), "--cache-dir", empty)
    assert why.out.count("part of the saved engine") == 2
    refused(cli("build", model, "--output", str(tmp_path / "saved")), 1, "not an empty folder")


def test_bench(cli: Cli, cache: Path, model: str) -> None:
    words = ["bench", model, "--batch-sizes", "1,3", "--input-len", "8", "--output-len", "4"]
    result = cli(*words)
    assert (result.code, result.err) == (0, "")
    assert "8 tokens in, 4 out" in result.out
    assert f"torch {torch.__version__}" in result.out
    assert [line.split()[0] for line in result.out.splitlines()[-2:]] == ["1", "3"]
    found = json.loads(cli(*words, "--json").out)
    for row in found["rows"]:
        assert row["first_token"] > 0
        assert row["per_token"] > 0
        assert row["all_rate"] == pytest.approx(row["output_rate"] * 3)
        seconds = row["batch"] * 4 / row["output_rate"]
        assert row["first_token"] + 3 * row["per_token"] == pytest.approx(seconds, rel=0.6)
    refused(cli("bench", model, "--input-len", "510"), 1, "542 tokens", "max_seq_len is 512")
    refused(cli("bench", model, "--batch-sizes", "9", "--max-batch-size", "8"), 1, "max_batch_size is 8")


# ---- cache


def test_ls_and_show(cli: Cli, cache: Path, model: str) -> None:
    result = cli("cache", "ls")
    head, *rows, total = result.out.splitlines()
    assert head.split() == ["KIND", "KEY", "SIZE", "BUILT", "USED", "HITS", "MODEL"]
    entries = {e.kind: e for e in Store(cache).entries()}
    assert {row.split()[0] for row in rows} == set(entries) == {"engine", "weights"}
    assert all(row.endswith(" llama") for row in rows)
    assert total.startswith("2 entries, ")
    assert str(cache) in total
    engine = entries["engine"]
    shown = cli("cache", "show", engine.digest[:10]).out
    assert f"engine {engine.digest}\nmodel   {model}\n" in shown
    assert "\n  max_batch_size: 64\n" in shown
    assert "\n  torch.version: " in shown
    for name, record in engine.manifest.files.items():
        assert f"  {name}  " in shown
        assert f"sha256:{record.sha256}" in shown
    assert "in use now" not in shown
    with LLM(model, cache_dir=cache):
        assert "in use now" in cli("cache", "show", f"engine/{engine.digest[:10]}").out
        refused(cli("cache", "rm", engine.digest), 1, "is in use")


def test_why_hit(cli: Cli, cache: Path, model: str) -> None:
    result = cli("cache", "why", model)
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["weights", " hit"], ["engine", " hit"]]


def test_why_names_what_differs_and_builds_nothing(cli: Cli, cache: Path, model: str) -> None:
    before = [(e.digest, e.hits) for e in Store(cache).entries()]
    result = cli("cache", "why", model, "--max-batch-size", "8")
    weights, engine, nearest, *diff = result.out.splitlines()
    assert weights.startswith("weights: hit: ")
    assert engine.startswith("engine: miss: ")
    assert "differs in" in nearest
    assert diff == ["    max_batch_size: 64 -> 8"]
    result = cli("cache", "why", model, "--dtype", "bfloat16")
    assert result.out.count("    dtype: float32 -> bfloat16") == 2
    assert [(e.digest, e.hits) for e in Store(cache).entries()] == before
    # It tells the truth: the key that it names is the one that a start asks for.
    promised = re.search(r"engine: miss: (\w+)", result.out)
    assert promised
    with LLM(model, cache_dir=cache, dtype="bfloat16") as llm:
        assert llm.build_report.keys["engine"].startswith(promised[1])
    for entry in Store(cache).entries():
        if (entry.digest, entry.hits) not in before and "bfloat16" in str(entry.manifest.key):
            assert main(["cache", "rm", entry.digest]) == 0


def test_why_in_an_empty_cache(cli: Cli, model: str, tmp_path: Path) -> None:
    result = cli("cache", "why", model, "--cache-dir", str(tmp_path / "new"))
    weights, engine = result.out.splitlines()
    assert weights.startswith("weights: miss: ")
    assert "there is no entry of this kind yet" in weights
    assert "export the graph first" in engine
    assert Store(tmp_path / "new").entries() == []


def test_why_for_other_weights(cli: Cli, cache: Path, model: str, tmp_path: Path) -> None:
    other = str(tiny_checkpoint(tmp_path / "other", seed=1))
    result = cli("cache", "why", other)
    weights, _, diff, engine = result.out.splitlines()
    assert weights.startswith("weights: miss: ")
    assert diff.startswith("    origin.files: ")
    assert engine.startswith("engine: hit: ")
    dummy = cli("cache", "why", model, "--load-format", "dummy", "--engine-seed", "3").out
    assert "    origin.dummy: (absent) -> 3\n" in dummy


def test_why_downloads_no_weights(
    cli: Cli, cache: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.add("org/tiny", {f.name: f.read_bytes() for f in Path(model).iterdir() if f.is_file()})
        result = cli("cache", "why", "org/tiny")
        weights, engine = result.out.splitlines()
        assert weights == "weights: miss: the model's weights are not on this machine; a start downloads them"
        assert engine.startswith("engine: hit: ")
        assert "config.json" in hub.fetched()
        assert "model.safetensors" not in hub.fetched()
        assert cli("generate", "org/tiny", PROMPTS[0], *GREEDY).code == 0
        assert "model.safetensors" in hub.fetched()
        asked = len(hub.log)
        assert cli("cache", "why", "org/tiny").out.startswith("weights: hit: ")
        assert len(hub.log) == asked


def test_export_and_import(cli: Cli, own_cache: Path, built: Path, model: str, tmp_path: Path) -> None:
    files = [p for p in own_cache.rglob("*") if p.is_file()]
    assert {e.digest for e in Store(own_cache).entries()} == {e.digest for e in Store(built).entries()}
    for entry in Store(built).entries():
        for name in entry.manifest.files:
            (copy,) = [p for p in files if p.match(f"{entry.kind}/{entry.digest}/{name}")]
            assert copy.read_bytes() == (built / copy.relative_to(own_cache)).read_bytes()
    again = cli("cache", "import", str(tmp_path / "all.tar"))
    assert again.out.count("kept ") == 2
    result = cli("-v", "generate", model, PROMPTS[0], *GREEDY)
    assert "hit: weights" in result.err
    (tmp_path / "all.tar").write_bytes((tmp_path / "all.tar").read_bytes()[:-3000])
    refused(cli("cache", "import", str(tmp_path / "all.tar")), 1, "refused")


def test_import_of_what_cannot_run_here(cli: Cli, own_cache: Path, tmp_path: Path) -> None:
    engine = next(e for e in Store(own_cache).entries() if e.kind == "engine")
    parts = [Part("torch", '{"version":"9.9"}') if p.name == "torch" else p for p in engine.manifest.key.parts]
    far = Store(tmp_path / "far")

    def build(staging: Staging) -> None:
        staging.write("graph.txt", b"graph")

    far.build("engine", Key(parts), "far", build).close()
    archive = str(tmp_path / "far.tar")
    assert cli("cache", "export", "--cache-dir", str(far.root), Key(parts).digest, archive).code == 0
    refused(cli("cache", "import", archive), 1, "cannot be used on this machine", "needs torch 9.9", torch.__version__)
    assert len(Store(own_cache).entries()) == 2


def test_verify_finds_one_flipped_bit(cli: Cli, own_cache: Path) -> None:
    sound = cli("cache", "verify")
    assert sound.code == 0
    assert sound.out.startswith("2 sound, 0 damaged; ")
    weights = next(e for e in Store(own_cache).entries() if e.kind == "weights")
    (path,) = own_cache.rglob(f"weights/{weights.digest}/*.safetensors")
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = cli("cache", "verify")
    assert result.code == 1
    damaged, total = result.out.splitlines()
    assert damaged.startswith(f"damaged: weights {weights.digest[:12]}: ")
    assert path.name in damaged
    assert total.startswith("1 sound, 1 damaged; ")
    assert cli("cache", "verify").code == 0
    assert "weights" not in cli("cache", "ls").out


def test_prune_and_rm(cli: Cli, own_cache: Path) -> None:
    entries = {e.kind: e for e in Store(own_cache).entries()}
    assert cli("cache", "prune", "--budget", "50GB").out.startswith("0 bytes freed, ")
    refused(cli("cache", "rm", entries["engine"].digest[:8], "zz"), 1, "'zz'")
    assert len(Store(own_cache).entries()) == 2
    result = cli("cache", "rm", entries["engine"].digest[:8], f"engine/{entries['engine'].digest}")
    assert result.out.count("removed engine") == 1
    assert [e.kind for e in Store(own_cache).entries()] == ["weights"]
    result = cli("cache", "prune", "--budget", "0")
    assert re.match(r"removed weights .*\n.* freed, 0 bytes left", result.out)
    assert cli("cache", "ls").out.startswith("0 entries, 0 bytes of ")


# ---- values


def test_sizes_and_ages() -> None:
    sizes = {"50GB": 50 * 10**9, "1.5 MiB": 3 << 19, "0": 0, "7": 7, "2kb": 2000, "1T": 10**12}
    assert {text: size(text) for text in sizes} == sizes
    for wrong in ("", "GB", "5XB", "-1", "1iB", "1e9"):
        with pytest.raises(ArgumentTypeError):
            size(wrong)
    ages = {-5: "0 s", 59: "59 s", 60: "1 min", 7199: "1 h", 86400: "1 day", 200_000: "2 days"}
    assert {seconds: age_text(seconds) for seconds in ages} == ages
