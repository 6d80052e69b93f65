"""The torch reference of beam search against definitions spelled out, and against torch where there are no ties."""

from __future__ import annotations

import pytest
import torch

from llmapi._kernels.beam import candidates, log_softmax, move_tables, request_rows


@pytest.mark.parametrize("k", [1, 5, 12, 40])
def test_order_among_equals(k: int) -> None:
    logprobs = torch.randint(-3, 1, (3, 4), generator=torch.Generator().manual_seed(k)).float()
    logprobs[0, 1], logprobs[2] = -torch.inf, -torch.inf
    scores = torch.tensor([0.0, -1.0, 0.0])
    values, tokens, beams = candidates(logprobs, scores, k)
    every = sorted((-float(logprobs[r, c] + scores[r]), r, c) for r in range(3) for c in range(4))
    expected = [(-x, c, r) for x, r, c in every] + [(-torch.inf, -1, -1)] * 40
    assert list(zip(values.tolist(), tokens.tolist(), beams.tolist(), strict=True)) == expected[:k]


def test_distinct_scores_are_torchs() -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)) * 4
    scores = torch.tensor([-3.0, -3.5, -9.0, -2.0])
    logprobs = log_softmax(x)
    assert torch.allclose(logprobs, x.log_softmax(1), atol=2e-6)
    values, tokens, beams = candidates(logprobs, scores, 16)
    best = (logprobs + scores[:, None]).flatten().topk(16)
    assert torch.equal(values, best.values)
    assert torch.equal(beams * 1000 + tokens, best.indices.int())
    top = x.amax(1, keepdim=True)
    constants = torch.cat([top, (x.double() - top).exp().sum(1, keepdim=True).log().float()], 1)
    assert torch.equal(log_softmax(x, constants), logprobs)


def test_rows_keep_their_last_block_and_take_their_parents_full_ones() -> None:
    table = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 0], [7, 8, 9, 0]], dtype=torch.int32)
    assert move_tables(table, [1, 1, 1], 9, 4) == [(6, 3), (6, 9)]
    assert table.tolist() == [[4, 5, 3, 0], [4, 5, 6, 0], [4, 5, 9, 0]]
    assert move_tables(table, [0, 0, 2], 8, 4) == []
    assert table.tolist() == [[4, 5, 3, 0], [4, 5, 6, 0], [4, 5, 9, 0]]


def test_rows_of_requests() -> None:
    assert request_rows([(2, 4), (1, 1), (3, 6)]) == [slice(0, 2), slice(2, 3), slice(3, 6)]
