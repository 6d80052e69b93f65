"""Beam search finds what transformers' ``generate(num_beams=...)`` finds: the same sequences, the same scores.

Float32 on the CPU, random tiny models of each family, hundreds of random settings. Where two candidates are closer than
the rounding of float32 either may win; such a case would show as other sequences with the same scores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from tests.api.beam_truth import Counted, Scored, by_transformers, group_oracle, ours
from tests.api.truth import Truth, idle, prompts_of, until
from tests.tiny import VOCAB, tiny_checkpoint

CLOSE = 1e-4
FAMILIES = ["llama", "qwen2", "gpt2", "mistral"]


class Model:
    """One checkpoint, here and there."""

    def __init__(self, folder: Path, cache: Path, family: str) -> None:
        checkpoint = tiny_checkpoint(folder / family, family, seed=3)
        self.truth = Truth(checkpoint)
        kv = {"max_tokens": 16384, "block_size": 8}
        self.llm = LLM(checkpoint, cache_dir=cache, max_batch_size=64, kv_cache_config=kv, progress=False)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Model]:
    made = Model(tmp_path_factory.mktemp("beams"), cache, request.param)
    with made.llm:
        yield made
        until(lambda: idle(made.llm))


def same(actual: Scored, expected: Scored, what: object) -> None:
    assert [ids for ids, _ in actual] == [ids for ids, _ in expected], (what, actual, expected)
    for (_, a), (_, e) in zip(actual, expected, strict=True):
        if e == e:
            assert a == pytest.approx(e, abs=CLOSE), what


def setting(rng: random.Random, truth: Truth, prompt: list[int], width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random arguments of SamplingParams, and what they are for :func:`by_transformers`."""
    count = rng.randint(1, 14)
    often = truth.greedy(prompt, 12)  # tokens that this model likes to say
    stops = rng.sample(sorted(set(often)), min(len(set(often)), rng.choice([0, 1, 1, 2, 4])))
    ignore = rng.random() < 0.3
    mine: dict[str, Any] = {
        "max_tokens": count, "stop_token_ids": stops, "ignore_eos": ignore,
        "length_penalty": rng.choice([1.0, 1.0, 0.0, -1.0, 2.0, 0.6]),
        "early_stopping": rng.choice([True, False, "never"]), "n": rng.choice([1, width, rng.randint(1, width)]),
    }  # fmt: skip
    theirs: dict[str, Any] = {
        "count": count, "eos": sorted({*stops, *([] if ignore else [1])}), "n": mine["n"],
        "length_penalty": mine["length_penalty"], "early_stopping": mine["early_stopping"],
    }  # fmt: skip
    if rng.random() < 0.3 and theirs["eos"]:
        mine["min_tokens"] = theirs["min_new_tokens"] = rng.randint(1, count)
    if rng.random() < 0.3:
        mine["repetition_penalty"] = theirs["repetition_penalty"] = rng.choice([0.8, 1.3])
    if rng.random() < 0.2:
        mine["logit_bias"] = {rng.choice(often): rng.choice([-1.5, 2.0]), 50: 1.0}
        theirs["sequence_bias"] = {(token,): value for token, value in mine["logit_bias"].items()}
    if rng.random() < 0.2:
        mine |= {"presence_penalty": 0.7, "frequency_penalty": 0.4}
        theirs["processors"] = [Counted(len(prompt), 0.7, 0.4)]
    return mine, theirs


@pytest.mark.parametrize("seed", range(6))
def test_settings_at_random(model: Model, seed: int) -> None:
    """All of a seed's requests run in one batch; each is compared on its own."""
    rng = random.Random(seed)
    prompts = prompts_of([rng.randint(1, 40) for _ in range(14)], seed)
    params, expected = [], []
    for prompt in prompts:
        width = rng.choice([1, 2, 2, 3, 4, 4, 5, 8, 11, 16])
        mine, theirs = setting(rng, model.truth, prompt, width)
        if width == 1:
            mine["n"] = theirs["n"] = 1
            for name in ("length_penalty", "early_stopping"):
                del theirs[name]
        params.append(SamplingParams(use_beam_search=True, beam_width=width, **mine))
        expected.append(by_transformers(model.truth, prompt, width, **theirs))
    outputs = model.llm.generate(prompts, params, use_tqdm=False)
    for output, own, wanted in zip(outputs, params, expected, strict=True):
        same(ours(output), wanted, own)


