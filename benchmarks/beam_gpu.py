"""Beam search on a GPU: the token rate beside that of as many greedy sequences, and transformers' on the same GPU.

    python benchmarks/beam_gpu.py                      # Llama-2-7B's shape, random weights, 64 prompts 128/128, width 4
    python benchmarks/beam_gpu.py --transformers 8     # also generate(num_beams=4) on batches of 8 prompts

Rates count ``prompts x width x tokens`` over the whole run, prompts included. Each workload runs twice in one process;
the second run counts. A step's time is the median between two tokens in the second half of it, where all sequences
decode. Searches run in both ways: planned ahead, and waited for after each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu as shapes

SHAPE: dict[str, Any] = {**shapes.COMMON, **shapes.LLAMA2_7B}


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(3, SHAPE["vocab_size"]) for _ in range(length)] for _ in range(count)]


def ours(folder: Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Tokens a second, and seconds of a step, of greedy sequences and of beams in both ways."""
    from llmapi import LLM, SamplingParams

    common: dict[str, Any] = {"max_tokens": args.tokens_out, "ignore_eos": True, "detokenize": False}
    seqs = args.prompts * args.width
    beams = SamplingParams(use_beam_search=True, beam_width=args.width, **common)
    greedy = SamplingParams(temperature=0, **common)
    length = args.tokens_in + args.tokens_out
    found: dict[str, tuple[float, float]] = {}
    with LLM(
        folder, backend="cuda", load_format="dummy", skip_tokenizer_init=True, max_batch_size=seqs, max_num_tokens=8192,
        max_seq_len=length, cache_dir=folder / "cache", progress=False,
    ) as llm:  # fmt: skip
        for name, count, params, ahead in (
            ("greedy", seqs, greedy, True),
            ("beams ahead", args.prompts, beams, True),
            ("beams waited for", args.prompts, beams, False),
        ):
            llm._loop.plans_beams_ahead = ahead
            for run in range(2):
                prompts = prompts_of(count, args.tokens_in, seed=run)
                begin = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                rate = seqs * args.tokens_out / (time.perf_counter() - begin)
                found[name] = rate, step_time(outputs)
    return found


def step_time(outputs: list[Any]) -> float:
    """Seconds of a step: the median between two tokens of the second half of each request's."""
    gaps: list[float] = []
    for output in outputs:
        times = output.metrics.token_times
        late = times[len(times) // 2 :]
        gaps += [after - before for before, after in itertools.pairwise(late)]
    return statistics.median(gaps)


def theirs(args: argparse.Namespace) -> float:
    """Tokens a second of ``generate(num_beams=width)`` on random weights of the same shape."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in SHAPE.items() if k not in ("architectures", "model_type")})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rate = 0.0
    for run in range(2):
        prompts = torch.tensor(prompts_of(args.prompts, args.tokens_in, seed=run), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for batch in prompts.split(args.transformers):
            with torch.no_grad():
                model.generate(
                    batch, attention_mask=torch.ones_like(batch), num_beams=args.width, do_sample=False,
                    min_new_tokens=args.tokens_out, max_new_tokens=args.tokens_out, pad_token_id=0,
                )  # fmt: skip
        torch.cuda.synchronize()
        rate = args.prompts * args.width * args.tokens_out / (time.perf_counter() - begin)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--transformers", type=int, default=0, metavar="BATCH", help="prompts a batch; 0 leaves it out")
    args = parser.parse_args()
    SHAPE["num_hidden_layers"] = args.layers
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        found = ours(Path(folder), args)
    print(f"{args.prompts} x {args.width} beams, {args.prompts * args.width} greedy sequences")
    base_rate, base_step = found["greedy"]
    for name, (rate, step) in found.items():
        print(
            f"{name:>16}: {rate:9,.0f} tokens/s, {rate / base_rate:6.1%}; a step {step * 1e3:7.3f} ms, "
            f"{step / base_step - 1:+.1%}"
        )
    if args.transformers:
        print(f"transformers, batches of {args.transformers}: {theirs(args):,.0f} tokens/s")


if __name__ == "__main__":
    main()
