"""Guide: where one sequence stands in its grammar, and which tokens may come next."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmapi._runtime.grammar_lines import THREADS, GrammarLines
from llmapi._runtime.transfer import indices, to_device
from llmapi.errors import RequestError

_EARLY = 8  # tokens: a copy made by then goes to a line of its own, as it soon caught up

Masks = npt.NDArray[np.int32]
"""``[N, W]``: 32 tokens a word; token ``t`` may come next where bit ``t % 32`` of word ``t // 32`` is 1."""


class Guide:
    """A sequence's state in a grammar. It follows the sequence's tokens, whatever becomes of its KV blocks.

    Args:
        lines: its grammar.
        added: ids besides the grammar's own that may end the text where it may end.
        dropped: ids of the grammar's own that may not.
    """

    def __init__(self, lines: GrammarLines, added: list[int], dropped: list[int]) -> None:
        self._lines = lines
        self._added, self._dropped = added, dropped
        self._number, self._line = lines.number(), 0
        self._matcher = lines.copy(0)
        self._tokens: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed.

        Raises:
            RequestError: llguidance came to one of its limits.
        """
        self._tokens.append(token)
        if not self._matcher.consume_token(token):
            self.check()

    def check(self) -> None:
        """Raise where llguidance came to one of its limits.

        Raises:
            RequestError: it did.
        """
        if self._matcher.is_error():
            why = self._matcher.get_error().partition("\n<state>")[0].strip()
            raise RequestError(f"guided_decoding: the grammar cannot be followed any further: {why}. Simplify it")

    def fork(self) -> Guide:
        """A copy that goes on independently."""
        other = copy.copy(self)
        other._matcher, other._tokens = self._matcher.deep_copy(), self._tokens.copy()
        if len(self._tokens) <= _EARLY:
            other._number = self._lines.number()
        return other

    def settle(self) -> None:
        """Move to the line that is this sequence's among those that there are now."""
        line = self._number % len(self._lines)
        if line != self._line:
            moved = self._lines.copy(line)
            if moved.consume_tokens(self._tokens):
                self._matcher, self._line = moved, line
            else:  # a limit of llguidance that has to do with time or memory: what worked goes on
                self._number = self._line


def words(vocab_size: int) -> int:
    """Words of a row of masks."""
    return (vocab_size + 31) // 32


def fill(guides: Sequence[Guide], masks: Masks) -> None:
    """Write what may come next, for all sequences at once, on several threads.

    Args:
        guides: one per row.
        masks: ``[len(guides), W]``, contiguous; overwritten.
    """
    from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

    if len(guides) == 1:
        fill_next_token_bitmask(guides[0]._matcher, masks, 0)
    elif guides:
        for lines, count in Counter(guide._lines for guide in guides).items():
            lines.want(count)
        for guide in guides:
            guide.settle()
        # each thread takes neighbours: those of one line, who would only wait for each other, come one after the other
        order = sorted(range(len(guides)), key=lambda row: (id(guides[row]._lines), guides[row]._line))
        fill_next_token_bitmask_par(_executor(), [(guides[row]._matcher, row) for row in order], masks)
    bits = masks.view(np.uint32)
    for row, guide in enumerate(guides):
        if (guide._added or guide._dropped) and guide._matcher.is_accepting():
            for token in guide._added:
                if token < 32 * masks.shape[1]:
                    bits[row, token // 32] |= np.uint32(1 << token % 32)
            if not guide.complete:
                for token in guide._dropped:
                    bits[row, token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)


def forbid(x: Tensor, rows: list[int], guides: Sequence[Guide]) -> None:
    """Set the logits of tokens that may not come next to -inf.

    Args:
        x: ``[N, V]`` float32; changed.
        rows: which rows of it.
        guides: one for each of these.
    """
    vocab = x.shape[1]
    masks = np.empty((len(guides), words(vocab)), dtype=np.int32)
    fill(guides, masks)
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, count=vocab, bitorder="little").view(np.bool_)
    forbidden = to_device(torch.from_numpy(~allowed), x.device)
    if len(rows) == len(x):
        x.masked_fill_(forbidden, -torch.inf)
    else:
        at = indices(rows, x.device)
        x[at] = x[at].masked_fill(forbidden, -torch.inf)


@functools.cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor(THREADS)
