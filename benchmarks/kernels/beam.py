"""Beam search on one GPU: times of choosing candidates and of the step to them, beside torch's, by graph replay.

    PYTHONPATH=. python3 benchmarks/kernels/beam.py [--dtype bfloat16] [--few] [--alone]

Logits are rotated over buffers that together exceed the L2 cache, except where one batch alone does. `limit` is one
read of the logits at 4.5 TB/s plus 4 us for two launches. torch's way is log_softmax in float32, the sum with the
beams' scores, and topk over each request's beams. Tokens are compared with torch's before they are timed.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch

from benchmarks.kernels.sample import logits_like_a_models, replay_time
from llmapi._kernels.beam_cuda import BeamKernels, Candidates, settings
from llmapi._kernels.beam_reorder_cuda import BEAM_CHOICE, BEAM_MOVE, choose_beams, move_beams
from llmapi._kernels.gpu import Gpu

SIZES = [  # requests, beams, candidates, vocabulary
    (1, 4, 8, 32_000),
    (16, 4, 8, 32_000),
    (64, 4, 8, 32_000),
    (256, 4, 8, 32_000),
    (64, 4, 8, 128_256),
    (32, 8, 16, 128_256),
    (4, 64, 128, 32_000),
    (1, 256, 512, 32_000),
    (1, 256, 512, 128_256),
]
AIMS = {(64, 4, 8, 32_000): 40, (64, 4, 8, 128_256): 120, (1, 256, 512, 32_000): 500}
"""Microseconds that were asked for."""


def torchs_way(x: torch.Tensor, scores: torch.Tensor, beams: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.float().log_softmax(1) + scores[:, None]
    values, at = total.view(-1, beams * x.shape[1]).topk(k, dim=1)
    return values, at


def on_gpu(table: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(table.view(np.uint8).copy()).cuda()


def bench(gpu: Gpu, dtype: torch.dtype, sizes: list[tuple[int, int, int, int]], beside: bool) -> None:
    print(f"{dtype}  {gpu.name}")
    for requests, beams, k, vocab in sizes:
        n = requests * beams
        bytes_ = n * vocab * dtype.itemsize
        copies = max(2, min(40, -(-180_000_000 // bytes_)))
        inputs = [logits_like_a_models(n, vocab, dtype) for _ in range(copies)]
        scores = -20 - 3 * torch.rand(n, device="cuda")
        rows, queue = (on_gpu(t) for t in settings([(beams, k)] * requests))
        kernels = BeamKernels(gpu, vocab_size=vocab, max_rows=n, max_candidates=k, logits_dtype=dtype)
        out = Candidates.empty(requests, k, gpu.device)
        kernels(inputs[0], scores, rows, queue, out)
        values, at = torchs_way(inputs[0], scores, beams, k)
        same = float(((out.beams * vocab + out.tokens).sort(1).values == at.int().sort(1).values).float().mean())
        off = float((out.scores - values).abs().max())
        assert off < 1e-4 and not out.reasons.any(), f"scores are off by {off}"
        ours = replay_time([partial(kernels, x, scores, rows, queue, out) for x in inputs])
        limit = bytes_ / 4.5e12 + 4e-6
        line = f"{requests:4d} x {beams:3d} beams, {k:4d} of {vocab:6d}"
        line += f"  limit {limit * 1e6:6.1f}  ours {ours * 1e6:8.1f} us"
        if (requests, beams, k, vocab) in AIMS:
            line += f" (aim {AIMS[requests, beams, k, vocab]})"
        if beside:
            theirs = replay_time([partial(torchs_way, x, scores, beams, k) for x in inputs[:3]], 3)
            line += f"  torch {theirs * 1e6:8.1f} us"
        print(f"{line}  same as torch's {same * 100:.2f} %, scores off by {off:.1e}", flush=True)


def bench_ties(gpu: Gpu, dtype: torch.dtype) -> None:
    """The slowest rows: all logits equal."""
    kernels = BeamKernels(gpu, vocab_size=32_000, max_rows=256, max_candidates=8, logits_dtype=dtype)
    rows, queue = (on_gpu(t) for t in settings([(4, 8)] * 64))
    x, scores = torch.zeros(256, 32_000, dtype=dtype, device="cuda"), torch.zeros(256, device="cuda")
    out = Candidates.empty(64, 8, gpu.device)
    took = replay_time([partial(kernels, x, scores, rows, queue, out)] * 10)
    print(f"  64 x   4 beams,    8 of  32000, all equal: {took * 1e6:8.1f} us")


def bench_reorder(gpu: Gpu, requests: int, beams: int, width: int) -> None:
    """Who goes on, and the move: tables, and begun blocks of 64 caches, 13 tokens of 8 x 128 bfloat16 each."""
    n = requests * beams
    ints = partial(torch.tensor, dtype=torch.int32, device="cuda")
    choices = np.zeros(requests, dtype=BEAM_CHOICE)
    choices["list"], choices["rows"], choices["k"] = np.arange(requests), beams, 2 * beams
    choices["slot"], choices["ends_stop"] = np.arange(requests) * beams, 1
    planes = torch.zeros(3, requests, 2 * beams, dtype=torch.int32, device="cuda")
    planes[0] = torch.linspace(-1, -9, 2 * beams, device="cuda").view(torch.int32)
    planes[1:] = torch.arange(2 * beams, device="cuda") // 4  # tokens, and rows of which each has four continuations
    planes[1] += 7
    chosen = torch.empty(3, n, dtype=torch.int32, device="cuda")
    choose = partial(choose_beams, gpu, planes, on_gpu(choices), ints([2]), chosen)
    choosing = replay_time([choose] * 20)
    moves = np.zeros(requests, dtype=BEAM_MOVE)
    moves["row"] = moves["slot"] = np.arange(requests) * beams
    moves["rows"] = beams
    table = n + torch.arange(n * width, dtype=torch.int32, device="cuda").view(n, width) % 4096
    table[:, -1] = torch.arange(n, device="cuda")
    token = 8 * 128 * 2
    caches = torch.zeros(64, 4096 + n, 16 * token, dtype=torch.uint8, device="cuda")
    addresses = torch.tensor([c.data_ptr() for c in caches], device="cuda")
    move = partial(
        move_beams, gpu, table, addresses, moves=on_gpu(moves), most_rows=beams, parents=chosen[0],
        seq_lens=torch.full((n,), 16 * width - 2, dtype=torch.int32, device="cuda"), block_size=16, token_bytes=token,
    )  # fmt: skip
    moving = replay_time([move] * 5)
    copied = int((chosen[0].view(requests, beams) != torch.arange(beams, device="cuda")).sum())
    rate = 2 * copied * 13 * token * 64 / moving / 1e12
    print(
        f"{requests:4d} x {beams:3d} beams, tables of {width:4d}: chosen in {choosing * 1e6:6.1f} us; moved, with "
        f"{copied} begun blocks in 64 caches, in {moving * 1e6:6.1f} us, {rate:.2f} TB/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--few", action="store_true", help="only sizes that have an aim")
    parser.add_argument("--alone", action="store_true", help="without torch's times")
    args = parser.parse_args()
    torch.manual_seed(time.time_ns() % 1000)
    gpu = Gpu(torch.device("cuda"))
    dtype = getattr(torch, args.dtype)
    bench(gpu, dtype, [s for s in SIZES if s in AIMS] if args.few else SIZES, not args.alone)
    bench_ties(gpu, dtype)
    for requests, beams, width in ((64, 4, 256), (1, 256, 256), (256, 4, 64)):
        bench_reorder(gpu, requests, beams, width)


if __name__ == "__main__":
    main()
