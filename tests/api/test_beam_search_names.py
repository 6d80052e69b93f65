"""LLM.beam_search: vLLM's names for the same search."""

from __future__ import annotations

from typing import Any

import pytest

from llmapi import LLM, BeamSearchOutput, BeamSearchParams, ConfigError, SamplingParams
from tests.api.truth import Truth, prompts_of


def test_it_is_generate_with_beams(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([5, 17], seed=31)
    params = BeamSearchParams(beam_width=3, max_tokens=7, length_penalty=0.5)
    found = llm.beam_search(prompts, params)
    assert isinstance(found, list)
    own = SamplingParams(use_beam_search=True, beam_width=3, n=3, max_tokens=7, length_penalty=0.5, logprobs=0)
    for prompt, one, output in zip(prompts, found, llm.generate(prompts, own), strict=True):
        assert [s.tokens for s in one.sequences] == [prompt + o.token_ids for o in output.outputs]
        assert [s.score for s in one.sequences] == pytest.approx([o.score for o in output.outputs], abs=1e-4)
        for sequence, wanted in zip(one.sequences, output.outputs, strict=True):
            rows = truth.logprobs(sequence.tokens)[len(prompt) - 1 : -1]
            total = sum(row[t].item() for row, t in zip(rows, wanted.token_ids, strict=True))
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
            assert sequence.text == llm.tokenizer.decode(prompt) + wanted.text
            assert len(sequence.logprobs) == len(wanted.token_ids)
            assert (sequence.finish_reason, sequence.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
    single = llm.beam_search("hello", BeamSearchParams(beam_width=2, max_tokens=3, logprobs=None, ignore_eos=True))
    assert isinstance(single, BeamSearchOutput) and single.sequences[0].logprobs == []
    best = single.sequences[0]
    assert best.text is not None and best.text.startswith("hello") and best.score is not None
    assert best.cum_logprob == pytest.approx(best.score * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 4}, "BeamSearchParams needs beam_width"),
        ({"beam_width": 4}, "BeamSearchParams needs max_tokens"),
        ({"beam_width": None, "max_tokens": 4}, "beam_width=None"),
        ({"beam_width": 300, "max_tokens": 4}, "beam_width=300 is out of range"),
        ({"beam_width": 4, "max_tokens": 4, "temperature": 0.5}, "temperature=0.5 with use_beam_search=True"),
        ({"beam_width": 4, "max_tokens": 4, "lenght_penalty": 1}, "did you mean 'length_penalty'"),
    ],
)
def test_what_it_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeamSearchParams(**options)


def test_other_params_are_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="give a BeamSearchParams"):
        llm.beam_search("hello", SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="keyword arguments only"):
        BeamSearchParams(4, 5)  # type: ignore[misc]
