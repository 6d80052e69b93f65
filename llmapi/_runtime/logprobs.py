"""Log probabilities: of chosen tokens and of the most probable ones, under the model's own distribution."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmapi._runtime.draw import largest
from llmapi._runtime.transfer import to_host
from llmapi.outputs import Logprob

_CHUNK = 1 << 24  # logits turned to float32 at a time: 64 MiB

Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Told:
    """Log probabilities of tokens that may follow rows of logits, and of the most probable ones of each row.

    Attributes:
        own: of the tokens.
        ranks: of the tokens: how many of the row are more probable, and one.
        values, ids: by row, of the most probable tokens, falling.
    """

    own: list[float]
    ranks: list[int]
    values: list[list[float]]
    ids: list[list[int]]

    def entries(
        self, first: int, row: int, token_ids: Sequence[int], k: int, decode: Decode | None
    ) -> list[dict[int, Logprob]]:
        """What the user is told of some tokens of one row.

        Args:
            first: place of the first of them; the others follow.
            row: whose they are.
            token_ids: which they are.
            k: how many of the most probable ones to add; no more than there are.
            decode: token id to text.
        """
        best = _ranked(self.ids[row][:k], self.values[row][:k], decode)
        out: list[dict[int, Logprob]] = []
        for place, token in enumerate(token_ids, first):
            entry = {token: Logprob(self.own[place], self.ranks[place], decode(token) if decode else None)}
            for other, logprob in best.items():
                entry.setdefault(other, logprob)
            out.append(entry)
        return out


@dataclass(frozen=True, slots=True)
class Measured:
    """:class:`Told` as tensors: float32 ``[P]``, int64 ``[P]``, float32 ``[R, K]``, int64 ``[R, K]``."""

    own: Tensor
    ranks: Tensor
    values: Tensor
    ids: Tensor

    def to_host(self) -> Measured:
        """A copy on the host, there once the stream has come so far."""
        return Measured(to_host(self.own), to_host(self.ranks), to_host(self.values), to_host(self.ids))

    def lists(self) -> Told:
        """As numbers; waits for the device."""
        return Told(self.own.tolist(), self.ranks.tolist(), self.values.tolist(), self.ids.tolist())


def measure(logits: Tensor, rows: Tensor, token_ids: Tensor, k: int) -> Measured:
    """Log probabilities under raw logits, by a log-softmax in float32. Nothing waits for the device.

    Args:
        logits: ``[R, V]`` of any float dtype.
        rows, token_ids: ``[P]`` int64: of which row, which token.
        k: how many of the most probable tokens of each row; at most V.
    """
    logp = logits.float().log_softmax(1)
    own = logp[rows, token_ids]
    step = max(1, _CHUNK // logits.shape[1])
    spans = [slice(start, start + step) for start in range(0, len(rows), step)]
    ranks = torch.cat([(logp[rows[span]] > own[span, None]).sum(1) + 1 for span in spans])
    values, ids = largest(logp, k) if k else (logp[:, :0], rows.new_empty(len(logp), 0))
    return Measured(own, ranks, values, ids)


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
    rows = [row for row, ids in enumerate(token_ids) for _ in ids]
    if not rows:
        return [[] for _ in token_ids]
    of, tokens = torch.tensor([rows, [token for ids in token_ids for token in ids]]).to(logits.device)
    k = min(k, logits.shape[1])
    told = measure(logits, of, tokens, k).lists()
    starts = itertools.accumulate(map(len, token_ids), initial=0)
    return [
        told.entries(first, row, ids, k, decode)
        for row, (first, ids) in enumerate(zip(starts, token_ids, strict=False))
    ]


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
