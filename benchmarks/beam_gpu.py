"""Beam search on a GPU: the token rate beside that of as many greedy sequences, and transformers' on the same GPU.

    python benchmarks/beam_gpu.py                      # Llama-2-7B's shape, random weights, 64 prompts 128/128, width 4
    python benchmarks/beam_gpu.py --transformers 8     # also generate(num_beams=4) on batches of 8 prompts
    python benchmarks/beam_gpu.py --tokenizer MODEL    # also searches with stop texts, bad words and grammars

Rates count ``prompts x width x tokens`` over the whole run, prompts included. Each workload runs twice in one process;
the second run counts. A step's time is that of the second half of the tokens, from a run of all and a run of half of
them: greedy and beams then hold as many sequences of the same lengths, and prompts have no part in it. "waiting" is
beam search whose next step is launched only when the host knows the candidates of the one before; "edited" has
a repetition penalty and ``min_tokens``, "logprobs" five log probabilities of each token, "stops" two stop texts that
never come, "words" bad words of several tokens, "guided" a grammar that allows all letters. "ending" may end anywhere:
of its vocabulary one token in fifty ends a sequence, so that the books have something to do.
"""

from __future__ import annotations

import argparse
import json
import random
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


def workloads(args: argparse.Namespace) -> dict[str, tuple[int, dict[str, Any]]]:
    """By name: how many prompts, and the parameters."""
    beams = {"use_beam_search": True, "beam_width": args.width, "ignore_eos": True}
    ends = list(range(3, SHAPE["vocab_size"], 50))[:250]
    found: dict[str, tuple[int, dict[str, Any]]] = {
        "greedy": (args.prompts * args.width, {"temperature": 0, "ignore_eos": True}),
        "waiting": (args.prompts, beams),
        "beams": (args.prompts, beams),
        "edited": (args.prompts, {**beams, "repetition_penalty": 1.2, "min_tokens": 8}),
        "logprobs": (args.prompts, {**beams, "logprobs": 5}),
        "ending": (args.prompts, {**beams, "stop_token_ids": ends, "early_stopping": "never", "length_penalty": 2.0}),
    }
    if args.tokenizer is not None:
        found["stops"] = args.prompts, {**beams, "stop": ["no such text", "nor this one"], "detokenize": True}
        found["words"] = args.prompts, {**beams, "bad_words": ["several tokens", "of one word"]}
        found["guided"] = args.prompts, {**beams, "guided_decoding": {"regex": "[A-Za-z ]*"}, "detokenize": True}
    return found


def ours(folder: Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Tokens a second, and milliseconds of a decoding step, of each workload."""
    from llmapi import LLM, SamplingParams

    seqs, length, half = args.prompts * args.width, args.tokens_in + args.tokens_out, args.tokens_out // 2
    told: dict[str, tuple[float, float]] = {}
    texts: dict[str, Any] = {"skip_tokenizer_init": True}
    if args.tokenizer is not None:
        texts = {"tokenizer": args.tokenizer}
    with LLM(
        folder, backend=args.backend, load_format="dummy", max_batch_size=seqs, max_num_tokens=8192,
        max_seq_len=length, cache_dir=folder / "cache", progress=False, **texts,
    ) as llm:  # fmt: skip

        def seconds(count: int, options: dict[str, Any], tokens: int, seed: int) -> float:
            params = SamplingParams(**{"max_tokens": tokens, "detokenize": False, **options})
            prompts = prompts_of(count, args.tokens_in, seed)
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - begin

        for name, (count, options) in workloads(args).items():
            llm._loop.plans_beams_ahead = name != "waiting"
            seconds(count, options, args.tokens_out, 0)
            short, whole = seconds(count, options, half, 1), seconds(count, options, args.tokens_out, 2)
            told[name] = seqs * args.tokens_out / whole, 1e3 * (whole - short) / (args.tokens_out - half)
    return told


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
    parser.add_argument("--config", type=Path, help="config.json of another shape")
    parser.add_argument("--tokenizer", help="a model whose tokenizer is taken; its vocabulary is no larger")
    parser.add_argument("--backend", default="cuda")
    args = parser.parse_args()
    SHAPE["num_hidden_layers"] = args.layers
    if args.config is not None:
        SHAPE.update(json.loads(args.config.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        told = ours(Path(folder), args)
    print(f"{args.prompts} prompts, width {args.width}; greedy: {args.prompts * args.width} sequences")
    for name, (rate, step) in told.items():
        ratios = f"{rate / told['greedy'][0]:.2f} of the greedy rate, {step / told['greedy'][1]:.2f} of its step"
        print(f"{name:8} {rate:8,.0f} tokens/s, {step:.2f} ms a step; {ratios}")
    if args.transformers:
        print(f"transformers, batches of {args.transformers}: {theirs(args):,.0f} tokens/s")


if __name__ == "__main__":
    main()
