"""TokenCounts: how often each token stands in a sequence, on the GPU, for penalties."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmapi._runtime.request import Sequence
from llmapi._runtime.transfer import indices

IN_PROMPT = -(1 << 31)  # the highest bit of an int32


class TokenCounts:
    """A table with a row for each sequence that uses penalties.

    An entry's low 31 bits count the token in the output, its highest bit is set if the prompt has it. The sampling
    kernel adds every token that it chooses, so a row is filled from the host once.

    Args:
        vocab_size: width of a row; ids beyond it (an embedding may be wider) are passed over.
        device: where.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab = vocab_size
        self._device = device
        self._table = torch.empty(0, vocab_size, dtype=torch.int32, device=device)
        self._slots: dict[int, tuple[Sequence, int]] = {}  # by id; the sequence is held, so its id stays taken
        self._counted: list[int] = []  # output tokens that each slot holds
        self._free: list[int] = []

    @property
    def nbytes(self) -> int:
        """GPU memory held."""
        return self._table.nbytes

    def addresses(self, sequences: Rows[Sequence], last_ids: Tensor | None) -> npt.NDArray[np.uint64]:
        """Where each sequence's counts are. One token is expected to be added to each by the caller's kernel.

        Args:
            sequences: those to be sampled. The last token may be a reference ``~row`` into ``last_ids``.
            last_ids: int32 ids of the batch before, on the GPU.

        Returns:
            ``[N]`` addresses, valid until the next call.
        """
        missing = [s for s in sequences if id(s) not in self._slots]
        if missing:
            self._make_room(len(missing), sequences)
            for sequence in missing:
                slot = self._free.pop()
                self._slots[id(sequence)] = sequence, slot
                self._counted[slot] = -1
        slots = np.empty(len(sequences), dtype=np.uint64)
        for i, sequence in enumerate(sequences):
            slot = slots[i] = self._slots[id(sequence)][1]
            slot = int(slot)
            if self._counted[slot] != sequence.num_output:
                self._fill(slot, sequence, last_ids)
            self._counted[slot] = sequence.num_output + 1
        return slots * np.uint64(4 * self._vocab) + np.uint64(self._table.data_ptr())

    def _make_room(self, wanted: int, staying: Rows[Sequence]) -> None:
        """Let go of sequences that have ended; grow where that is not enough."""
        if len(self._free) >= wanted:
            return
        stay = set(map(id, staying))
        for key, (sequence, slot) in list(self._slots.items()):
            if sequence.finished and key not in stay:
                del self._slots[key]
                self._free.append(slot)
        short = wanted - len(self._free)
        if short > 0:
            old = len(self._table)
            size = max(4, 2 * old, old + short)
            table = torch.empty(size, self._vocab, dtype=torch.int32, device=self._device)
            table[:old] = self._table
            self._table = table
            self._free += range(old, size)
            self._counted += [-1] * (size - old)

    def _fill(self, slot: int, sequence: Sequence, last_ids: Tensor | None) -> None:
        """Count a sequence anew."""
        row = self._table[slot].zero_()
        ids = indices(sequence.token_ids, self._device)
        if sequence.token_ids[-1] < 0 and last_ids is not None:
            ids[-1] = last_ids[~sequence.token_ids[-1]]
        known = (ids >= 0) & (ids < self._vocab)
        ids = ids.clamp(0, self._vocab - 1)
        output = sequence.num_prompt
        row.index_add_(0, ids[output:], known[output:].int())
        flags = torch.zeros(self._vocab, dtype=torch.int32, device=self._device)
        flags.index_add_(0, ids[:output], known[:output].int())
        row += (flags > 0).int() * IN_PROMPT
