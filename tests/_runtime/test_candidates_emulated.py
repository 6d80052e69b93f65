"""The kernels' candidates, on the emulated GPU, are those of torch's operators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._runtime.candidates import BeamAsk, Candidates, Spans, select
from llmapi._runtime.candidates_cuda import KernelSelect
from llmapi._runtime.logit_edits import LogitEdits
from tests._runtime.test_candidates import brute, check, search
from tests.emulator.gpu import EmulatedGpu

VOCAB = 300


@pytest.fixture
def found(kernel_folder: Path) -> KernelSelect:
    gpu: Any = EmulatedGpu(kernel_folder)
    return KernelSelect(gpu, vocab_size=VOCAB, max_rows=48, logits_dtype=torch.float32)


def test_ragged_searches_of_step_after_step(found: KernelSelect) -> None:
    """Rows of others between them; the same searches twice, then others."""
    rng = random.Random(1)
    torch.manual_seed(1)
    finder = Candidates(VOCAB, LogitEdits(VOCAB), found)
    for _ in range(4):
        asks, first = [], rng.randint(0, 2)
        for _ in range(rng.randint(1, 5)):
            width = rng.choice([1, 2, 4, 7])
            asks.append(BeamAsk(search(width), [0.0] * width, first, 2 * width + rng.randint(0, 3)))
            first += width + rng.randint(0, 1)
        for _ in range(2):
            for ask in asks:
                ask.scores = [-rng.random() * 4 for _ in ask.sequences]
            logits = torch.randn(first + 1, VOCAB) * 3
            exact = logits.double().log_softmax(1)
            for ask, own in zip(asks, finder.start(logits, asks).result(), strict=True):
                check(own, brute(exact, ask), exact=True)
    assert found.launches == 8


def test_nan_comes_first(found: KernelSelect) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 5] = torch.nan
    scores = found(logits, Spans([0, 2], [2, 1], [4, 4], torch.zeros(3)), False)[0].view(torch.float32)
    assert bool(scores[0, 0].isnan()) and not bool(scores[1].isnan().any()) and found.launches == 1


def test_what_the_kernels_do_not_serve_is_done_by_torch(found: KernelSelect) -> None:
    logits = torch.randn(3, VOCAB)
    cases = [
        (logits, Spans([0, 0], [1, 1], [4, 6], torch.zeros(3)), False),  # groups at their first step
        (logits.double(), Spans([0], [3], [6], torch.zeros(3)), False),
        (logits, Spans([0], [3], [1100], torch.zeros(3)), False),
        (torch.randn(60, VOCAB), Spans([50], [2], [6], torch.zeros(60)), False),
    ]
    for i, (x, spans, normalized) in enumerate(cases):
        kept = spans.counts[0] if spans.counts[0] <= 900 else 900
        assert torch.equal(found(x, spans, normalized)[1:, :, :kept], select(x, spans, normalized)[1:, :, :kept]), i
    assert found.launches == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edited_rows(kernel_folder: Path, dtype: torch.dtype) -> None:
    """Penalties, biases and masks, a beam that nothing can follow beside others, and one search that fails."""
    gpu: Any = EmulatedGpu(kernel_folder)
    found = KernelSelect(gpu, vocab_size=VOCAB, max_rows=48, logits_dtype=dtype)

    def dead_end(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        return scores - torch.inf if output[-1] == 9 else scores

    def broken(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan

    torch.manual_seed(4)
    logits = (torch.randn(9, VOCAB) * 2).to(dtype)
    ending = search(2, [5], logits_processors=[dead_end])
    ending[0].token_ids[-1] = 9
    asks = [
        BeamAsk(search(3, [5, 9], repetition_penalty=1.5, presence_penalty=0.5, min_tokens=5), [0.0, -1.0, -1.5], 0, 6),
        BeamAsk(search(2), [-1.0, -2.0], 3, 4),
        BeamAsk(ending, [0.0, -3.0], 5, 4),
        BeamAsk(search(2, logits_processors=[broken]), [0.0, -3.0], 7, 4),
    ]
    by_kernel = Candidates(VOCAB, LogitEdits(VOCAB), found).start(logits, asks).result()
    by_torch = Candidates(VOCAB, LogitEdits(VOCAB), select).start(logits, asks).result()
    for one, other in zip(by_kernel[:3], by_torch[:3], strict=True):
        assert (one.rows, one.tokens) == (other.rows, other.tokens)
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    assert set(by_kernel[2].rows) == {1}
    assert by_kernel[3].scores[0] != by_kernel[3].scores[0]
    assert found.launches == 2
