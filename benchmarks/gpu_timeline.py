"""Where the time between two steps goes: a workload of ``benchmarks/gpu.py`` step by step.

    python benchmarks/gpu_timeline.py --rows llama-2-7b/256

For each step: its sequences and tokens, how long the host took to launch it, and how long it then waited for the tokens
of the step before. Steps of one kind are put together. Where waiting is short, the GPU waits for the host.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu as shapes


def main() -> None:
    """Print the timeline of each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in shapes.ROWS]
    parser.add_argument("--rows", nargs="*", default=["llama-2-7b/256"], choices=names)
    asked = parser.parse_args()
    for name in shapes.MODELS:
        rows = [row for row in shapes.ROWS if row.model == name and row.name in asked.rows]
        if rows:
            run_model(name, rows)


def run_model(name: str, rows: list[shapes.Row]) -> None:
    """Every workload of one model on one LLM."""
    from llmapi import SamplingParams

    with tempfile.TemporaryDirectory() as folder, shapes.dummy_llm(Path(folder), name, rows) as llm:
        seen = watch(llm._loop)
        for row in rows:
            params = SamplingParams(temperature=0, max_tokens=row.tokens_out, ignore_eos=True, detokenize=False)
            prompts = shapes.prompts_of(row)
            for _ in range(2):
                seen.clear()
                start = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - start
            report(row, seen, start, seconds)


def watch(loop: Any) -> list[dict[str, float]]:
    """A list to which the loop appends what each of its steps took."""
    seen: list[dict[str, float]] = []
    launch, land = loop._launch, loop._land

    def timed_launch(plan: Any) -> Any:
        begin = time.perf_counter()
        flight = launch(plan)
        end = time.perf_counter()
        tokens = sum(entry.count for entry in plan.entries)
        seen.append({"seqs": len(plan.entries), "tokens": tokens, "at": begin, "launch": end - begin, "wait": 0.0})
        return flight

    def timed_land(following: Any = None) -> None:
        begin = time.perf_counter()
        land(following)
        if seen:
            seen[-1]["wait"] += time.perf_counter() - begin

    loop._launch, loop._land = timed_launch, timed_land
    return seen


def report(row: shapes.Row, seen: list[dict[str, float]], start: float, seconds: float) -> None:
    """Print the steps, those of one kind together."""
    print(f"\n{row.name}: {seconds:.3f} s, {len(seen)} steps, the first launched after {seen[0]['at'] - start:.4f} s")
    ends = [step["at"] for step in seen[1:]] + [start + seconds]
    for step, end in zip(seen, ends, strict=True):
        step["whole"] = end - step["at"]

    def kind(step: dict[str, float]) -> tuple[float, float]:
        return (step["seqs"], step["tokens"]) if step["tokens"] == step["seqs"] else (-1, round(step["tokens"], -3))

    for _, group in itertools.groupby(seen, key=kind):
        steps = list(group)
        cells = [f"{1e3 * statistics.median(s[k] for s in steps):8.2f}" for k in ("whole", "launch", "wait")]
        first, last = steps[0], steps[-1]
        print(
            f"  {len(steps):4} steps of {first['seqs']:4.0f}..{last['seqs']:4.0f} sequences, {first['tokens']:5.0f}.."
            f"{last['tokens']:5.0f} tokens: median {cells[0]} ms, launch {cells[1]}, wait and commit {cells[2]};"
            f" all {sum(s['whole'] for s in steps):.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
