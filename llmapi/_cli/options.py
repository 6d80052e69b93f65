"""Options that are arguments of LLM and of SamplingParams: what was not typed is left to their own defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmapi._cli import values
from llmapi._cli.parser import Parser


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: the argument of the same name; ``max_tokens`` is typed ``--max-tokens``.
        help: one sentence.
        how: of ``add_argument``; none makes it take a text.
        flag: what is typed, where it is not the name.
    """

    name: str
    help: str
    how: dict[str, Any] = field(default_factory=dict)
    flag: str = ""


_SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
_WHOLE: dict[str, Any] = {"type": values.whole, "metavar": "N"}
_WHOLE_OR_NONE: dict[str, Any] = {"type": values.whole_or_none, "metavar": "N"}
_NUMBER: dict[str, Any] = {"type": values.number, "metavar": "X"}
_TEXTS: dict[str, Any] = {"action": "append", "metavar": "TEXT"}

SAMPLING = (
    Option("n", "sequences to sample from each prompt (1)", _WHOLE),
    Option("temperature", "0 takes the most probable token each time (1)", _NUMBER),
    Option("top_k", "sample from the N most probable tokens; 0 is all (0)", _WHOLE),
    Option("top_p", "sample from the smallest set that has this probability (1)", _NUMBER),
    Option("min_p", "leave out tokens below this times the most probable one (0)", _NUMBER),
    Option("repetition_penalty", "above 1 discourages tokens seen before (1)", _NUMBER),
    Option("presence_penalty", "subtracted from the logits of tokens in the output (0)", _NUMBER),
    Option("frequency_penalty", "subtracted once for each time a token is in the output (0)", _NUMBER),
    Option("seed", "make each request reproducible", _WHOLE),
    Option("stop", "text that ends a sequence; may be given several times", _TEXTS),
    Option("stop_token_ids", "token ids that end a sequence", {"type": values.wholes, "metavar": "ID,ID"}),
    Option("bad_words", "text that never appears; may be given several times", _TEXTS),
    Option("logit_bias", "added to the logits of these tokens", {"type": values.biases, "metavar": "ID=X,ID=X"}),
    Option("ignore_eos", "go on past the model's end-of-sequence tokens", _SWITCH),
    Option("include_stop_str_in_output", "keep the stop text in the output", _SWITCH),
    Option("skip_special_tokens", "leave special tokens out of the text (yes)", _SWITCH),
    Option("spaces_between_special_tokens", "put spaces between special tokens (yes)", _SWITCH),
    Option("min_tokens", "no end before this many tokens (0)", _WHOLE),
    Option("max_tokens", "stop after this many tokens; 'none' goes on to max_seq_len", _WHOLE_OR_NONE),
    Option("logprobs", "log probabilities of N tokens at each position, in --json", _WHOLE),
    Option("prompt_logprobs", "likewise for the prompt, in --json", _WHOLE),
    Option("best_of", "sample N sequences and give the n most probable ones", _WHOLE),
    Option(
        "guided_decoding", "what the text must be: arguments of GuidedDecodingParams, {\"regex\": \"[0-9]+\"} say",
        {"type": values.arguments, "metavar": "JSON"},
    ),
    Option("use_beam_search", "search for the most probable sequences instead of sampling", _SWITCH),
    Option("beam_width", "sequences that a beam search keeps at each step", _WHOLE),
    Option("length_penalty", "of a beam search: above 1 favours longer sequences (1)", _NUMBER),
    Option(
        "early_stopping", "of a beam search: true, false or never (false)",
        {"type": values.early_stopping, "metavar": "WHEN"},
    ),
    Option("num_beam_groups", "groups of beams that search away from each other (1)", _WHOLE),
    Option("diversity_penalty", "what a token loses for each beam of an earlier group that takes it (0)", _NUMBER),
    Option("detokenize", "make text of the output (yes); without it only --json shows the ids", _SWITCH),
)  # fmt: skip
"""The fields of SamplingParams that can be typed: all but functions, tensors and other names of the same."""

