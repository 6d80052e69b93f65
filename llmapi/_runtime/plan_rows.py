"""PlanRows: what a TensorRT plan gives of the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmapi._build.tensorrt.lower import HIDDEN_STATES, LOGITS
from llmapi.config import EngineConfig
from llmapi.models.spec import TransformerSpec


@dataclass(frozen=True)
class PlanRows:
    """Memory for a plan's outputs, or a part of it.

    Attributes:
        logits: ``[N, vocab_size]``.
        hidden_states: ``[N, hidden_size]``, after the last norm. They come with every step, and are few beside logits.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor

    @classmethod
    def empty(cls, count: int, spec: TransformerSpec, config: EngineConfig, device: torch.device) -> PlanRows:
        """So many rows, of any content."""
        dtype = getattr(torch, config.dtype)
        return cls(*(torch.empty(count, n, dtype=dtype, device=device) for n in (spec.vocab_size, spec.hidden_size)))

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """By the names that the network knows them under."""
        return {LOGITS: self.logits, HIDDEN_STATES: self.hidden_states}

    def bind(self, context: Any) -> None:
        """Have an execution context write here."""
        for name, tensor in self.by_name.items():
            context.set_tensor_address(name, tensor.data_ptr())

    def first(self, count: int) -> PlanRows:
        """The first rows, in the same memory."""
        return PlanRows(self.logits[:count], self.hidden_states[:count])

    def put(self, places: Sequence[int], rows: PlanRows) -> None:
        """Copy rows to these places."""
        where = torch.tensor(places, device=self.logits.device)
        for own, given in zip(self.by_name.values(), rows.by_name.values(), strict=True):
            own[where] = given

    def projected(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states of all rows, and the logits of these."""
        return self.hidden_states, self.logits[torch.tensor(places, dtype=torch.int64, device=self.logits.device)]
