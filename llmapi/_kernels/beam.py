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


def reorder_tables(
    source: Tensor, target: Tensor, parents: Tensor, lengths: Tensor, spares: Tensor, block_size: int
) -> tuple[list[tuple[int, int]], int]:
    """Block tables for the next step; see :func:`llmapi._kernels.beam_cuda.reorder_tables`.

    Args:
        source: ``[S, M]`` int32.
        target: ``[N, M]`` int32, written; other memory than ``source``.
        parents, spares: ``[N]`` int32.
        lengths: ``[S]`` int32.
        block_size: tokens of a block.

    Returns:
        The pairs of blocks to be copied, and how many rows lack a spare.
    """
    pairs: list[tuple[int, int]] = []
    lacking = 0
    seen: set[int] = set()
    for row, (parent, spare) in enumerate(zip(parents.tolist(), spares.tolist(), strict=True)):
        if parent < 0:
            continue
        full, partial = divmod(int(lengths[parent]), block_size)
        used = min(full + 1, source.shape[1])
        target[row, :used] = source[parent, :used]
        if full < used:
            if not partial and spare >= 0:
                target[row, full] = spare
            elif partial and parent in seen:
                if spare >= 0:
                    pairs.append((int(source[parent, full]), spare))
                lacking += spare < 0
                target[row, full] = spare
        seen.add(parent)
    return pairs, lacking


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