ENGINE = (
    Option("revision", "branch, tag or commit on the hub", {"metavar": "REV"}),
    Option("tokenizer", "another model's id, or folder, to take the tokenizer from", {"metavar": "MODEL"}),
    Option("tokenizer_mode", "auto or slow", {"metavar": "MODE"}),
    Option("skip_tokenizer_init", "go without a tokenizer; prompts are token ids then", _SWITCH),
    Option("trust_remote_code", "let the tokenizer run Python code that comes with the model", _SWITCH),
    Option("hf_token", "token for the hub; others on this machine see it, HF_TOKEN is safer", {"metavar": "TOKEN"}),
    Option("refresh", "ask the hub for a newer revision", _SWITCH),
    Option("load_format", "auto, or dummy for random weights", {"metavar": "FORMAT"}),
    Option("backend", "auto, cpu, cuda or tensorrt", {"metavar": "NAME"}),
    Option("target", "GPU architectures of a TensorRT plan, such as sm89,sm120; none for any", {"metavar": "SM,SM"}),
    Option("dtype", "auto, float32, bfloat16 or float16", {"metavar": "TYPE"}),
    Option("max_seq_len", "longest sequence in tokens, prompt and output together", _WHOLE),
    Option("max_batch_size", "most sequences in one step (64)", _WHOLE),
    Option("max_num_tokens", "most tokens in one step (512)", _WHOLE),
    Option("enable_prefix_caching", "let prompts that begin alike share their KV blocks (yes)", _SWITCH),
    Option("gpu_memory_utilization", "share of the GPU's memory to use (0.9)", _NUMBER),
    Option("tensor_parallel_size", "devices to spread the model over (1)", _WHOLE),
    Option(
        "seed", "seed of requests that have none, and of dummy weights; 'none' draws one (0)", _WHOLE_OR_NONE,
        "engine-seed",
    ),
    Option("cache_dir", "root of the build cache (LLMAPI_CACHE_DIR, or the user cache folder)", {"metavar": "FOLDER"}),
    Option("progress", "draw progress bars (where stderr is a terminal)", _SWITCH),
)  # fmt: skip
"""The arguments of LLM, ``kv_cache_config`` apart."""

KV_CACHE = (
    Option("block_size", "tokens a KV block: 8, 16, 32, 64 or 128 (16)", _WHOLE),
    Option("max_tokens", "size of the KV cache in tokens", _WHOLE),
    Option("memory_bytes", "size of the KV cache, e.g. 2GB", {"type": values.size, "metavar": "SIZE"}),
    Option("memory_fraction", "share of the free memory for the KV cache", _NUMBER),
    Option("dtype", "type of keys and values", {"metavar": "TYPE"}),
)
"""The arguments of KvCacheConfig."""


def add_sampling(parser: Parser, *, leave_out: tuple[str, ...] = ()) -> None:
    """Add the options of SamplingParams.

    Args:
        parser: of the verb.
        leave_out: names that mean nothing to the verb.
    """
    group = parser.add_argument_group("sampling", "docs/sampling.md explains them")
    _add(group, "sampling", tuple(o for o in SAMPLING if o.name not in leave_out))


def add_engine(parser: Parser) -> None:
    """Add the model and the options of LLM."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id, folder, .gguf file or saved engine")
    group = parser.add_argument_group("model and engine")
    _add(group, "engine", ENGINE)
    _add(group, "kv", KV_CACHE, "kv-")


def add_model_verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], **words: str) -> Parser:
    """Add a verb that takes one model and the options of LLM.

    Args:
        verbs: where to.
        name: as it is typed after ``llmapi``, ``cache why`` say.
        run: does it.
        words: ``help`` and ``description``.
    """
    parser: Parser = verbs.add_parser(name.split()[-1], usage=f"llmapi {name} [options] MODEL", **words)
    add_engine(parser)
    parser.set_defaults(run=run)
    return parser


def add_cache_dir(parser: Parser) -> None:
    """Add the one option of verbs that need a cache but no model."""
    _add(parser, "engine", tuple(o for o in ENGINE if o.name == "cache_dir"))


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of SamplingParams that were typed."""
    return _typed(args, "sampling", SAMPLING)


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of LLM that were typed, the model apart."""
    given = {"progress": sys.stderr.isatty(), **_typed(args, "engine", ENGINE)}
    if kv_cache := _typed(args, "kv", KV_CACHE):
        given["kv_cache_config"] = kv_cache
    return given


def _add(group: Any, prefix: str, options: tuple[Option, ...], flag_prefix: str = "") -> None:
    for option in options:
        flag = "--" + (option.flag or flag_prefix + option.name.replace("_", "-"))
        dest = f"{prefix}_{option.name}"
        group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=option.help, **option.how)


def _typed(args: argparse.Namespace, prefix: str, options: tuple[Option, ...]) -> dict[str, Any]:
    return {o.name: getattr(args, f"{prefix}_{o.name}") for o in options if hasattr(args, f"{prefix}_{o.name}")}