def test_a_wide_beam(model: Model) -> None:
    [prompt] = prompts_of([11], seed=8)
    stops = model.truth.greedy(prompt, 6)[2:5]
    params = SamplingParams(use_beam_search=True, beam_width=64, n=64, max_tokens=9, stop_token_ids=stops)
    expected = by_transformers(model.truth, prompt, 64, count=9, eos=[1, *stops], n=64)
    same(ours(model.llm.generate(prompt, params)), expected, params)


def test_bad_words(model: Model) -> None:
    tokenizer = model.llm.tokenizer
    changed = 0
    for prompt in prompts_of([4, 17, 23, 9, 30, 2], seed=5):
        plain = by_transformers(model.truth, prompt, 4, count=10, eos=[1], n=4)
        tokens = [t for ids, _ in plain for t in ids if tokenizer.decode([t]).strip()]
        words = sorted(
            {tokenizer.decode([t]).strip() for t in tokens if t > 4 and "\ufffd" not in tokenizer.decode([t])}
        )
        words = words[:3]
        if not words:
            continue
        encoded = [tokenizer(v, add_special_tokens=False)["input_ids"] for w in words for v in (w, " " + w)]
        expected = by_transformers(model.truth, prompt, 4, count=10, eos=[1], n=4, bad_words_ids=encoded)
        params = SamplingParams(use_beam_search=True, beam_width=4, n=4, max_tokens=10, bad_words=words)
        same(ours(model.llm.generate(prompt, params)), expected, words)
        changed += expected != plain
    assert changed


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(("width", "groups", "penalty"), [(4, 2, 0.5), (6, 3, 1.5), (4, 4, 0.3), (8, 2, 3.0)])
def test_groups(model: Model, width: int, groups: int, penalty: float, early_stopping: Any) -> None:
    """Against the published definition in float64; transformers has moved it out."""
    cache: dict[tuple[int, ...], torch.Tensor] = {}

    def logprobs(ids: list[int]) -> torch.Tensor:
        if tuple(ids) not in cache:
            cache[tuple(ids)] = model.truth.logprobs(ids)[-1]
        return cache[tuple(ids)]

    for number, prompt in enumerate(prompts_of([5, 12, 21], seed=width)):
        stops = model.truth.greedy(prompt, 6)[number + 1 : number + 3]
        factor = [1.0, 0.0, -0.5][number]
        params = SamplingParams(
            use_beam_search=True, beam_width=width, num_beam_groups=groups, diversity_penalty=penalty, n=width,
            max_tokens=7, stop_token_ids=stops, early_stopping=early_stopping, length_penalty=factor,
        )  # fmt: skip
        expected = group_oracle(
            logprobs, prompt, width=width, groups=groups, penalty=penalty, count=7, eos=[1, *stops], n=width,
            length_penalty=factor, early_stopping=early_stopping,
        )  # fmt: skip
        same(ours(model.llm.generate(prompt, params)), expected, params)


def test_one_group_is_beam_search(model: Model) -> None:
    """The oracle itself: with one group it finds what transformers does."""
    for prompt in prompts_of([6, 13], seed=77):
        stops = model.truth.greedy(prompt, 6)[1:3]
        expected = by_transformers(model.truth, prompt, 4, count=7, eos=stops, n=4)
        told = group_oracle(
            lambda ids: model.truth.logprobs(ids)[-1], prompt, width=4, groups=1, penalty=0.0, count=7, eos=stops, n=4,
            length_penalty=1.0, early_stopping=False,
        )  # fmt: skip
        same(told, expected, stops)


def test_every_token_of_a_small_vocabulary(model: Model) -> None:
    """More beams than the first step has candidates beyond them."""
    [prompt] = prompts_of([3], seed=9)
    params = SamplingParams(use_beam_search=True, beam_width=64, n=5, max_tokens=2, logit_bias={7: 5.0})
    expected = by_transformers(model.truth, prompt, 64, count=2, eos=[1], n=5, sequence_bias={(7,): 5.0})
    same(ours(model.llm.generate(prompt, params)), expected, params)
    assert VOCAB > 64
