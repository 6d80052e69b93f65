"""A request with a seed gives the same tokens alone, in any company, in another process, and under preemption."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmapi import LLM, SamplingParams
from tests.api.truth import prompts_of

ROOT = Path(__file__).parents[2]


def sampled(seed: int | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 30, "ignore_eos": True, "seed": seed, **options})


def tokens(llm: LLM, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    return [o.token_ids for o in llm.generate(prompt, params).outputs]


def test_alone_and_in_any_batch(llm: LLM, checkpoint: Path, cache: Path) -> None:
    prompts = prompts_of([6, 1, 40, 77, 12, 25], seed=51)
    params = [
        sampled(1), sampled(2, top_p=0.9), sampled(3, top_k=30, n=3), sampled(4, min_p=0.05), sampled(2**64 - 1),
        sampled(0, temperature=3.0, repetition_penalty=1.2),
    ]  # fmt: skip
    alone = [tokens(llm, p, s) for p, s in zip(prompts, params, strict=True)]
    assert len({json.dumps(a) for a in alone}) == 6
    noise = prompts_of([random.Random(i).randrange(1, 60) for i in range(20)], seed=52)
    for trial in range(3):
        order = list(range(26))
        random.Random(trial).shuffle(order)
        batch = [(prompts[i], params[i]) if i < 6 else (noise[i - 6], sampled(None)) for i in order]
        outputs = llm.generate([p for p, _ in batch], [s for _, s in batch])
        for i, output in zip(order, outputs, strict=True):
            if i < 6:
                assert [o.token_ids for o in output.outputs] == alone[i]
    tight = {"max_batch_size": 16, "max_num_tokens": 20, "kv_cache_config": {"max_tokens": 120, "block_size": 8}}
    with LLM(checkpoint, cache_dir=cache, seed=99, **tight) as crowded:
        outputs = crowded.generate(prompts, params)
        assert [[o.token_ids for o in output.outputs] for output in outputs] == alone
        assert sum(o.metrics.preemptions for o in outputs if o.metrics) > 0


def test_one_sequence_is_the_first_of_many(llm: LLM) -> None:
    [prompt] = prompts_of([8], seed=53)
    many = tokens(llm, prompt, sampled(7, n=6))
    assert len({tuple(t) for t in many}) == 6
    for n in (1, 2, 4):
        assert tokens(llm, prompt, sampled(7, n=n)) == many[:n]
    assert tokens(llm, prompt, sampled(8)) != many[:1]


def test_without_a_seed_requests_differ_and_the_llm_repeats(checkpoint: Path, cache: Path) -> None:
    [prompt] = prompts_of([8], seed=54)

    def run(seed: int | None) -> list[list[int]]:
        with LLM(checkpoint, cache_dir=cache, seed=seed) as llm:
            return [o.outputs[0].token_ids for o in llm.generate([prompt] * 4, sampled(None))]

    first = run(0)
    assert len({tuple(t) for t in first}) == 4
    assert run(0) == first
    assert run(1) != first
    assert run(None) != run(None)


def test_another_process_says_the_same(llm: LLM, checkpoint: Path, cache: Path) -> None:
    [prompt] = prompts_of([8], seed=55)
    code = f"""
import json, torch
torch.set_num_threads(2)
from llmapi import LLM, SamplingParams
with LLM({str(checkpoint)!r}, cache_dir={str(cache)!r}, seed=None) as llm:
    params = SamplingParams(n=2, temperature=1.0, max_tokens=30, ignore_eos=True, seed=7)
    print(json.dumps([o.token_ids for o in llm.generate({prompt}, params).outputs]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens(llm, prompt, sampled(7, n=2))
