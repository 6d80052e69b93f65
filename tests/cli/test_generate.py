"""``llmapi generate``, ``build`` and ``bench``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from llmapi import LLM, RequestOutput, SamplingParams
from tests.cli.helpers import GREEDY, PROMPTS, SAMPLING, Cli, refused


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
    assert [json.loads(line)["outputs"][0]["text"] for line in piped.out.splitlines()] == texts


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
        expected = llm.chat(talk, SAMPLING).text
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
    assert re.search(r"^llmapi: \S+: cache hit: .*, engine \w{12}$", result.err, re.MULTILINE)


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
