"""Wrong arguments that were once taken silently, or answered with an error of Python's own or about something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmapi import LLM, BeamSearchParams, ConfigError, EngineClosedError, KvCacheConfig, RequestError, SamplingParams


@pytest.mark.parametrize(
    "name",
    ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"],
)
@pytest.mark.parametrize("value", ["false", 0, None])
def test_switches_of_sampling_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}={re.escape(repr(value))}: give True or False$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SamplingParams(bad_words=["x", "y\ud800"]),
            r"^bad_words holds 'y\\ud800', which is not valid Unicode \('\\ud800' at character 1\): replace",
        ),
        (lambda: SamplingParams(stop="\ud800"), r"^stop holds '\\ud800', which is not valid Unicode"),
        (lambda: SamplingParams(stop=b"x"), "stop=b'x': give a list of texts"),  # type: ignore[arg-type]
        (lambda: KvCacheConfig(max_token=5), "did you mean 'max_tokens'"),  # type: ignore[call-arg]
        (lambda: KvCacheConfig(5), "keyword arguments only"),  # type: ignore[misc]
        (
            lambda: BeamSearchParams(beam_width=0, max_tokens=3),
            "^beam_width=0 is out of range: give a whole number from 1 to 256",
        ),
        (lambda: BeamSearchParams(beam_width="x", max_tokens=3), "^beam_width='x': "),  # type: ignore[arg-type]
    ],
)
def test_configurations(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": None}, "tensor_parallel_size=None: give a positive whole number"),
        ({"cache_dir": ""}, "cache_dir is an empty text"),
        ({"tokenizer": ""}, "tokenizer='': give a Hugging Face id or a folder"),
        ({"kv_cache_config": {"max_tokens": 10**13}}, "max_tokens=10000000000000.*lower the max_tokens"),
        ({"max_num_tokens": 8}, "less than max_batch_size=64.* Raise max_num_tokens to 64, or lower max_batch_size"),
    ],
)
def test_arguments_of_llm(checkpoint: Path, cache: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(checkpoint, **{"cache_dir": cache, **options})


def test_a_cache_below_a_file_names_the_file(checkpoint: Path, tmp_path: Path) -> None:
    from llmapi import CacheError

    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=f": {re.escape(str(tmp_path / 'file'))} is a file, not a folder; point"):
        LLM(checkpoint, cache_dir=tmp_path / "file", skip_tokenizer_init=True)


def test_folders_that_cannot_be_saved_to(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/x cannot be made .*: give a folder in a place you may write"):
        llm.save(tmp_path / "file" / "x")
    with pytest.raises(ConfigError, match="cannot be made"):
        llm.save("/proc/x")
    with pytest.raises(ConfigError, match="folder is an empty text"):
        llm.save("")


@pytest.mark.parametrize("call", ["generate", "embed", "encode", "perplexity"])
def test_use_tqdm_is_true_or_false(llm: LLM, call: str) -> None:
    with pytest.raises(ConfigError, match="use_tqdm='no': give True or False"):
        getattr(llm, call)(["hello", "world"], use_tqdm="no")


def test_messages_name_the_argument_that_is_wrong(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"^continuations of type NoneType"):
        llm.score("hello", None)
    with pytest.raises(RequestError, match=r"^texts of type int"):
        llm.embed(3)
    with pytest.raises(RequestError, match=r"^texts of type int"):
        llm.perplexity(3)
    with pytest.raises(RequestError, match="request_id=b'x'"):
        llm.abort(b"x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompt:"):
        llm.generate("hello", [SamplingParams(), SamplingParams()])


def test_a_closed_llm_says_so_before_it_judges_a_request(checkpoint: Path, cache: Path) -> None:
    llm = LLM(checkpoint, cache_dir=cache)
    llm.close()
    calls: list[Callable[[str], Any]] = [llm.generate, llm.generate_async, llm.stream, lambda p: llm.generate([p, p])]
    calls += [llm.embed, llm.encode, llm.perplexity, lambda p: llm.score(p, p)]
    for call in calls:
        with pytest.raises(EngineClosedError, match="this LLM was closed"):
            call("")
