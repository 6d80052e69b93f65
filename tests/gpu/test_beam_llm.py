"""Beam search on a GPU: float32 against transformers on the CPU, beside other requests, with kernels and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from tests.api.beam_truth import by_transformers
from tests.api.truth import Truth, idle, prompts_of, until
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.gpu


def test_beams_are_those_of_transformers(tmp_path: Path, cache: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "llama", hidden_size=256)
    truth = Truth(checkpoint)
    prompts = prompts_of([30, 3, 17, 90, 21, 8], seed=5)
    stop = truth.greedy(prompts[2], 6)[2]
    settings: list[tuple[int, int, list[int], dict[str, Any]]] = [
        (4, 20, [1], {}), (2, 30, [1], {}), (8, 25, [1, stop], {}), (3, 12, [1], {"repetition_penalty": 1.3}),
        (16, 9, [1], {}), (1, 20, [1], {}),
    ]  # fmt: skip
    params = [
        SamplingParams(use_beam_search=True, beam_width=w, n=w, max_tokens=t, stop_token_ids=ends[1:], **more)
        for w, t, ends, more in settings
    ]
    others = [SamplingParams(temperature=0, max_tokens=20), SamplingParams(seed=1, max_tokens=20)] * 2
    torch.backends.cuda.matmul.allow_tf32 = False
    kv = {"max_tokens": 4096, "block_size": 16}
    with LLM(
        checkpoint, backend="cuda", dtype="float32", cache_dir=cache, max_batch_size=64, kv_cache_config=kv
    ) as llm:
        outputs = llm.generate([*prompts, *prompts_of([9, 40, 5, 66])], [*params, *others], use_tqdm=False)
        assert llm._loop._sampler.candidates._select.launches > 10  # type: ignore[attr-defined]
        for prompt, (width, count, ends, more), output in zip(prompts, settings, outputs, strict=False):
            expected = by_transformers(truth, prompt, width, count=count, eos=ends, n=width, **more)
            assert [o.token_ids for o in output.outputs] == [ids for ids, _ in expected]
            for one, (_, score) in zip(output.outputs, expected, strict=True):
                assert score != score or one.score == pytest.approx(score, abs=1e-3)
        until(lambda: idle(llm))
