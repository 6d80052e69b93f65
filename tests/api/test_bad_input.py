"""What cannot work says so at once: the value, the limit and the remedy. Nothing is left behind, and others go on."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmapi import (
    LLM,
    CapacityError,
    CheckpointError,
    ConfigError,
    KvCacheConfig,
    ModelNotFoundError,
    OfflineError,
    PromptTooLongError,
    RequestError,
    SamplingParams,
    SourceError,
    UnsupportedModelError,
)
from llmapi._build.store import Store
from tests.api.truth import Truth, idle, prompts_of
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


# ---- the model


def start(model: Any, cache: Path, **options: Any) -> None:
    LLM(model, cache_dir=cache, **options).close()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
    ids=["offline", "no network"],
)
def test_unknown_id_without_network(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    code = """
import threading
from llmapi import LLM, OfflineError
try:
    LLM("no-such-org/no-such-model")
except OfflineError as error:
    print(error, threading.active_count())
"""
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert done.stdout.startswith("no-such-org/no-such-model is not on this disk"), done.stderr
    assert message in done.stdout and "pass a local folder" in done.stdout
    assert done.stdout.endswith(" 1\n") and done.stderr == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", r"there is no folder \./no/such/folder"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("missing.gguf", "there is no file missing.gguf"),
        ("what is this?", "neither a folder on this machine nor a Hugging Face id"),
        ("a/b/c", "neither a folder on this machine nor a Hugging Face id"),
        ("x" * 5000, "neither a folder on this machine nor a Hugging Face id"),
        ("nul\0byte", "neither a folder on this machine nor a Hugging Face id"),
    ],
)
def test_names_that_are_nothing(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        start(name, tmp_path)


@pytest.mark.parametrize("model", [None, 5, "", "  ", ["a"], b"model", object()])
def test_models_that_are_no_names(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model=.*Hugging Face id"):
        start(model, tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="holds no files"):
        start(tmp_path / "empty", tmp_path / "cache")


def test_folder_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*load_format='dummy'"):
        start(folder, tmp_path / "cache")


@pytest.mark.parametrize("size", [0, 7, 100, -1], ids=str)
def test_truncated_weights(checkpoint: Path, tmp_path: Path, size: int) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated or corrupt.*fetch or copy it again"):
        start(folder, tmp_path / "cache")
    assert {e.kind for e in Store(tmp_path / "cache").entries()} == {"tokenizer"}
    shutil.copy(checkpoint / "model.safetensors", weights)
    start(folder, tmp_path / "cache")  # mended, and nothing of the failure remains


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            UnsupportedModelError,
            "MambaForCausalLM.*Valid: GPT2",
        ),
        ({"hidden_size": 128}, CheckpointError, r"of another shape.*config\.json wants"),
        ({"num_hidden_layers": 4}, CheckpointError, "9 missing: layers.3"),
        ({"num_hidden_layers": 2}, CheckpointError, "9 unexpected: layers.2"),
        ({"hidden_size": "wide"}, (CheckpointError, UnsupportedModelError), "hidden_size"),
    ],
    ids=["architecture", "shape", "missing", "unexpected", "type"],
)
def test_configs_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], error: Any, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=message):
        start(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""], ids=["open", "list", "empty"])
def test_broken_json(checkpoint: Path, tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name if name != "tokenizer.json" else "tokenizer"):
        start(folder, tmp_path / "cache")


def test_a_folder_without_tokenizer(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    bare = tiny_checkpoint(tmp_path / "bare", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"no (tokenizer|vocabulary).*skip_tokenizer_init=True"):
        start(bare, cache)
    with LLM(bare, cache_dir=cache, skip_tokenizer_init=True) as llm:
        assert llm.generate([7, 8], greedy(3)).outputs[0].token_ids
        for use, what in (
            (lambda: llm.generate("hello"), "a text prompt"),
            (lambda: llm.chat([{"role": "user", "content": "hello"}]), r"chat\(\)"),
            (lambda: llm.generate([7], SamplingParams(stop="x")), "stop"),
            (lambda: llm.generate([7], SamplingParams(bad_words=["x"])), "bad_words"),
        ):
            with pytest.raises(RequestError, match=f"{what} needs a tokenizer"):
                use()
    with LLM(bare, cache_dir=cache, tokenizer=checkpoint) as llm:
        assert llm.generate("hello", greedy(3)).text
    only = tmp_path / "tokenizer only"
    only.mkdir()
    for file in checkpoint.glob("*token*"):
        shutil.copy(file, only)
    for given in (only, str(only), llm.tokenizer):
        with LLM(bare, cache_dir=cache, tokenizer=given) as llm:
            assert llm.generate("hello", greedy(3)).text


# ---- the arguments of LLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batchsize": 4}, "unknown LLM argument 'max_batchsize'; did you mean 'max_batch_size'"),
        ({"self": 1}, "unknown LLM argument 'self'|multiple values"),
        ({"quantum": 4}, "unknown LLM argument 'quantum'. Valid: model, tokenizer, "),
        ({"backend": "cdua"}, "unknown backend 'cdua'; did you mean 'cuda'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean 'float32'"),
        ({"dtype": "float16"}, "float16.*does not run on the cpu backend"),
        ({"dtype": None}, "unknown dtype"),
        ({"load_format": "dumy"}, "unknown load_format 'dumy'; did you mean 'dummy'"),
        ({"tokenizer_mode": "fast"}, "unknown tokenizer_mode 'fast'"),
        ({"tokenizer": 5}, "tokenizer=5: give a Hugging Face id, a folder or a tokenizer"),
        ({"seed": -1}, "seed=-1: give a whole number from 0"),
        ({"seed": "x"}, "seed='x': give a whole number"),
        ({"seed": 1.5}, "seed=1.5: give a whole number"),
        ({"max_seq_len": 0}, "max_seq_len=0: give a positive whole number"),
        ({"max_seq_len": 513}, "max_seq_len=513 is more than the 512 positions"),
        ({"max_seq_len": "512"}, "max_seq_len='512': give a positive whole number"),
        ({"max_batch_size": -3}, "max_batch_size=-3"),
        ({"max_batch_size": True}, "max_batch_size=True"),
        ({"max_num_tokens": 8, "max_batch_size": 16}, "max_num_tokens=8 is less than max_batch_size=16"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization=1.5: give a number in \(0, 1\]"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: the cpu backend runs on one device"),
        ({"kv_cache_config": 5}, "kv_cache_config=5: give a KvCacheConfig or a dict"),
        (
            {"kv_cache_config": {"max_token": 5}},
            "unknown KvCacheConfig argument 'max_token'; did you mean 'max_tokens'",
        ),
        ({"kv_cache_config": {"block_size": 5}}, "block_size=5: give one of 8, 16"),
        ({"kv_cache_config": {"max_tokens": 5}}, "max_tokens=5.* has no room for one block of 16 tokens"),
        ({"kv_cache_config": {"memory_bytes": 5}}, "memory_bytes=5.* has no room for one block"),
        ({"kv_cache_config": {"max_tokens": 64, "memory_bytes": 64}}, "both size the KV cache: give one"),
        ({"kv_cache_config": {"dtype": "int3"}}, "unknown KV cache dtype 'int3'"),
        ({"skip_tokenizer_init": "no"}, "skip_tokenizer_init='no': give True or False"),
        ({"trust_remote_code": 1}, "trust_remote_code=1: give True or False"),
        ({"progress": None}, "progress=None: give True or False"),
        ({"revision": 5}, "revision=5: give a branch, tag or commit"),
        ({"revision": "main"}, "revision='main' is for models on the hub"),
        ({"hf_token": 5}, "hf_token: give a text"),
        ({"cache_dir": 5}, "cache_dir=5: give a folder"),
        ({"cache_dir": "~no such user/x"}, r"cache_dir='~no such user/x' is no path \(no such user\)"),
    ],
    ids=lambda value: json.dumps(value, default=str) if isinstance(value, dict) else "",
)
def test_arguments_of_llm(checkpoint: Path, cache: Path, options: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises((ConfigError, TypeError), match=message):
        LLM(checkpoint, **{"cache_dir": cache, **options})
    assert threading.active_count() == before


def test_a_cache_that_is_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Exception, match=r"cannot be used as cache|LLMAPI_CACHE_DIR") as caught:
        start(checkpoint, tmp_path / "file")
    assert type(caught.value).__name__ == "CacheError"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_start_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmapi._runtime import engine_cpu

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(engine_cpu.Program, "bind", fails)  # the last thing a start does
        with pytest.raises(KeyboardInterrupt):
            start(checkpoint, tmp_path)
    assert threading.active_count() == before
    store = Store(tmp_path)
    kinds = {"tokenizer", "weights", "graph", "engine"}
    assert {e.kind for e in store.entries()} == kinds  # these were whole
    assert {e.kind for e in store.prune(0).removed} == kinds  # nobody holds them
    with monkeypatch.context() as patch:
        patch.setattr("llmapi._build.weights.write_weights", fails)
        with pytest.raises(KeyboardInterrupt):
            start(checkpoint, tmp_path)
    assert [e.kind for e in store.entries()] == ["tokenizer"]  # what comes before the weights
    start(checkpoint, tmp_path)  # no lock is left to wait for
    assert {e.kind for e in store.entries()} == kinds


# ---- prompts


def test_prompts_that_cannot_be(llm: LLM) -> None:
    cases: list[tuple[Any, str]] = [
        ("", "the prompt is empty: give at least one token"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ([300], "prompt token 300 is not in the model's vocabulary: ids go from 0 to 299"),
        ([5, -1], "prompt token -1 is not in"),
        ([2**70], f"prompt token {2**70} is not in"),
        (list(range(5, 205)) * 3, "the prompt has 600 tokens, and max_seq_len=512 leaves room for a prompt of 511"),
        ([5] * 512, "the prompt has 512 tokens"),
        ("bad \ud800 text", "not valid Unicode"),
        (None, "prompts of type NoneType are not known: give a text, a list of token ids"),
        (5, "prompts of type int are not known"),
        (1.5, "prompts of type float are not known"),
        (b"bytes", "prompts of type bytes are not known"),
        ({"text": "hello"}, r"unknown prompt: a dict with the keys \['text'\]"),
        ({"prompt": "hello", "images": []}, r"keys \['images', 'prompt'\]"),
        ({"prompt": 5}, "a prompt of type int is not known"),
        ({"prompt": {"prompt": "x"}}, "prompt is a dict"),
        ({"prompt_token_ids": "text"}, "prompt_token_ids is a str"),
        ({}, r"keys \[\]"),
        ([None], "a prompt of type NoneType is not known"),
        ([True, False], "a prompt of type bool is not known"),
        ([1.0, 2.0], "a prompt of type float is not known"),
        (np.array([1.0, 2.0]), "a prompt of type float is not known"),
        ([[1, "a"]], "a prompt of type list is not known"),
        ([["hello"]], "a prompt of type list is not known"),
        ([b"bytes"], "a prompt of type bytes is not known"),
    ]
    for prompt, message in cases:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompt, greedy(2))
        if not isinstance(prompt, list | np.ndarray) or type(prompt[0]) is int:
            one_message = message.replace("prompts of", "a prompt of").replace("are not known", "is not known")
            with pytest.raises(RequestError, match=one_message):
                llm.stream(prompt, greedy(2))
            with pytest.raises(RequestError, match=one_message):
                llm.generate_async(prompt, greedy(2)).result(5)
    for prompt in ([5] * 512, "hello " * 400):
        with pytest.raises(PromptTooLongError, match="shorten it, or make the LLM with a larger max_seq_len"):
            llm.generate(prompt)
    assert idle(llm)


def test_chats_that_cannot_be(llm: LLM) -> None:
    cases: list[tuple[Any, str]] = [
        ([], "messages is empty"),
        (None, "a conversation must be a list of messages, not NoneType"),
        ("hello", "a conversation must be a list of messages, not str"),
        (5, "a conversation must be a list of messages, not int"),
        ({"role": "user", "content": "x"}, "a conversation must be a list of messages, not dict"),
        ([{"content": "x"}], r"messages\[0\] has role=None"),
        ([{"role": "user"}], r"messages\[0\] has content=None"),
        ([{"role": "user", "content": "x"}, "y"], r"messages\[1\] is 'y', not a dict"),
        (["x"], r"a conversation must be a list of messages, not str: give \[{'role': 'user', 'content': 'Hello'}\], "),
        ([[]], "messages is empty"),
    ]
    for messages, wanted in cases:
        with pytest.raises(RequestError, match=wanted):
            llm.chat(messages)
    with pytest.raises(RequestError, match="refused the messages"):
        llm.chat([{"role": "user", "content": "x"}], chat_template="{{ raise_exception('no') }}")
    good = [{"role": "user", "content": "x"}]
    for name in ("tools", "documents"):
        with pytest.raises(ConfigError, match=f"{name}=5: give a list, or leave {name} out"):
            llm.chat([{"role": "user", "content": "hi"}], **{name: 5})
    for name in ("conversation", "tokenize", "return_dict", "return_tensors"):
        for talks in (good, [good, good]):
            with pytest.raises(
                ConfigError, match=rf"^{name}=False cannot be .*tokenize, return_dict.*: leave out {name}$"
            ):
                llm.chat(talks, **{name: False})  # type: ignore[arg-type]
    outputs = llm.chat([good, [], good], greedy(2))
    assert [o.error is None for o in outputs] == [True, False, True]


def test_a_model_without_chat_template(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").unlink()
    with LLM(folder, cache_dir=cache) as llm, pytest.raises(RequestError, match=r"has no chat template.*Use generate"):
        llm.chat([{"role": "user", "content": "hello"}])


# ---- sampling parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 is out of range: give a whole number at least 1"),
        ({"max_tokens": -5}, "max_tokens=-5 is out of range"),
        ({"max_tokens": "many"}, "max_tokens='many': give a whole number"),
        ({"top_p": 0}, r"top_p=0 is out of range: give a number in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p=1.01 is out of range"),
        ({"top_p": -0.5}, "top_p=-0.5 is out of range"),
        ({"top_p": float("nan")}, "top_p=nan is out of range"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0 would give 2 equal sequences"),
        ({"temprature": 1}, "unknown SamplingParams argument 'temprature'; did you mean 'temperature'"),
    ],
)
def test_sampling_parameters_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


def test_sampling_parameters_that_do_not_fit_the_model(llm: LLM) -> None:
    for params, message in (
        (SamplingParams(logit_bias={300: 1.0}), "logit_bias key 300 is not in the model's vocabulary"),
        (SamplingParams(stop_token_ids=[5, 4000]), "stop_token_ids entry 4000 is not in"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate("hello", params)


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, 5, "greedy", [5], [None], SamplingParams])
def test_sampling_parameters_of_another_type(llm: LLM, wrong: Any) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: llm.generate("hello", wrong),
        lambda: llm.generate(["hello"], wrong),
        lambda: llm.chat([{"role": "user", "content": "hello"}], wrong),
        lambda: llm.stream("hello", wrong),
        lambda: llm.generate_async("hello", wrong),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="give a SamplingParams or a list of them"):
            use()

    async def astream() -> None:
        async for _ in llm.astream("hello", wrong):
            pass

    with pytest.raises(ConfigError, match="give a SamplingParams"):
        asyncio.run(astream())


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="2 sampling_params for 3 prompts: give one for all, or one for each"):
        llm.generate(["a", "b", "c"], [greedy(1), greedy(1)])
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompt:"):
        llm.generate("a", [greedy(1), greedy(1)])


@pytest.mark.parametrize("wrong", [5, None, 1.5, [5], [None]])
def test_ids_to_abort_of_another_type(llm: LLM, wrong: Any) -> None:
    with pytest.raises(RequestError, match="request_id"):
        llm.abort(wrong)


# ---- memory


def test_requests_that_can_never_fit(checkpoint: Path, cache: Path, truth: Truth) -> None:
    with LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 64, "block_size": 8}) as llm:
        [prompt] = prompts_of([20])
        for params in (greedy(45), SamplingParams()):
            with pytest.raises(
                CapacityError, match=r"20 prompt tokens and \d+ new ones can never fit .* 64 tokens: lower"
            ):
                llm.generate(prompt, params)
        for count in (44, None):  # to the last token of the cache; None is as far as it goes
            full = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
            assert full.outputs[0].token_ids == truth.greedy(prompt, 44) and full.outputs[0].finish_reason == "length"
        bad, good = llm.generate([prompt, prompt], [greedy(45), greedy(44)])
        assert isinstance(bad.error, CapacityError) and good.outputs[0].token_ids == truth.greedy(prompt, 44)
        assert idle(llm)


# ---- one of many


def test_one_bad_prompt_of_a_hundred(llm: LLM, truth: Truth, caplog: pytest.LogCaptureFixture) -> None:
    prompts: list[Any] = prompts_of([2 + i % 17 for i in range(100)], seed=91)
    good = list(prompts)
    for bad, error, message in (
        ([5] * 600, PromptTooLongError, "600 tokens"),
        ("", RequestError, "empty"),
        ([7, 300], RequestError, "300"),
        (None, RequestError, "NoneType"),
    ):
        prompts[41] = bad
        caplog.clear()
        outputs = llm.generate(prompts, greedy(5))
        assert len(outputs) == 100
        for i, output in enumerate(outputs):
            if i == 41:
                assert isinstance(output.error, error) and message in str(output.error)
                assert output.finished and output.outputs[0].finish_reason == "error"
                assert (output.text, output.outputs[0].token_ids) == ("", [])
            else:
                assert output.error is None
                assert output.outputs[0].token_ids == truth.greedy(good[i], 5)
        assert "1 of 100 requests failed; the first is prompt 41" in caplog.text
    assert idle(llm)


def test_all_bad_raises_the_first(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["", [300]])


def test_types() -> None:
    """Every error is a ValueError or OSError where plain Python would raise one."""
    assert issubclass(ConfigError, ValueError) and issubclass(RequestError, ValueError)
    assert issubclass(SourceError, OSError) and issubclass(OfflineError, SourceError)
    with pytest.raises(ConfigError):
        KvCacheConfig(max_tokens=0)
