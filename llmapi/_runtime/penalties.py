"""Penalties: lower the logits of tokens that a sequence already holds.

Repetition (Keskar et al. 2019, arXiv:1909.05858) counts prompt and output; presence and frequency count the output,
as OpenAI's API defined them: ``logit -= frequency * count + presence * (count > 0)``.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmapi._runtime.request import Sequence
from llmapi._runtime.transfer import to_device

_SLACK = 64  # histories kept beyond twice the batch before old ones are dropped


class _History:
    """A sequence's token ids as an array that grows with it, so a step converts the new tokens only."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.tokens = sequence.token_ids
        self.size = 0
        self.buffer: npt.NDArray[np.int64] = np.empty(256, dtype=np.int64)

    def ids(self) -> npt.NDArray[np.int64]:
        tokens = self.sequence.token_ids
        if len(tokens) < self.size or tokens is not self.tokens:  # a beam may take the place of another
            self.tokens, self.size = tokens, 0
        if len(tokens) > len(self.buffer):
            self.buffer = np.concatenate([self.buffer[: self.size], np.empty(len(tokens), dtype=np.int64)])
        self.buffer[self.size : len(tokens)] = tokens[self.size :]
        self.size = len(tokens)
        return self.buffer[: self.size]


class Penalties:
    """Applies the penalties of a batch in place.

    Args:
        vocab_size: width of the logits; ids beyond it (an embedding may be wider) are passed over.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab = vocab_size
        self._histories: dict[int, _History] = {}

    def apply(self, x: Tensor, sequences: Rows[Sequence]) -> None:
        """Penalize row ``i`` of ``x`` for the tokens of ``sequences[i]``.

        Args:
            x: ``[N, V]`` float32, contiguous; changed.
            sequences: one per row; those whose params ask for no penalty are left alone.
        """
        seen: list[npt.NDArray[np.int64]] = []
        factors: list[float] = []
        written: list[npt.NDArray[np.int64]] = []
        costs: list[tuple[float, float]] = []
        for row, sequence in enumerate(sequences):
            p = sequence.request.params
            if p.repetition_penalty == 1 and not p.presence_penalty and not p.frequency_penalty:
                continue
            ids = self._history(sequence).ids()
            if p.repetition_penalty != 1:
                seen.append(self._flat(ids, row))
                factors.append(p.repetition_penalty)
            if p.presence_penalty or p.frequency_penalty:
                written.append(self._flat(ids[sequence.num_prompt :], row))
                costs.append((p.presence_penalty, p.frequency_penalty))
        flat = x.view(-1)
        if seen:
            at = to_device(torch.from_numpy(np.concatenate(seen)), x.device)
            factor = to_device(_spread(factors, seen), x.device)
            old = flat[at]
            flat[at] = torch.where(old < 0, old * factor, old / factor)
        if written:
            pairs = [np.unique(ids, return_counts=True) for ids in written]
            places = [ids for ids, _ in pairs]
            at = to_device(torch.from_numpy(np.concatenate(places)), x.device)
            count = to_device(torch.from_numpy(np.concatenate([n for _, n in pairs])), x.device).float()
            presence = to_device(_spread([c[0] for c in costs], places), x.device)
            frequency = to_device(_spread([c[1] for c in costs], places), x.device)
            flat[at] -= frequency * count + presence
        self._trim(len(sequences))

    def _flat(self, ids: npt.NDArray[np.int64], row: int) -> npt.NDArray[np.int64]:
        """Ids as positions in the flattened logits."""
        return ids[ids < self._vocab] + row * self._vocab

    def _history(self, sequence: Sequence) -> _History:
        key = id(sequence)  # stays taken while the history holds the sequence
        history = self._histories.pop(key, None) or _History(sequence)
        self._histories[key] = history  # last in line: most recently used
        return history

    def _trim(self, rows: int) -> None:
        while len(self._histories) > 2 * rows + _SLACK:
            del self._histories[next(iter(self._histories))]


def _spread(values: list[float], groups: list[npt.NDArray[np.int64]]) -> Tensor:
    """Each value once per element of its group, float32."""
    return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), [len(g) for g in groups]))
