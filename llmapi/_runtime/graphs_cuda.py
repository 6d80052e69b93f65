"""Graphs: short steps as CUDA graphs, captured when a shape comes up, and replayed with one launch.

A step's shape is rounded up to a bucket. Steps of decoding have a bucket for each number of sequences;
steps with prompt tokens have one for each number of tokens up to a limit beyond which launching costs less than
computing, and another where nobody decodes in them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from llmapi._kernels.gpu import Gpu
from llmapi._runtime.step_buffers import StepShape

log = logging.getLogger("llmapi")

MOST_PROMPT_TOKENS = 512
"""Steps with prompt tokens and more tokens than this are launched kernel by kernel."""


class Graphs:
    """CUDA graphs by shape.

    Args:
        gpu: the device.
        max_seqs, max_tokens: limits of a step.
    """

    def __init__(self, gpu: Gpu, max_seqs: int, max_tokens: int) -> None:
        self._gpu = gpu
        self._decode = [n for n in _decode_buckets(max_seqs) if n <= max_tokens]
        self._mixed = [n for n in (16, 32, 64, 128, 256, MOST_PROMPT_TOKENS) if n <= max_tokens]
        self._max_seqs = max_seqs
        self._graphs: dict[StepShape, tuple[Callable[[], None], torch.Tensor]] = {}

    def shape(self, wanted: StepShape) -> StepShape | None:
        """The bucket that a step fits into; None where it is not worth a graph.

        Args:
            wanted: the step's own sizes.
        """
        if wanted.decode and wanted.rows == wanted.tokens:
            size = _smallest(self._decode, wanted.tokens)
            return None if size is None else StepShape(size, size, size, True)
        size = _smallest(self._mixed, wanted.tokens)
        if size is None:
            return None
        rows = _smallest([1, 8, 32, 128], wanted.rows)
        if rows is None or rows > size:
            rows = size
        return StepShape(size, min(size, self._max_seqs), rows, False, wanted.prompts)

    def replay(self, shape: StepShape, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of a step, by its graph.

        Args:
            shape: from :meth:`shape`.
            run: launches the step; called where there is no graph yet: once to warm up, once to be captured.
        """
        found = self._graphs.get(shape)
        if found is None:
            begin = time.perf_counter()
            run()  # compiles, loads and allocates whatever must not happen while capturing
            self._gpu.synchronize()
            found = self._graphs[shape] = self._gpu.capture(run)
            log.debug("captured %s in %.2f s", shape, time.perf_counter() - begin)
        replay, out = found
        replay()
        return out

    def close(self) -> None:
        """Drop the graphs and their memory."""
        self._graphs.clear()


def _decode_buckets(most: int) -> list[int]:
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)]
    return [n for n in sizes if n < most] + [most]


def _smallest(sizes: list[int], least: int) -> int | None:
    return next((n for n in sizes if n >= least), None)
