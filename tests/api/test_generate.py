"""generate() on one prompt: tokens, text, ends and forms, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmapi import LLM, SamplingParams
from tests.api.truth import Truth, forced, prompts_of
from tests.tiny import VOCAB, tiny_checkpoint

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 11},
    "qwen2": {},
    "gpt2": {},
}


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


def tokens(llm: LLM, prompt: Any, params: SamplingParams) -> list[int]:
    return llm.generate(prompt, params).outputs[0].token_ids


# ---- the model's own tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path, cache: Path) -> None:
    folder = tiny_checkpoint(tmp_path / family, family, seed=3, **FAMILIES[family])
    truth = Truth(folder)
    with LLM(folder, cache_dir=cache) as llm:
        for prompt in prompts_of([1, 7, 30], seed=1):
            assert tokens(llm, prompt, greedy(40)) == truth.greedy(prompt, 40)
            varied = truth.greedy(prompt, 60, repetition_penalty=1.6)  # a small model left alone soon repeats itself
            assert len(set(varied)) > 8
            assert tokens(llm, prompt, greedy(60, repetition_penalty=1.6)) == varied


def test_bfloat16_is_near_the_float32_model(checkpoint: Path, cache: Path, truth: Truth) -> None:
    [prompt] = prompts_of([24], seed=2)
    with LLM(checkpoint, cache_dir=cache, dtype="bfloat16") as llm:
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, return_logits="context"))
    exact = truth.logits(prompt)
    error = (output.prompt_logits - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.05


def test_text_is_the_decoded_tokens(llm: LLM, truth: Truth) -> None:
    output = llm.generate("the quick brown fox", greedy(60))
    ids = llm.tokenizer("the quick brown fox")["input_ids"]
    assert output.prompt == "the quick brown fox"
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == truth.greedy(ids, 60)
    assert output.text == llm.tokenizer.decode(truth.greedy(ids, 60), skip_special_tokens=True)
    shown = llm.generate("the quick brown fox", greedy(60, skip_special_tokens=False))
    assert shown.text == llm.tokenizer.decode(truth.greedy(ids, 60), skip_special_tokens=False)


def test_every_form_of_a_prompt_means_the_same(llm: LLM) -> None:
    text = "hello world"
    ids: list[int] = llm.tokenizer(text)["input_ids"]
    expected = tokens(llm, text, greedy(8))
    forms: list[Any] = [
        ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}, {"prompt": text, "prompt_token_ids": ids},
        np.array(ids), torch.tensor(ids), [np.int64(i) for i in ids],
    ]  # fmt: skip
    for form in forms:
        assert tokens(llm, form, greedy(8)) == expected, form
    several = llm.generate([text, *forms], greedy(8))
    assert [o.outputs[0].token_ids for o in several] == [expected] * (len(forms) + 1)
    assert [o.outputs[0].token_ids for o in llm.generate((text, text), greedy(8))] == [expected] * 2
    assert [o.outputs[0].token_ids for o in llm.generate(iter([text]), greedy(8))] == [expected]
    assert llm.generate([]) == []


def test_each_prompt_has_its_own_parameters(llm: LLM) -> None:
    outputs = llm.generate(["one two", "one two", "three"], [greedy(3), greedy(7), greedy(5)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 7, 5]
    assert outputs[1].outputs[0].token_ids[:3] == outputs[0].outputs[0].token_ids
    assert len({o.request_id for o in outputs}) == 3
    assert [o.prompt for o in outputs] == ["one two", "one two", "three"]


def test_chat_is_the_template_and_then_generate(llm: LLM, truth: Truth) -> None:
    talk = [{"role": "user", "content": "hello"}]
    ids = llm.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    output = llm.chat(talk, greedy(12))
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == truth.greedy(ids, 12)
    both = llm.chat(
        [talk, [*talk, {"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]], greedy(12)
    )
    assert both[0].outputs[0].token_ids == truth.greedy(ids, 12)
    assert both[1].outputs[0].token_ids == truth.greedy(both[1].prompt_token_ids, 12)
    closed = llm.chat(talk, greedy(2), add_generation_prompt=False)
    assert closed.prompt_token_ids == ids[: len(closed.prompt_token_ids)] != ids


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = llm.generate("one two three", greedy(5)).metrics
    assert metrics is not None and len(metrics.token_times) == 5
    times = [0.0, metrics.queue_time, metrics.first_token_time, *metrics.token_times[1:], metrics.finished_time]
    assert times == sorted(times)
    assert metrics.first_token_time == metrics.token_times[0]
    assert metrics.time_per_output_token == pytest.approx((metrics.token_times[-1] - metrics.token_times[0]) / 4)


# ---- where a sequence ends


def test_length_is_max_tokens(llm: LLM) -> None:
    done = llm.generate("hello", greedy(1)).outputs[0]
    assert (len(done.token_ids), done.finish_reason, done.stop_reason) == (1, "length", None)


def test_length_is_max_seq_len(checkpoint: Path, cache: Path, truth: Truth) -> None:
    [prompt] = prompts_of([20])
    with LLM(checkpoint, cache_dir=cache, max_seq_len=32) as llm:
        for params in (greedy(200), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)):
            done = llm.generate(prompt, params).outputs[0]
            assert done.token_ids == truth.greedy(prompt, 12)
            assert done.finish_reason == "length"
        [longest] = prompts_of([31])
        assert tokens(llm, longest, greedy(200)) == truth.greedy(longest, 1)


@pytest.fixture(scope="module")
def several_ends(
    checkpoint: Path, cache: Path, truth: Truth, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """The tiny llama with a list of end tokens in generation_config.json: 1, and one that it says soon."""
    folder = tmp_path_factory.mktemp("ends") / "model"
    shutil.copytree(checkpoint, folder)
    end = truth.greedy(prompts_of([9])[0], 30)[6]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    with LLM(folder, cache_dir=cache) as llm:
        yield llm


def test_end_tokens_come_from_generation_config(several_ends: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([9])
    full = truth.greedy(prompt, 30)
    end = full[6]
    expected = full[: full.index(end) + 1]
    assert truth.greedy(prompt, 30, eos=[1, end]) == expected
    done = several_ends.generate(prompt, SamplingParams(temperature=0, max_tokens=30)).outputs[0]
    assert (done.token_ids, done.finish_reason, done.stop_reason) == (expected, "stop", None)
    assert done.text == several_ends.tokenizer.decode(expected[:-1])
    kept = SamplingParams(temperature=0, max_tokens=30, include_stop_str_in_output=True)
    assert several_ends.generate(prompt, kept).text == several_ends.tokenizer.decode(expected)
    assert tokens(several_ends, prompt, greedy(30)) == full
    held = SamplingParams(temperature=0, max_tokens=30, min_tokens=len(expected) + 3)
    done = several_ends.generate(prompt, held).outputs[0]
    assert done.token_ids == truth.greedy(prompt, 30, eos=[1, end], min_new_tokens=len(expected) + 3)
    assert len(done.token_ids) >= len(expected) + 3


def test_the_tokenizers_own_end_token_ends(llm: LLM) -> None:
    ids = llm.tokenizer("one two", add_special_tokens=False)["input_ids"]
    says = SamplingParams(temperature=0, max_tokens=50, logits_processors=[forced(ids)])
    done = llm.generate("hello", says).outputs[0]
    assert (done.token_ids, done.text, done.finish_reason) == ([*ids, 1], "one two", "stop")
    kept = SamplingParams(
        temperature=0, max_tokens=50, logits_processors=[forced(ids)], include_stop_str_in_output=True,
        skip_special_tokens=False,
    )  # fmt: skip
    assert llm.generate("hello", kept).text == "one two</s>"
    on = SamplingParams(temperature=0, max_tokens=50, logits_processors=[forced(ids)], ignore_eos=True)
    assert tokens(llm, "hello", on) == [*ids, *[1] * (50 - len(ids))]


def test_stop_token_ids(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([12], seed=4)
    full = truth.greedy(prompt, 30)
    end = full[9]
    cut = full[: full.index(end) + 1]
    done = llm.generate(prompt, greedy(30, stop_token_ids=[end])).outputs[0]  # ignore_eos does not touch these
    assert (done.token_ids, done.finish_reason, done.stop_reason) == (cut, "stop", end)
    assert done.text == llm.tokenizer.decode(cut[:-1])


def test_stop_text_that_spans_tokens(llm: LLM) -> None:
    ids = [i for c in "one ab##ba two" for i in llm.tokenizer(c, add_special_tokens=False)["input_ids"]]
    assert len(ids) == 14
    base = {"temperature": 0.0, "max_tokens": 40, "logits_processors": [forced(ids)]}
    for stop, text, used in (
        ("##", "one ab", 8),
        (["zz", "b#", "#b"], "one a", 7),
        ("###", "one ab##ba two", 15),
        (" two", "one ab##ba", 14),
    ):
        done = llm.generate("hello", SamplingParams(stop=stop, **base)).outputs[0]
        assert (done.text, len(done.token_ids)) == (text, used), stop
        found = None if stop == "###" else stop if isinstance(stop, str) else "b#"
        assert (done.finish_reason, done.stop_reason) == ("stop", found)
        kept = llm.generate("hello", SamplingParams(stop=stop, include_stop_str_in_output=True, **base)).outputs[0]
        assert kept.text == text + (found or "")
    late = llm.generate("hello", SamplingParams(stop="##", min_tokens=9, **base)).outputs[0]
    assert late.text == "one ab##ba two"  # it was complete before the ninth token
    last = {**base, "max_tokens": 8}
    done = llm.generate("hello", SamplingParams(stop="##", **last)).outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("one ab", "stop", "##")
    held = {**base, "max_tokens": 7}
    done = llm.generate("hello", SamplingParams(stop="##", **held)).outputs[0]
    assert (done.text, done.finish_reason) == ("one ab#", "length")


def test_characters_that_span_tokens(llm: LLM) -> None:
    text = "naïve ☃ 日本語 👩‍👩‍👧 end"
    ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    says = SamplingParams(temperature=0, max_tokens=100, logits_processors=[forced(ids)])
    states = list(llm.stream("hello", says))
    assert states[-1].text == text
    for state in states[:-1]:
        assert text.startswith(state.text)
    cut = SamplingParams(temperature=0, max_tokens=3, logits_processors=[forced(ids)])
    assert ids[2] != ids[3] and llm.generate("hello", cut).text == llm.tokenizer.decode(ids[:3])
    stopped = SamplingParams(temperature=0, max_tokens=100, logits_processors=[forced(ids)], stop="本")
    assert llm.generate("hello", stopped).text == "naïve ☃ 日"


def test_without_text(llm: LLM, checkpoint: Path, cache: Path, truth: Truth) -> None:
    ids = llm.tokenizer("hello world")["input_ids"]
    plain = llm.generate("hello world", greedy(10, detokenize=False, logprobs=1)).outputs[0]
    assert (plain.text, plain.token_ids) == ("", truth.greedy(ids, 10))
    assert plain.logprobs is not None and plain.logprobs[0][plain.token_ids[0]].decoded_token is None
    with LLM(checkpoint, cache_dir=cache, skip_tokenizer_init=True) as bare:
        assert bare.tokenizer is None
        done = bare.generate(ids, greedy(10)).outputs[0]
        assert (done.text, done.token_ids, done.finish_reason) == ("", truth.greedy(ids, 10), "length")
        eos = SamplingParams(temperature=0, max_tokens=50, logits_processors=[forced([7, 8])])
        assert tokens(bare, ids, eos) == [7, 8, 1]  # config.json names the end token


def test_spaces_between_special_tokens_is_accepted(llm: LLM) -> None:
    params = greedy(5, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert llm.generate("hello", params).text


def test_the_whole_vocabulary_can_be_a_prompt(llm: LLM, truth: Truth) -> None:
    everything = list(range(VOCAB))
    assert tokens(llm, everything, greedy(4)) == truth.greedy(everything, 4)
