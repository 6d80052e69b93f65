"""Options: those of the API, typed; and values as they are typed."""

from __future__ import annotations

import shlex
from argparse import ArgumentTypeError
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest

from llmapi import LLM, KvCacheConfig, SamplingParams
from llmapi._cli import options
from llmapi._cli.text import age_text
from llmapi._cli.values import arguments, size


def test_every_argument_of_the_api_can_be_typed() -> None:
    known = {o.name for o in options.SAMPLING}
    untyped = {"logits_processors", "return_logits", "structured_outputs"}
    assert known == {f.name for f in fields(SamplingParams)} - untyped
    known = {o.name for o in options.ENGINE} | {"model", "kv_cache_config"}
    assert known == set(signature(LLM).parameters) - {"unknown"}
    assert {o.name for o in options.KV_CACHE} == {f.name for f in fields(KvCacheConfig)}


def test_every_option_arrives_as_it_was_typed() -> None:
    words = shlex.split(
        "--n 2 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty -0.5 "
        "--frequency-penalty 0.5 --seed 7 --stop END --stop . --stop-token-ids 3,4 --bad-words bad "
        "--logit-bias 3=-1.5,4=2 --ignore-eos --include-stop-str-in-output --no-skip-special-tokens "
        "--no-spaces-between-special-tokens --min-tokens 2 --max-tokens none --logprobs 1 --prompt-logprobs 0 "
        "--no-detokenize --use-beam-search --beam-width 4 --length-penalty 0.5 --early-stopping never "
        '--num-beam-groups 2 --diversity-penalty 0.3 --best-of 4 --guided-decoding \'{"regex": "[0-9]+"}\''
    )
    given = options.sampling_arguments(parse("generate", "model", *words))
    assert given == {
        "n": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.5, "seed": 7, "stop": ["END", "."], "stop_token_ids": [3, 4],
        "bad_words": ["bad"], "logit_bias": {3: -1.5, 4: 2.0}, "ignore_eos": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "min_tokens": 2, "max_tokens": None,
        "logprobs": 1, "prompt_logprobs": 0, "detokenize": False, "use_beam_search": True, "beam_width": 4,
        "length_penalty": 0.5, "early_stopping": "never", "num_beam_groups": 2, "diversity_penalty": 0.3,
        "best_of": 4, "guided_decoding": {"regex": "[0-9]+"},
    }  # fmt: skip
    words = shlex.split(
        "--revision r --tokenizer t --tokenizer-mode slow --skip-tokenizer-init --trust-remote-code --hf-token x "
        "--refresh --load-format dummy --backend cpu --dtype bfloat16 --max-seq-len 64 --max-batch-size 2 "
        "--max-num-tokens 32 --no-enable-prefix-caching --gpu-memory-utilization 0.5 --tensor-parallel-size 1 "
        "--engine-seed none --cache-dir c --no-progress --kv-block-size 32 --kv-max-tokens 96 --kv-memory-bytes 2GB "
        "--kv-memory-fraction 0.5 --kv-dtype bfloat16"
    )
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


def test_arguments_are_a_json_object() -> None:
    assert arguments('{"choice": ["a"]}') == {"choice": ["a"]}
    for wrong in ("", "[1]", "regex=a", "{"):
        with pytest.raises(ArgumentTypeError):
            arguments(wrong)


def test_sizes_and_ages() -> None:
    sizes = {"50GB": 50 * 10**9, "1.5 MiB": 3 << 19, "0": 0, "7": 7, "2kb": 2000, "1T": 10**12}
    assert {text: size(text) for text in sizes} == sizes
    for wrong in ("", "GB", "5XB", "-1", "1iB", "1e9"):
        with pytest.raises(ArgumentTypeError):
            size(wrong)
    ages = {-5: "0 s", 59: "59 s", 60: "1 min", 7199: "1 h", 86400: "1 day", 200_000: "2 days"}
    assert {seconds: age_text(seconds) for seconds in ages} == ages
