"""What the host does for a step of beam searches: candidates to numbers, bookkeeping, reorder, schedule, batch.

    python benchmarks/beam_host.py --requests 64 --width 4
    python benchmarks/beam_host.py --books             # of the landing alone, with books kept elsewhere and here

No model runs: the candidates are drawn at random, mostly from the better beams, so that a third of the beams take the
place of others in each step. What is timed is the loop's whole step less the engine and the search for candidates.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from typing import Any

import numpy as np
import torch

from llmapi._runtime.beam import Finished
from llmapi._runtime.beam_found import Found, PendingCandidates
from llmapi._runtime.beam_run import BeamRun
from llmapi._runtime.blocks import BlockPool
from llmapi._runtime.job import Job
from llmapi._runtime.loop import EngineLoop
from llmapi._runtime.request import Request, Sequence
from llmapi._runtime.sampler import Sampler
from llmapi._runtime.scheduler import Scheduler
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams

VOCAB = 32000
NOTHING_PENDING = PendingCandidates(torch.empty(0), [])


class NoEngine:
    """Gives logits of no rows at once."""

    moves_beams = False

    class config:
        block_size = 16

    def step(self, batch: Any, before: Any) -> torch.Tensor:
        return torch.empty(len(batch.logits_indices), 0)

    def close(self) -> None: ...


class Drawn:
    """Candidates at random, best first: mostly of the better beams, as in a real search."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.spent = 0.0

    def waits(self, request: Request) -> bool:
        return False

    def start(self, logits: torch.Tensor, asks: list[Any], before: Any = None) -> PendingCandidates:
        begin = time.perf_counter()
        pending = PendingCandidates(torch.empty(0), asks)
        width = max(ask.count for ask in asks)
        rows = np.array([len(ask.sequences) for ask in asks])[:, None]
        best = np.array([max(ask.scores) for ask in asks])[:, None]
        out = np.empty((3, len(asks), width), dtype=np.int32)
        out[0] = (best - np.sort(self._rng.exponential(1.0, out[0].shape), axis=1)).astype(np.float32).view(np.int32)
        out[1] = self._rng.integers(3, VOCAB, out[1].shape)
        out[2] = np.minimum(self._rng.geometric(0.45, out[2].shape) - 1, rows - 1)
        pending.add(list(range(len(asks))), torch.from_numpy(out))
        self.spent += time.perf_counter() - begin
        return pending


class NoBlocks:
    """A scheduler whose sequences have no blocks."""

    def fork(self, parent: Sequence, child: Sequence) -> None: ...
    def adopt(self, heir: Sequence, parent: Sequence) -> None: ...
    def inherit(self, heir: Sequence, parent: Sequence) -> None: ...
    def rewind(self, seq: Sequence) -> None: ...
    def finish(self, seq: Sequence) -> None: ...


def with_ended(number: int, width: int, length: int) -> BeamRun:
    """A search that goes on although as many of its sequences have ended as it has beams."""
    params = SamplingParams(use_beam_search=True, beam_width=width, early_stopping="never", length_penalty=2.0)
    request = Request(str(number), None, [3] * length, params, 0, 4000, frozenset([2]), RequestMetrics(0.0))
    run = BeamRun(request, None)
    request.sequences = [Sequence(request, row, [3] * 2 * length, length) for row in range(width)]
    run._rows, run._asked = [request.sequences], [0]
    [beams] = run._groups
    beams.scores, beams.length = [-1.0] * width, length
    beams.finished = [Finished(-1e-6, -1.0, 0, 2, "stop", 2) for _ in range(width)]
    return run


def books(args: argparse.Namespace) -> None:
    """Milliseconds to land a step of searches of which nothing ends now, and all places are taken by what has ended."""
    rng = np.random.default_rng(0)
    record = [0, args.width, *range(args.width)]
    for kind in ("elsewhere", "here") * 2:
        runs = [with_ended(number, args.width, args.prompt) for number in range(args.requests)]
        times = []
        for _ in range(60):
            found = []
            for _ in runs:
                scores = (-1 - np.sort(rng.random(2 * args.width))).tolist()
                rows = np.minimum(rng.geometric(0.45, 2 * args.width) - 1, args.width - 1).tolist()
                found.append(Found(scores, rows, rng.integers(3, VOCAB, 2 * args.width).tolist()))
                found[-1].record = record if kind == "elsewhere" else None
            begin = time.perf_counter()
            for run, own in zip(runs, found, strict=True):
                run.advance([own], NOTHING_PENDING, 0, NoBlocks(), True)
            times.append(1e3 * (time.perf_counter() - begin))
        name = f"{args.requests} searches of {args.width} beams, books kept {kind}"
        print(f"{name}: median {statistics.median(times):.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--books", action="store_true")
    args = parser.parse_args()
    if args.books:
        books(args)
        return
    pool = BlockPool(20000, 16)
    seqs = args.requests * args.width
    scheduler = Scheduler(pool, max_num_tokens=max(8192, seqs), max_batch_size=seqs, max_seq_len=4096)
    sampler = Sampler(VOCAB)
    drawn = Drawn(0)
    sampler.candidates = drawn  # type: ignore[assignment]
    loop = EngineLoop(NoEngine(), scheduler, sampler)  # type: ignore[arg-type]
    params = SamplingParams(use_beam_search=True, beam_width=args.width, max_tokens=args.tokens)
    rng = np.random.default_rng(1)
    done: list[Any] = []
    for number in range(args.requests):
        prompt = rng.integers(3, VOCAB, args.prompt + number % 16).tolist()
        request = Request(str(number), None, prompt, params, 0, args.tokens, frozenset([2]), RequestMetrics(0.0))
        loop._arriving.append(Job(request, None, done.append))
    times, sizes = [], []
    profile = cProfile.Profile()
    while loop._arriving or scheduler.has_work:
        drawn.spent, full = 0.0, len(scheduler.running) == seqs
        if args.profile and full:
            profile.enable()
        begin = time.perf_counter()
        loop._step()
        took = time.perf_counter() - begin - drawn.spent
        profile.disable()
        if full:
            times.append(took * 1e3)
            sizes.append(len(scheduler.running))
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    times = times[:-1]
    print(
        f"{args.requests} requests of {args.width} beams, {len(times)} steps: "
        f"median {statistics.median(times):.2f} ms, mean {statistics.mean(times):.2f} ms, best {min(times):.2f} ms"
    )


if __name__ == "__main__":
    main()
