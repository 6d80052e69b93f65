"""Log probabilities: of chosen tokens and of the most probable ones, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmapi._runtime.draw import largest
from llmapi.outputs import Logprob

_CHUNK = 1 << 24  # logits turned to float32 at a time: 64 MiB

Decode = Callable[[int], str]


def token_logprobs(
    logits: Tensor, token_ids: Sequence[Sequence[int]], k: int, decode: Decode | None = None
) -> list[list[dict[int, Logprob]]]:
    """Log probabilities of given tokens and of the ``k`` most probable ones.

    They are exact: a log-softmax in float32. Ranks count from 1; equal tokens share the better rank.

    Args:
        logits: ``[R, V]`` raw logits of any float dtype.
        token_ids: for each row, the ids that were chosen from it.
        k: how many of the most probable tokens to add, at least 0; cut to V.
        decode: token id to text, for :attr:`Logprob.decoded_token`.

    Returns:
        For each row and each of its ids a dict from token id to :class:`Logprob`: the id itself first, then the most
        probable ones in falling order.

    Example:
        >>> [[entry]] = token_logprobs(torch.tensor([[0.0, 0.0]]), [[1]], 0)
        >>> round(entry[1].logprob, 4), entry[1].rank
        (-0.6931, 1)
    """
    logp = logits.float().log_softmax(1)
    width = max(map(len, token_ids), default=0)
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in token_ids], device=logits.device)
    if width == 0:
        return [[] for _ in token_ids]
    own = logp.gather(1, padded)
    ranks = torch.stack([(logp > own[:, d : d + 1]).sum(1) + 1 for d in range(width)], 1).tolist()
    own_values = own.tolist()
    k = min(k, logits.shape[1])
    top_values, top_ids = (t.tolist() for t in largest(logp, k)) if k else ([[]] * len(own_values),) * 2
    out: list[list[dict[int, Logprob]]] = []
    for row, ids in enumerate(token_ids):
        best = _ranked(top_ids[row], top_values[row], decode)
        entries: list[dict[int, Logprob]] = []
        for d, token in enumerate(ids):
            entry = {token: Logprob(own_values[row][d], ranks[row][d], decode(token) if decode else None)}
            for other, logprob in best.items():
                entry.setdefault(other, logprob)
            entries.append(entry)
        out.append(entries)
    return out


def prompt_logprobs(
    logits: Tensor, token_ids: Sequence[int], k: int, decode: Decode | None = None
) -> list[dict[int, Logprob]]:
    """Log probabilities of a prompt's tokens: row ``t`` of the logits predicts ``token_ids[t]``.

    Memory stays small however long the prompt is: rows are turned to float32 a few at a time.

    Args:
        logits: ``[T, V]`` raw logits of any float dtype, those of positions 0 to T - 1.
        token_ids: the ``T`` tokens at positions 1 to T.
        k: how many of the most probable tokens to add at each position, at least 0.
        decode: token id to text.

    Returns:
        One dict per token, as of :func:`token_logprobs`. The prompt's first token has no prediction and no entry.

    Raises:
        ValueError: the lengths differ.
    """
    if len(token_ids) != logits.shape[0]:
        raise ValueError(
            f"{logits.shape[0]} rows of logits for {len(token_ids)} tokens: row t predicts token t, so give as many"
        )
    step = max(1, _CHUNK // logits.shape[1])
    out: list[dict[int, Logprob]] = []
    for start in range(0, len(token_ids), step):
        part = [[t] for t in token_ids[start : start + step]]
        out.extend(entries[0] for entries in token_logprobs(logits[start : start + step], part, k, decode))
    return out


def _ranked(ids: list[int], values: list[float], decode: Decode | None) -> dict[int, Logprob]:
    """Falling values as entries; equal ones share the rank of the first."""
    out: dict[int, Logprob] = {}
    rank = 1
    for i, (token, value) in enumerate(zip(ids, values, strict=True)):
        if i and value != values[i - 1]:
            rank = i + 1
        out[token] = Logprob(value, rank, decode(token) if decode else None)
    return out
