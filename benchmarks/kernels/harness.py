"""Harness of the kernels' benchmarks: times by graph replay, and the options that they share."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmapi._kernels.gpu import Gpu

READ_RATE = 4.5e12
"""Bytes a second that an H200 was seen to read in large reads."""


def replay_time(launches: Sequence[Callable[[], Any]], repeats: int = 5, *, queued: bool = False) -> float:
    """Seconds of one launch: the median over replays of a CUDA graph of all of them.

    Args:
        launches: in order; the first two also run before the graph is captured.
        repeats: replays that are timed.
        queued: queue all replays at once, so that none waits for the host, instead of one after the other.
    """
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        if not queued:
            torch.cuda.synchronize()
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks) * 1e-3 / len(launches)


def sizes_parser(about: str | None, few: str) -> argparse.ArgumentParser:
    """A parser with the options of a benchmark that goes through a list of sizes.

    Args:
        about: the module's docstring.
        few: what ``--few`` leaves.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--few", action="store_true", help=few)
    parser.add_argument("--alone", action="store_true", help="without torch's times")
    return parser


def start(args: argparse.Namespace) -> tuple[Gpu, torch.dtype]:
    """The GPU and the type that were asked for; other random numbers in each run."""
    torch.manual_seed(time.time_ns() % 1000)
    return Gpu(torch.device("cuda")), getattr(torch, args.dtype)
