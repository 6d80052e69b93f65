"""Generation on a GPU with random weights: the workloads of docs/performance.md, each beside the limit of the chip.

    python benchmarks/gpu.py                          # every row
    python benchmarks/gpu.py --rows llama-2-7b/64     # some of them
    python benchmarks/gpu.py --json results.json

A row is a model's shape and a number of prompts, ``prompts x in/out``; greedy, end of sequence ignored. Rates count
output tokens over the whole run, prompts included. Each workload runs twice in one process: the first run compiles,
captures and warms up, the second is measured; ``--repeats`` measures more of them and reports the median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA2_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA31_8B: dict[str, Any] = {
    **LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {"llama-2-7b": LLAMA2_7B, "llama-3.1-8b": LLAMA31_8B}


@dataclass(frozen=True)
class Row:
    """One workload.

    Attributes:
        model: name of a shape.
        prompts, tokens_in, tokens_out: its size.
        limit, goal: of the token rate (tokens/s), or of the time per token (ms) for one prompt; from TARGETS.
        peer: what vLLM 0.24.0 reached on an H200.
    """

    model: str
    prompts: int
    tokens_in: int
    tokens_out: int
    limit: float
    goal: float
    peer: float

    @property
    def name(self) -> str:
        return f"{self.model}/{self.prompts}"


ROWS = [
    Row("llama-2-7b", 1, 128, 128, 2.9, 3.4, 4.57),
    Row("llama-2-7b", 64, 128, 128, 14000, 10500, 7540),
    Row("llama-2-7b", 256, 128, 128, 17500, 15000, 11260),
    Row("llama-3.1-8b", 1, 1024, 128, 3.5, 4.0, 4.95),
    Row("llama-3.1-8b", 512, 1024, 128, 5500, 4800, 3950),
]


@contextlib.contextmanager
def dummy_llm(folder: Path, name: str, rows: list[Row], **options: Any) -> Iterator[Any]:
    """An LLM of a shape with random weights, large enough for these workloads."""
    from llmapi import LLM

    (folder / "config.json").write_text(json.dumps({**COMMON, **MODELS[name]}))
    batch = max(row.prompts for row in rows)
    length = max(row.tokens_in + row.tokens_out for row in rows)
    limits = {"max_batch_size": batch, "max_seq_len": length, "enable_prefix_caching": False, **options}
    with LLM(
        str(folder), backend="cuda", load_format="dummy", skip_tokenizer_init=True, progress=False, **limits
    ) as llm:
        yield llm


def prompts_of(row: Row) -> list[list[int]]:
    """The token ids of a workload, the same in every run."""
    rng = random.Random(row.prompts)
    vocab = MODELS[row.model]["vocab_size"]
    return [[rng.randrange(3, vocab) for _ in range(row.tokens_in)] for _ in range(row.prompts)]


def run_model(name: str, rows: list[Row], repeats: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Every workload of one model on one LLM."""
    from llmapi import SamplingParams

    results = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, dummy_llm(Path(folder), name, rows, **options) as llm:
        ready = time.perf_counter() - begin
        print(f"{name}: ready in {ready:.1f} s; {llm.build_report}", flush=True)
        for row in rows:
            prompts = prompts_of(row)
            params = SamplingParams(temperature=0, max_tokens=row.tokens_out, ignore_eos=True, detokenize=False)
            seen: list[dict[str, float]] = []
            for turn in range(repeats + 1):
                start = time.perf_counter()
                steps = llm._loop.steps
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                assert all(len(o.outputs[0].token_ids) == row.tokens_out for o in outputs)
                first = statistics.median(o.metrics.first_token_time for o in outputs)
                each = statistics.median(o.metrics.time_per_output_token for o in outputs)
                rate = row.prompts * row.tokens_out / seconds
                steps = llm._loop.steps - steps
                if turn:
                    seen.append({"rate": rate, "first": first, "each": each, "seconds": seconds, "steps": steps})
            results.append(
                {"row": row.name, "ready": ready} | {k: statistics.median(s[k] for s in seen) for k in seen[0]}
            )
            _print(row, results[-1])
    return results


def _print(row: Row, r: dict[str, Any]) -> None:
    if row.prompts == 1:
        value, unit, share = r["each"] * 1e3, "ms a token", row.limit / (r["each"] * 1e3)
        verdict = f"goal {row.goal}, vLLM {row.peer}"
    else:
        value, unit, share = r["rate"], "tok/s", r["rate"] / row.limit
        verdict = f"goal {row.goal:,.0f}, vLLM {row.peer:,.0f}"
    print(
        f"{row.name:<18} {row.tokens_in}/{row.tokens_out}  {value:>10,.2f} {unit:<11} {share:>4.0%} of the limit "
        f"({verdict}); first token {r['first'] * 1e3:.1f} ms, {r['seconds']:.2f} s, {r['steps']:.0f} steps",
        flush=True,
    )


def main() -> None:
    """Run the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--option", nargs="*", default=[], help="name=value arguments of LLM")
    asked = parser.parse_args()
    options = {name: json.loads(value) for name, _, value in (o.partition("=") for o in asked.option)}
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results = []
    for name in MODELS:
        rows = [row for row in ROWS if row.model == name and row.name in asked.rows]
        if rows:
            results += run_model(name, rows, asked.repeats, options)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
