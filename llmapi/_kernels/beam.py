"""Beam search in plain torch: what the kernels of ``beam_cuda`` do, written for clarity. The oracle of their tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_softmax(logits: Tensor, constants: Tensor | None = None) -> Tensor:
    """Log probabilities in float32.

    Args:
        logits: ``[N, V]``.
        constants: ``[N, 2]`` float32: the maximum of each row, and the logarithm of its sum of ``exp(x - max)``; None:
            they are worked out.
    """
    x = logits.float()
    if constants is None:
        top = x.amax(1, keepdim=True)
        total = (x - top).double().exp().sum(1, keepdim=True).log().float()
    else:
        top, total = constants[:, :1], constants[:, 1:]
    return (x - top) - total


def candidates(logprobs: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of one request.

    Args:
        logprobs: ``[R, V]`` float32, edited where there are edits.
        scores: ``[R]`` float32: what each beam has so far.
        k: how many are wanted.

    Returns:
        ``[k]`` scores, tokens and beams: by falling score, then by rising beam, then by rising token. What is lacking
        has -inf, -1 and -1.
    """
    vocab = logprobs.shape[1]
    flat = (logprobs + scores[:, None]).flatten()
    count = min(k, len(flat))
    good = (flat >= flat.topk(count).values[-1]).nonzero()[:, 0]  # all that equal the last one, too
    values, order = flat[good].sort(descending=True, stable=True)
    order = good[order]
    out = torch.full((k,), -torch.inf), *torch.full((2, k), -1, dtype=torch.int32)
    out[0][:count], out[1][:count] = values[:count], order[:count] % vocab
    out[2][:count] = order[:count] // vocab
    return out


def move_tables(table: Tensor, parents: Sequence[int], length: int, block_size: int) -> list[tuple[int, int]]:
    """Block tables of one search for the next step; see :func:`llmapi._kernels.beam_reorder_cuda.move_beams`.

    Args:
        table: ``[R, M]`` int32, changed.
        parents: the row that each goes on from.
        length: tokens of each row in the cache.
        block_size: tokens of a block.

    Returns:
        Source and target of each block whose first ``length % block_size`` tokens are to be copied.
    """
    full, begun = divmod(length, block_size)
    before = table.clone()
    pairs: list[tuple[int, int]] = []
    for row, parent in enumerate(parents):
        table[row, :full] = before[parent, :full]
        if begun and parent != row:
            pairs.append((int(before[parent, full]), int(before[row, full])))
    return pairs


def request_rows(requests: Sequence[tuple[int, int]]) -> list[slice]:
    """The rows of each request, where they lie one after the other.

    Args:
        requests: rows and candidates of each.
    """
    out, first = [], 0
    for rows, _ in requests:
        out.append(slice(first, first + rows))
        first += rows
    return out
