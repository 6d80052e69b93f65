"""The kernels' candidates, on the emulated GPU, are those of torch's operators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._runtime.beam_ask import BeamAsk, Spans
from llmapi._runtime.candidates import Candidates, select
from llmapi._runtime.candidates_cuda import KernelSelect
from llmapi._runtime.logit_edits import LogitEdits
from tests._runtime.played import PlayedChooser
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


def test_log_probabilities_beside_a_search_that_fails(found: KernelSelect) -> None:
    """All its logits are NaN: their number, which stands where its first token should, is no token."""
    logits = torch.randn(5, VOCAB) * 2
    logits[1] = torch.nan
    exact = logits.double().log_softmax(1)
    good = search(2, logprobs=3, return_logits="generation")
    asks = [BeamAsk(search(2, logprobs=1), [0.0, 0.0], 0, 4), BeamAsk(good, [0.0, -1.0], 3, 4)]
    asks.append(BeamAsk(search(1), [0.0], 2, 4))
    failed, told, quiet = Candidates(VOCAB, LogitEdits(VOCAB), found).start(logits, asks).result()
    assert failed.scores[0] != failed.scores[0] and failed.tokens[0] == VOCAB and quiet.report is None
    assert told.report is not None and told.report.told is not None and told.report.logits is not None
    assert torch.equal(told.report.logits, logits[3:])
    for place, (row, token) in enumerate(zip(told.rows, told.tokens, strict=True)):
        [entry] = told.report.told.entries(told.report.first + place, told.report.first_row + row, [token], 3, None)
        order = exact[3 + row].argsort(descending=True).tolist()
        assert next(iter(entry)) == token and entry[token].rank == order.index(token) + 1
        assert set(entry) == {token, *order[:3]}
        assert [one.logprob for one in entry.values()] == pytest.approx([float(exact[3 + row, t]) for t in entry])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edited_searches_whose_beams_the_host_does_not_know(kernel_folder: Path, dtype: torch.dtype) -> None:
    """Step after step, with searches that come, move, are met again by the host, and end: as in plain code.

    Edited or not, with prompts that hold what is chosen; the host's own tokens are references meanwhile.
    """
    gpu: Any = EmulatedGpu(kernel_folder)
    kernel = KernelSelect(gpu, vocab_size=VOCAB, max_rows=48, logits_dtype=dtype)
    ways: list[Any] = [kernel, PlayedChooser()]
    finders = [Candidates(VOCAB, LogitEdits(VOCAB), getattr(way, "select", way), way) for way in ways]
    rng = random.Random(2)
    torch.manual_seed(2)
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.6}, {}, {"frequency_penalty": 1.5, "presence_penalty": -1.0},
        {"logit_bias": {7: 6.0, 9: -100.0}, "repetition_penalty": 0.7}, {"min_tokens": 6}, {"logit_bias": {3: 4.0}},
    ]  # fmt: skip
    searches = [search(width, [5, 9, 7], **kind) for width, kind in zip((3, 2, 4, 1, 2, 5), kinds, strict=True)]
    real = {seq: list(seq.token_ids) for beams in searches for seq in beams}
    before: list[Any] = [None, None]
    held = []
    for step in range(14):
        if step == 11:
            for seq in (seq for beams in searches[:3] for seq in beams):
                seq.finish_reason = "length"
            searches = searches[3:]
        known = step % 5 == 0  # the host has caught up with all of them
        logits = (torch.randn(sum(map(len, searches)) + 1, VOCAB) * 2).to(dtype)
        first, asks = 1, []
        for beams in searches:
            carried = None if known else before[0].slots[beams[0].request]
            scores = [-rng.random() for _ in beams] if known else []
            asks.append(BeamAsk(beams, scores, first, 2 * len(beams), carried=carried, ends=frozenset([0])))
            first += len(beams)
        found = [f.start(logits, asks, b) for f, b in zip(finders, before, strict=True)]
        for one, other in zip(*(pending.result() for pending in found), strict=True):
            assert (one.rows, one.tokens) == (other.rows, other.tokens), step
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
        before = [pending.chosen for pending in found]
        assert torch.equal(before[0].parents, before[1].parents) and torch.equal(before[0].tokens, before[1].tokens)
        for chosen in before:
            chosen.slots = {ask.sequences[0].request: chosen.slots[place] for place, ask in enumerate(asks)}
        told = (step + 1) % 5 == 0
        for ask in asks:
            at = before[0].slots[ask.sequences[0].request]
            parents, tokens = (x[at : at + len(ask.sequences)].tolist() for x in (before[0].parents, before[0].tokens))
            going = [[*real[ask.sequences[parent]], token] for parent, token in zip(parents, tokens, strict=True)]
            for seq, ids in zip(ask.sequences, going, strict=True):
                real[seq] = ids
                seq.token_ids = list(ids) if told else [*seq.token_ids, -1]
        held.append(kernel.workspace_bytes)
    assert kernel.launches == 14 and held[10] == held[5] > held[13] > 0
