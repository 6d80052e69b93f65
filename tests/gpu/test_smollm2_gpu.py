"""SmolLM2-135M-Instruct in bfloat16 on a GPU against transformers on the same GPU: 64 prompts in one batch.

transformers reads each prompt and our answer at once. At every position our token must be the one it would choose, or
one whose logit is within the rounding of bfloat16 of that one's.
"""

from __future__ import annotations

from pathlib import Path

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
        assert isinstance(outputs, list)
        alone = llm.chat(talks[5], params)
    model = by_transformers(file).to("cuda", torch.bfloat16)
    total = differ = 0
    worst = 0.0
    for output in outputs:
        prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device="cuda")).logits[0].float()
        rows = logits[len(prompt) - 1 : -1]
        best, theirs = rows.max(-1)
        ours = rows.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        gap = ((best - ours) / best.abs()).cpu()
        total += len(answer)
        differ += int((theirs.cpu() != torch.tensor(answer)).sum())
        worst = max(worst, float(gap.max()))
        assert float(gap.max()) <= 4 * 2**-8, (output.prompt, float(gap.max()))
    assert "Paris" in outputs[16].text
    assert isinstance(alone, type(outputs[0])) and alone.text[:20] == outputs[5].text[:20]
    with capsys.disabled():
        print(f"\n{total} tokens of 64 answers: {differ} differ, largest relative gap of the logits {worst:.4f}")
