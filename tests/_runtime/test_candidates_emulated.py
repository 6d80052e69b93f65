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
        (logits.log_softmax(1), Spans([0], [3], [6], torch.zeros(3)), True),  # edited
        (logits, Spans([0], [3], [1100 - 300], torch.zeros(3)), False),
        (torch.randn(60, VOCAB), Spans([50], [2], [6], torch.zeros(60)), False),
    ]
    for i, (x, spans, normalized) in enumerate(cases):
        assert torch.equal(found(x, spans, normalized)[1:], select(x, spans, normalized)[1:]), i
    assert found.launches == 1
