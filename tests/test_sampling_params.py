"""SamplingParams: defaults, ranges, and messages that say what to do."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest

from llmapi.errors import ConfigError, LLMAPIError
from llmapi.sampling import SamplingParams

DEFAULTS = {
    "n": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": None, "stop": (), "stop_token_ids": (),
    "bad_words": (), "logit_bias": {}, "ignore_eos": False, "include_stop_str_in_output": False,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "min_tokens": 0, "max_tokens": 256,
    "logprobs": None, "prompt_logprobs": None, "logits_processors": (), "detokenize": True, "return_logits": False,
    "guided_decoding": None, "structured_outputs": None, "best_of": None,
    "use_beam_search": False, "beam_width": None, "length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}  # fmt: skip


def identity(output: list[int], logits: Any) -> Any:
    return logits


def test_defaults() -> None:
    p = SamplingParams()
    assert {f.name: getattr(p, f.name) for f in dataclasses.fields(p)} == DEFAULTS
    assert not p.greedy and not p.needs_prompt_logits


def test_every_field_is_documented() -> None:
    doc = SamplingParams.__doc__ or ""
    for field in dataclasses.fields(SamplingParams):
        assert f"        {field.name}: " in doc, field.name


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 2, 1024], [0, -1, 1025, 1.0, "1", True, None]),
        ("temperature", [0, 0.0, 1, 0.7, 100.0], [-0.1, math.inf, math.nan, "1", None, True]),
        ("top_k", [-1, 0, 1, 10**6], [-2, 1.5, None, True]),
        ("top_p", [1e-9, 0.5, 1, 1.0], [0, 0.0, 1.01, -0.5, math.nan, None]),
        ("min_p", [0, 0.5, 1], [-0.01, 1.01, math.nan, None]),
        ("repetition_penalty", [0.01, 1, 2.5], [0, 0.0, -1, math.inf, math.nan]),
        ("presence_penalty", [-2, 0, 2.0], [-2.01, 2.01, math.nan, "0"]),
        ("frequency_penalty", [-2, 0, 2.0], [-2.01, 2.01, math.nan, "0"]),
        ("seed", [None, 0, 2**64 - 1], [-1, 2**64, 1.0, True]),
        ("min_tokens", [0, 256], [-1, 1.0, None]),
        ("max_tokens", [1, 10**6, None], [0, -1, 2.0, True]),
        ("logprobs", [None, 0, 1024], [-1, 1025, 1.0, True]),
        ("prompt_logprobs", [None, 0, 1024], [-1, 1025, 1.0, True]),
        ("stop", [None, "x", ["x", "yz"], ("x",), []], ["", [""], [1], {"x"}, 5]),
        ("stop_token_ids", [None, [], [0, 5], (1,)], [[-1], [1.0], ["1"], "12", 5, [True]]),
        ("bad_words", [None, [], ["x"]], ["x", [""], [1], 5]),
        ("logit_bias", [None, {}, {0: 1}, {5: -100.0}], [{-1: 1.0}, {"a": 1.0}, {0: 101}, {0: math.nan}, [1]]),
        ("logits_processors", [None, [], [identity], (identity,)], [identity, [1], 5]),
        ("return_logits", [True, False, None, "context", "generation", "both"], ["all", 2, "Both"]),
    ],
)  # fmt: skip
def test_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        SamplingParams(**{name: value})
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert name in message, message
        shown = value if not isinstance(value, (list, tuple, dict, set)) else next(iter(value), value)
        assert callable(value) or str(shown) in message or repr(shown) in message, message


def test_errors_are_both_kinds() -> None:
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=2.0)
    with pytest.raises(LLMAPIError):
        SamplingParams(top_p=2.0)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'temprature'; did you mean 'temperature'\?.*top_k"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="keyword"):
        SamplingParams(0.5)  # type: ignore[call-arg, arg-type, misc]


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="n=2 with temperature=0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ConfigError, match="min_tokens=9 is more than max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    SamplingParams(min_tokens=900, max_tokens=None)
    with pytest.raises(ConfigError, match="stop_token_ids"):
        SamplingParams(stop=["x"], detokenize=False)


def test_values_are_normalized_and_copied() -> None:
    stop, bias = ["a", "b"], {1: 2}
    p = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("c")
    bias[2] = 3
    assert p.stop == ("a", "b") and p.logit_bias == {1: 2.0}
    assert SamplingParams(stop="ab").stop == ("ab",)


def test_properties() -> None:
    assert SamplingParams(temperature=0).greedy
    for value, generation, context in [
        (True, True, False),
        ("generation", True, False),
        ("context", False, True),
        ("both", True, True),
        (False, False, False),
    ]:
        p = SamplingParams(return_logits=value)  # type: ignore[arg-type]
        assert (p.returns_generation_logits, p.returns_context_logits) == (generation, context)
        assert p.needs_prompt_logits == context
    assert SamplingParams(prompt_logprobs=0).needs_prompt_logits


def test_frozen_equal_and_replaceable() -> None:
    p = SamplingParams(temperature=0.5, stop="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.temperature = 1.0  # type: ignore[misc]
    assert dataclasses.replace(p, top_k=3) == SamplingParams(temperature=0.5, stop="x", top_k=3)
    with pytest.raises(ConfigError, match="top_p"):
        dataclasses.replace(p, top_p=0.0)


def test_copy_and_pickle() -> None:
    p = SamplingParams(temperature=0.5, stop=["x"], logit_bias={1: 2.0})
    assert copy.deepcopy(p) == p == copy.copy(p)
    assert pickle.loads(pickle.dumps(p)) == p


def test_import_is_cheap() -> None:
    code = (
        "import sys, llmapi, llmapi.sampling, llmapi._tokenizer, llmapi._runtime.stop\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
