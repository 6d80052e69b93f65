"""Where the GPU's time goes while it decodes: kernels by name, and how long the GPU is idle.

    python benchmarks/gpu_profile.py --model llama-2-7b --prompts 64 --tokens-in 128 --steps 20

Kernels overlap, so beside the time from its start to its end stands what each one adds: from the end of all before it
to its own. ``#2`` is the second of a name in a row.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gpu as shapes
import torch


def main() -> None:
    """Profile a steady batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", choices=list(shapes.MODELS))
    parser.add_argument("--prompts", type=int, nargs="*", default=[1])
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prefill", action="store_true", help="profile steps with prompts, too")
    asked = parser.parse_args()
    from llmapi import LLM, SamplingParams

    config = {**shapes.COMMON, **shapes.MODELS[asked.model]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        limits: dict[str, Any] = {"max_batch_size": max(asked.prompts), "max_seq_len": asked.tokens_in + 256}
        with LLM(
            folder, backend="cuda", load_format="dummy", skip_tokenizer_init=True, progress=False,
            enable_prefix_caching=False, **limits,
        ) as llm:  # fmt: skip
            for count in asked.prompts:
                rng = random.Random(0)
                prompts = [[rng.randrange(3, 30000) for _ in range(asked.tokens_in)] for _ in range(count)]
                params = SamplingParams(temperature=0, max_tokens=asked.steps + 60, ignore_eos=True, detokenize=False)
                llm.generate(prompts, params, use_tqdm=False)
                started = llm._loop.steps
                thread = threading.Thread(target=lambda p=prompts, s=params: llm.generate(p, s, use_tqdm=False))
                if asked.prefill:
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
                        torch.cuda.synchronize()
                    report(trace, count, llm._loop.steps - started, "prefill")
                    started = llm._loop.steps
                thread.start()
                while llm._loop.steps < started + 30:
                    time.sleep(2e-4)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                    first = llm._loop.steps
                    while llm._loop.steps < first + asked.steps:
                        time.sleep(2e-4)
                    last = llm._loop.steps
                thread.join()
                report(trace, count, last - first, "decode")


def report(trace: Any, prompts: int, steps: int, what: str) -> None:
    """Print kernels by their share of the time."""
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total: dict[str, float] = collections.Counter()
    added: dict[str, float] = collections.Counter()
    calls: dict[str, int] = collections.Counter()
    busy, until, name, turn = 0.0, spans[0][0], "", 0
    for start, end, kernel in spans:
        turn = turn + 1 if kernel == name else 1
        name = kernel
        label = f"{name[:90]} #{turn}"
        total[label] += end - start
        added[label] += max(0.0, end - until)
        calls[label] += 1
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - spans[0][0]
    print(f"\n{what} of {prompts}: {steps} steps, {whole / 1e3 / steps:.3f} ms a step, idle {1 - busy / whole:.1%}")
    for label, us in sorted(added.items(), key=lambda item: -item[1])[:20]:
        n = calls[label]
        print(
            f"  adds {us / steps:>8.1f} us a step: {n / steps:>5.1f} calls, {us / n:>7.2f} us each; "
            f"{total[label] / n:>7.2f} us from start to end  {label}"
        )


if __name__ == "__main__":
    main()
