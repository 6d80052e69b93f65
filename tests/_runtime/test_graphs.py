"""Which CUDA graph serves a step: one that it fits into, the smallest, and captured once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmapi._runtime.bind_cuda import CudaPlan
from llmapi._runtime.graphs_cuda import MOST_PROMPT_TOKENS, Graphs
from llmapi._runtime.step_buffers import StepShape


class Device:
    """Notes what is captured; a replay runs nothing."""

    def __init__(self) -> None:
        self.captured: list[torch.Tensor] = []
        self.replays = 0

    def synchronize(self) -> None: ...

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.captured.append(run())

        def replay() -> None:
            self.replays += 1

        return replay, self.captured[-1]


def graphs(max_seqs: int = 100, max_tokens: int = 2048) -> tuple[Graphs, Device]:
    gpu: Any = Device()
    return Graphs(gpu, max_seqs, max_tokens), gpu


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 63, 64, 65, 99, 100])
def test_decoding_has_a_graph_for_every_number_of_sequences(count: int) -> None:
    shape = graphs()[0].shape(StepShape(count, count, count, True))
    assert shape is not None and shape.decode
    assert count <= shape.tokens <= max(count + 15, 2 * count - 1) and shape.tokens <= 100
    assert shape.tokens == shape.seqs == shape.rows


@pytest.mark.parametrize("tokens", [3, 16, 17, 130, MOST_PROMPT_TOKENS])
@pytest.mark.parametrize("rows", [0, 1, 2, 40])
def test_short_prompts_have_graphs_with_room(tokens: int, rows: int) -> None:
    rows = min(rows, tokens)
    wanted = StepShape(tokens, max(1, min(rows, 2)), rows, False)
    shape = graphs()[0].shape(wanted)
    assert shape is not None and not shape.decode
    assert shape.tokens >= tokens and shape.rows >= rows and shape.seqs >= wanted.seqs
    assert shape.rows <= shape.tokens and shape.seqs <= 100


def test_long_steps_and_small_limits_have_none() -> None:
    assert graphs()[0].shape(StepShape(MOST_PROMPT_TOKENS + 1, 3, 3, False)) is None
    small, _ = graphs(max_seqs=4, max_tokens=8)
    assert small.shape(StepShape(6, 2, 2, False)) is None
    assert small.shape(StepShape(4, 4, 4, True)) == StepShape(4, 4, 4, True)


def test_logits_of_more_rows_than_sequences_are_no_decoding_step() -> None:
    """A sequence of one token may want no logits; then rows are not sequences."""
    shape = graphs()[0].shape(StepShape(4, 4, 3, True))
    assert shape is not None and not shape.decode


def test_a_shape_is_captured_once_and_replayed_ever_after() -> None:
    found, gpu = graphs()
    runs: list[int] = []

    def run() -> torch.Tensor:
        runs.append(1)
        return torch.zeros(1)

    shape = StepShape(8, 8, 8, True)
    results = [found.replay(shape, run) for _ in range(3)]
    assert len(runs) == 2 and gpu.replays == 3  # once to warm up, once to be captured
    assert all(r is gpu.captured[0] for r in results)
    found.close()
    found.replay(shape, run)
    assert len(gpu.captured) == 2


def test_steps_in_which_nobody_decodes_have_a_graph_of_their_own() -> None:
    mixed = graphs()[0].shape(StepShape(100, 2, 1, False))
    prompts = graphs()[0].shape(StepShape(100, 2, 1, False, True))
    assert mixed is not None and prompts is not None and mixed != prompts
    arrays = dict.fromkeys(("counts", "seq_lens", "query_start"), torch.zeros(4))
    assert [CudaPlan.any(arrays, shape).decode for shape in (mixed, prompts)] == [True, False]
    assert CudaPlan.any(arrays, prompts).context
