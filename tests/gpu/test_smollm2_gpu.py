"""SmolLM2-135M-Instruct in bfloat16 on a GPU against transformers on the same GPU: 64 prompts in one batch.

The measure is transformers' own model in float32, and what it loses in bfloat16: it reads each prompt and our answer in
both. How far bfloat16 takes two logits from each other depends on the place, so a fixed limit would be wrong: where
transformers' logits are off by 0.3, no token within that of the first can be called wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from tests.api.test_smollm2 import by_transformers, gguf_file

pytestmark = pytest.mark.gpu
SUBJECTS = ["the sea", "a violin", "Paris", "the number seven", "bread", "winter", "a comet", "trust"]
TASKS = [
    "Write one sentence about {}.",
    "What is {}?",
    "Explain {} to a child of five, slowly and with an example. " * 3,
    "Give me three words that go with {}.",
    "Translate '{}' into Spanish, Italian and German. " + "Take your time. " * 40,
    "Why do people like {}? Answer in two sentences.",
    "Write a short poem about {} that does not rhyme.",
    "Is {} older than the moon? Say yes or no, and why.",
]


def test_answers_are_those_of_transformers_up_to_rounding(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = gguf_file()
    talks = [[{"role": "user", "content": task.replace("{}", subject)}] for subject in SUBJECTS for task in TASKS]
    params = SamplingParams(temperature=0, max_tokens=48)
    with LLM(file, backend="cuda", dtype="bfloat16", cache_dir=cache, gpu_memory_utilization=0.3) as llm:
        outputs = llm.chat(talks, params, use_tqdm=False)
        told = llm.chat(talks, SamplingParams(temperature=0, max_tokens=48, return_logits="generation"), use_tqdm=False)
        assert isinstance(outputs, list) and isinstance(told, list)
        alone = llm.chat(talks[5], params)
    exact = by_transformers(file).to("cuda")
    rounded = by_transformers(file).to("cuda", torch.bfloat16)
    total = differ = 0
    largest = places = 0.0
    ours, theirs = [], []
    for output in outputs:
        prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
        truth, other = read(exact, prompt, answer), read(rounded, prompt, answer)
        choice = torch.tensor(answer, device="cuda")
        gap = truth.amax(-1) - chosen(truth, choice)
        error = (other - truth).abs().amax(-1)
        assert bool((gap <= 2 * error).all()), (output.prompt_token_ids, answer, gap.tolist(), error.tolist())
        total += len(answer)
        differ += int((other.argmax(-1) != choice).sum())
        largest = max(largest, float(((other.amax(-1) - chosen(other, choice)) / other.amax(-1).abs()).max()))
        places = max(places, float((gap / error).max()))
    for output in told:
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        assert completion.logits is not None
        assert completion.logits.argmax(-1).tolist() == completion.token_ids
        truth, other = (read(model, prompt, completion.token_ids) for model in (exact, rounded))
        ours.append((completion.logits.cuda() - truth).norm(dim=-1) / truth.norm(dim=-1))
        theirs.append((other - truth).norm(dim=-1) / truth.norm(dim=-1))
    assert "Paris" in outputs[16].text
    assert isinstance(alone, type(outputs[0])) and alone.text[:20] == outputs[5].text[:20]
    off, by_them = torch.cat(ours), torch.cat(theirs)
    with capsys.disabled():
        print(
            f"\n{total} tokens of 64 answers: {differ} are not the first of transformers in bfloat16, whose logits say "
            f"{largest:.4f} less of them at most; in float32 they are up to {places:.2f} of bfloat16's error below the "
            f"first; logits off by {off.mean():.4f}, at most {off.max():.4f}; those of transformers in bfloat16 by "
            f"{by_them.mean():.4f}, at most {by_them.max():.4f}"
        )
    assert off.mean() <= 1.1 * by_them.mean() and off.max() <= 1.5 * by_them.max()


@torch.no_grad()
def read(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """``[len(answer), V]`` float32: the logits from which each token of the answer is chosen."""
    logits: torch.Tensor = model(torch.tensor([prompt + answer], device="cuda")).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``[N]``: each row's logit of one token."""
    return logits.gather(1, ids[:, None])[:, 0]
