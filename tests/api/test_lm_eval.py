"""lm-evaluation-harness, unmodified, gives llmapi the scores that it gives its own model over transformers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmapi import LLM, ConfigError, RequestError, SamplingParams
from tests.api.test_smollm2 import by_transformers, gguf_file
from tests.api.truth import idle, until

lm_eval = pytest.importorskip("lm_eval", reason="the extra [lm-eval] is not installed")
pytest.importorskip("accelerate", reason="the harness's own model over transformers needs accelerate")

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "hello",
    "world",
    "capital",
    "France",
    "one",
    "two",
]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}],
    },
    "no_context": {
        "output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "generate": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "o"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def write_tasks(folder: Path, count: int, long: int) -> Any:
    """Tasks over data in a file.

    Args:
        folder: for them.
        count: of documents.
        long: words of the longest texts.
    """
    rng = random.Random(1)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    docs = [
        {"question": text(rng.randrange(1, 30)) + rng.choice(["", "?", " "]), "answer": rng.randrange(4),
         "choices": [text(rng.randrange(1, 4)) for _ in range(4)], "text": text(rng.choice([1, 20, long]))}
        for _ in range(count)
    ]  # fmt: skip
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps(d) for d in docs))
    for name, task in TASKS.items():
        whole = {"task": f"local_{name}", "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
                 "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(manager: Any, model: Any, names: list[str], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    found = lm_eval.simple_evaluate(
        model=model, tasks=[f"local_{n}" for n in names], task_manager=manager, bootstrap_iters=0, **options
    )
    samples = {name: sorted((s["doc_id"], s["resps"]) for s in found["samples"][name]) for name in found["samples"]}
    return found["results"], samples


def numbers(value: Any) -> Any:
    """Responses with their texts and booleans as they are and floats rounded away, and the floats."""
    floats: list[float] = []

    def walk(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [walk(y) for y in x]
        if isinstance(x, float):
            floats.append(x)
            return "float"
        return x

    return walk(value), floats


def compare(ours: Any, theirs: Any) -> None:
    (results, samples), (expected, answers) = ours, theirs
    assert samples.keys() == answers.keys() and len(samples) > 0
    for name in samples:
        (shape, found), (same, exact) = numbers(samples[name]), numbers(answers[name])
        assert shape == same, name
        assert found == pytest.approx(exact, abs=2e-3, rel=1e-5), name
        for metric, value in expected[name].items():
            if isinstance(value, float):
                assert results[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("environment")
def test_scores_are_those_of_the_harness_on_transformers(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    manager = write_tasks(tmp_path, 24, long=700)  # more than fits: windows
    import llmapi.lm_eval_model  # noqa: F401  (registers the model)

    hf = {"pretrained": str(checkpoint), "dtype": "float32"}
    theirs = evaluate(manager, "hf", list(TASKS), model_args=hf, device="cpu", batch_size=1)
    own = {"pretrained": str(checkpoint), "cache_dir": str(cache), "kv_cache_config": {"max_tokens": 4096}}
    ours = evaluate(manager, "llmapi", list(TASKS), model_args=own, device="cpu", batch_size=1)
    compare(ours, theirs)
    generated = [resps for _, resps in ours[1]["local_generate"]]
    assert len({str(r) for r in generated}) > 5
    assert all("o" not in r[0][0] for r in generated)


@pytest.mark.usefixtures("environment")
def test_smollm2(tmp_path: Path) -> None:
    file = gguf_file()
    from lm_eval.models.huggingface import HFLM

    from llmapi.lm_eval_model import HarnessModel

    manager, names = write_tasks(tmp_path, 4, long=40), ["choice", "last_word", "whole", "generate"]
    with LLM(file, cache_dir=tmp_path / "cache", kv_cache_config={"max_tokens": 4096}, max_seq_len=512) as llm:
        ours = evaluate(manager, HarnessModel(llm), names)
        tokenizer = llm.tokenizer
    model = by_transformers(file)
    theirs = evaluate(manager, HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, batch_size=1), names)
    compare(ours, theirs)


def instances(*args: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, one, i) for i, one in enumerate(args)]


def test_options_and_chat(llm: LLM) -> None:
    from llmapi.lm_eval_model import HarnessModel

    model = HarnessModel(llm, max_gen_toks=5)
    assert (model.max_length, model.max_gen_toks, model.eot_token_id, model.prefix_token_id) == (512, 5, 1, 0)
    [text] = model.generate_until(instances(("hello", {"until": "x"})), disable_tqdm=True)
    greedy = SamplingParams(temperature=0, max_tokens=5, stop="x")
    assert text == llm.generate("hello", greedy).text
    two = instances(("hello", {"temperature": 1.5, "do_sample": True, "seed": 1, "max_gen_toks": 9}), ("one", {}))
    assert model.generate_until(two)[0] == model.generate_until(two)[0]
    with pytest.raises(ConfigError, match="unknown SamplingParams argument 'num_beans'"):
        model.generate_until(instances(("hello", {"num_beans": 4})))
    with pytest.raises(RequestError, match="max_gen_toks=512 leaves no room"):
        model.generate_until(instances(("hello", {"max_gen_toks": 512})))
    assert model.loglikelihood([]) == [] and model.loglikelihood_rolling([]) == [] and model.generate_until([]) == []
    talk = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(talk) == "<|user|>hi</s><|assistant|>"
    assert model.chat_template(True) == llm.tokenizer.chat_template and model.tokenizer_name
    assert HarnessModel(llm, prefix_token_id=7).prefix_token_id == 7
    assert model.tok_encode("<s>hello") == [0, *llm.tokenizer("hello")["input_ids"]]
    until(lambda: idle(llm))


def test_without_a_tokenizer(checkpoint: Path, cache: Path) -> None:
    from llmapi.lm_eval_model import HarnessModel

    options: dict[str, Any] = {"cache_dir": str(cache), "kv_cache_config": {"max_tokens": 256}}
    with pytest.raises(RequestError, match="needs a tokenizer"):
        HarnessModel(str(checkpoint), skip_tokenizer_init=True, **options)


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, 3, long=5)
    arguments = {"pretrained": str(checkpoint), "cache_dir": str(tmp_path / "cache"), "max_length": 256}
    command = [
        sys.executable, "-m", "llmapi.lm_eval_model", "run", "--model", "llmapi", "--tasks", "local_choice",
        "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()), "--include_path", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout and "llmapi" in done.stdout
