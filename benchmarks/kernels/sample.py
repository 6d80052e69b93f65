"""Sampling on one GPU: checks, then times of every kind of settings beside torch's, by graph replay.

    PYTHONPATH=. python3 benchmarks/kernels/sample.py [--flips ROWS]

Logits are rotated over buffers that together exceed the L2 cache, except where one batch alone does. `limit` is one
read of the logits at 4.5 TB/s plus 2 us for a launch. `--flips` counts over that many rows how often rounding gives
another token than the CPU's sampler does.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.harness import READ_RATE, replay_time, sizes_parser, start
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.sample_cuda import SampleKernels
from llmapi._runtime.philox import uniforms
from llmapi._runtime.request import Request
from llmapi._runtime.sampler import Sampler, SampleRow
from llmapi._runtime.sampler_cuda import CudaSampler
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p .9": {"temperature": 0.8, "top_p": 0.9},
    "k 50, p .9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "min_p .05": {"temperature": 0.8, "min_p": 0.05},
    "penalties, k, p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    "k, p, 5 logprobs": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "logprobs": 5},
}
SIZES = [
    (1, 128_256),
    (1, 32_000),
    (64, 32_000),
    (256, 32_000),
    (1024, 32_000),
    (64, 128_256),
    (256, 128_256),
    (1024, 128_256),
]


def logits_like_a_models(n: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """A few likely tokens over a broad body."""
    x = torch.randn(n, vocab, device="cuda") * 2.5
    peaks = torch.randint(vocab, (n, 40), device="cuda")
    x.scatter_(1, peaks, 9 + 2 * torch.randn(n, 40, device="cuda"))
    return x.to(dtype)


def make_rows(n: int, params: SamplingParams) -> list[SampleRow]:
    out = []
    for i in range(n):
        request = Request(f"r{i}", None, [1, 2, 3], params, i * 7919, 64, frozenset(), RequestMetrics(0.0))
        request.sequences[0].token_ids += [5, 6]
        out.append(SampleRow(request.sequences[0]))
    return out


def torchs_way(x: torch.Tensor, kind: dict[str, Any]) -> torch.Tensor:
    """What one writes with torch: a full sort, its cumulative sum, a multinomial draw."""
    if kind.get("temperature") == 0:
        return x.argmax(1)
    x = x.float() / kind.get("temperature", 1.0)
    if "top_k" in kind:
        x = x.masked_fill(x < x.topk(kind["top_k"], dim=1).values[:, -1:], -torch.inf)
    p = x.softmax(1)
    if "top_p" in kind:
        falling, order = p.sort(dim=1, descending=True)
        falling = falling.masked_fill(falling.cumsum(1) - falling > kind["top_p"], 0)
        p = torch.zeros_like(p).scatter_(1, order, falling)
    if "min_p" in kind:
        p = p.masked_fill(p < kind["min_p"] * p.amax(1, keepdim=True), 0)
    return (p / torch.empty_like(p).exponential_()).argmax(1)


def settings(sampler: CudaSampler, rows: list[SampleRow]) -> tuple[torch.Tensor, bool]:
    table, _, _, edited = sampler._pack(rows)
    return torch.from_numpy(table.view(np.uint8).copy()).cuda(), edited


def launch(
    kernels: SampleKernels, packed: torch.Tensor, edited: bool, ids: torch.Tensor, best: int | None, x: torch.Tensor
) -> None:
    kernels(x, packed, ids, edited=edited)
    if best is not None:
        values = torch.empty(len(ids), 1 + best, device="cuda")
        kernels.logprobs(x, packed, ids, values, torch.empty_like(values, dtype=torch.int32))


def bench(gpu: Gpu, dtype: torch.dtype, sizes: list[tuple[int, int]], beside: bool) -> None:
    print(f"{dtype}  {gpu.name}")
    for n, vocab in sizes:
        bytes_ = n * vocab * dtype.itemsize
        copies = max(2, min(40, -(-180_000_000 // bytes_)))
        inputs = [logits_like_a_models(n, vocab, dtype) for _ in range(copies)]
        kernels = SampleKernels(gpu, vocab_size=vocab, max_rows=n, logits_dtype=dtype)
        sampler = CudaSampler(gpu, vocab, max_rows=n, logits_dtype=dtype)
        ids = torch.empty(n, dtype=torch.int32, device="cuda")
        limit = bytes_ / READ_RATE + 2e-6
        print(f"N {n:5d}  V {vocab:6d}  limit {limit * 1e6:6.1f} us")
        for name, kind in KINDS.items():
            rows = make_rows(n, SamplingParams(**kind))
            packed, edited = settings(sampler, rows)
            launches = [partial(launch, kernels, packed, edited, ids, kind.get("logprobs"), x) for x in inputs]
            ours = replay_time(launches)
            line = f"  {name:18s} {ours * 1e6:8.1f} us  {ours / limit:5.1f} x limit"
            if beside and n in (1, 256) and "penalties" not in name and "logprobs" not in name:
                theirs = replay_time([partial(torchs_way, x, kind) for x in inputs[:3]], 3)
                line += f"   torch {theirs * 1e6:8.1f} us"
            print(line, flush=True)


def host_time(gpu: Gpu, n: int, vocab: int) -> None:
    """What start() and result() cost the host."""
    x = logits_like_a_models(n, vocab, torch.bfloat16)
    sampler = CudaSampler(gpu, vocab, max_rows=n, logits_dtype=torch.bfloat16)
    rows = make_rows(n, SamplingParams(temperature=0.8, top_k=50, top_p=0.9))
    started, waited = [], []
    for _ in range(30):
        torch.cuda.synchronize()
        a = time.perf_counter()
        pending = sampler.start(x, rows)
        b = time.perf_counter()
        torch.cuda.synchronize()
        c = time.perf_counter()
        pending.result()
        started.append(b - a)
        waited.append(time.perf_counter() - c)
    a, b = statistics.median(started) * 1e6, statistics.median(waited) * 1e6
    print(f"host, N {n:5d}: start {a:6.0f} us, result {b:6.0f} us")


def exactly(x: torch.Tensor, kind: dict[str, Any], u: torch.Tensor) -> torch.Tensor:
    """The tokens of the exact distribution, in float64."""
    z = x.double()
    if "top_k" in kind:
        z = z.masked_fill(z < z.topk(kind["top_k"], dim=1).values[:, -1:], -torch.inf)
    p = (z / kind.get("temperature", 1.0)).softmax(1)
    if "top_p" in kind:
        falling, order = p.sort(dim=1, descending=True, stable=True)
        falling = falling.masked_fill(falling.cumsum(1) - falling >= kind["top_p"], 0)
        p = torch.zeros_like(p).scatter_(1, order, falling)
    total = p.cumsum(1)
    return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]


def flips(gpu: Gpu, total: int, vocab: int = 32_000) -> None:
    """How often the token is not the CPU sampler's, and how often either is not that of the exact distribution."""
    for name in ("plain", "top_k 50", "top_p .9", "k 50, p .9"):
        kind = KINDS[name]
        sampler = CudaSampler(gpu, vocab, max_rows=512, logits_dtype=torch.bfloat16)
        counts, done, start = [0, 0, 0], 0, time.perf_counter()
        while done < total and time.perf_counter() - start < 8:
            x = logits_like_a_models(512, vocab, torch.bfloat16)
            rows = make_rows(512, SamplingParams(**kind))
            for i, r in enumerate(rows):
                r.sequence.request.seed = done + i
            u = uniforms([r.sequence.request.seed for r in rows], [0] * 512, [2] * 512)
            mine = torch.tensor([s.token_ids[0] for s in sampler(x, rows)])
            cpu = torch.tensor([s.token_ids[0] for s in Sampler(vocab)(x.cpu(), rows)])
            exact = exactly(x, kind, torch.from_numpy(u).cuda()).cpu()
            for i, (a, b) in enumerate(((mine, cpu), (mine, exact), (cpu, exact))):
                counts[i] += int((a != b).sum())
            done += 512
        here, there = f"{counts[1]} here", f"{counts[2]} on the CPU"
        print(
            f"flips, {name:12s}: {counts[0]} of {done} against the CPU; off the exact one: {here}, {there}", flush=True
        )


def main() -> None:
    parser = sizes_parser(__doc__, "N 1 and 256 only")
    parser.add_argument("--flips", type=int, default=0)
    args = parser.parse_args()
    gpu, dtype = start(args)
    sizes = [s for s in SIZES if s[0] in (1, 256)] if args.few else SIZES
    if args.flips:
        flips(gpu, args.flips)
    for n in (1, 256, 1024):
        host_time(gpu, n, 32_000)
    bench(gpu, dtype, sizes, not args.alone)


if __name__ == "__main__":
    main()
