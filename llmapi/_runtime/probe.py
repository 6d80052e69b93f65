"""Probes: what is wanted of a given text instead of a continuation of it.

A request with a probe is computed like any prompt, in chunks and beside others. The probe takes the rows that it wants
as they come, and makes of them, on the engine's device, the little that is kept; the request ends with its last token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from llmapi._runtime.draw import argmax

_CHUNK = 1 << 24  # logits turned to float32 at a time: 64 MiB


class Probe(ABC):
    """A function of some rows of a text.

    Attributes:
        hidden: whether rows are final hidden states, after the last norm, rather than logits.
        first: position of the first row that is wanted; all after it are, too.
    """

    hidden = False

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self._kept: Tensor | None = None
        self._host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    @abstractmethod
    def take(self, rows: Tensor, start: int) -> None:
        """Take in rows in order.

        Args:
            rows: ``[N, V]`` logits or ``[N, H]`` hidden states; they change with the engine's next step.
            start: position of the first.
        """

    @abstractmethod
    def _result(self) -> Tensor:
        """What is kept, on the device, after the last row."""

    def finish(self) -> None:
        """Note that the last row was taken, and begin to copy the result to the host."""
        kept = self._result()
        with torch.inference_mode(False):
            self._host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=kept.is_cuda)
        self._host.copy_(kept, non_blocking=True)
        if kept.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def land(self) -> None:
        """Wait for the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()

    @property
    def result(self) -> Tensor:
        """What the probe found, on the host; the request must have ended without an error."""
        assert self._host is not None, "not finished"
        return self._host


class ScoreProbe(Probe):
    """Log probability of each of the given tokens, and whether it is the most probable one.

    The result is ``[2, N]`` float32: log probabilities, and 1 where the token is the one that greedy decoding takes:
    the largest logit, the lowest id among equals.

    Args:
        first: position of the row that predicts the first of them.
        targets: the tokens, one for each row.
    """

    def __init__(self, first: int, targets: list[int]) -> None:
        super().__init__(first)
        self._targets = targets
        self._parts: list[Tensor] = []

    def take(self, rows: Tensor, start: int) -> None:
        """See :class:`Probe`."""
        begin = start - self.first
        targets = torch.tensor(self._targets[begin : begin + len(rows)], device=rows.device)
        step = max(1, _CHUNK // rows.shape[1])
        for at in range(0, len(rows), step):
            x, wanted = rows[at : at + step], targets[at : at + step]
            _, best = argmax(x)
            wide = x.float()
            logprobs = wide.gather(1, wanted[:, None])[:, 0] - wide.logsumexp(1)
            self._parts.append(torch.stack([logprobs, (best == wanted).float()]))

    def _result(self) -> Tensor:
        return torch.cat(self._parts, 1)


class HiddenProbe(Probe):
    """Final hidden states of all tokens from a position on: ``[N, H]`` float32."""

    hidden = True

    def __init__(self, first: int = 0) -> None:
        super().__init__(first)
        self._parts: list[Tensor] = []

    def take(self, rows: Tensor, start: int) -> None:
        """See :class:`Probe`."""
        self._parts.append(rows.to(torch.float32, copy=True))

    def _result(self) -> Tensor:
        return torch.cat(self._parts)


class MeanProbe(Probe):
    """Mean of the final hidden states of all tokens: ``[1, H]`` float32."""

    hidden = True

    def __init__(self) -> None:
        super().__init__()
        self._sum: Tensor | None = None
        self._count = 0

    def take(self, rows: Tensor, start: int) -> None:
        """See :class:`Probe`."""
        part = rows.sum(0, keepdim=True, dtype=torch.float64)
        self._sum = part if self._sum is None else self._sum + part
        self._count += len(rows)

    def _result(self) -> Tensor:
        assert self._sum is not None
        return (self._sum / self._count).float()
