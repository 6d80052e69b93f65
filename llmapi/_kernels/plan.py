"""CpuPlan: what the CPU kernels need to know about a step, worked out once instead of once a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step.

    Attributes:
        start, stop: its rows of the step's tokens.
        length: tokens in its cache once this step's are written.
        first_slot: slot of its token 0 where its blocks lie one after the other; -1 where they do not.
        blocks: its block ids, int64, where they do not.
    """

    start: int
    stop: int
    length: int
    first_slot: int
    blocks: torch.Tensor | None


@dataclass(slots=True)
class CpuPlan:
    """A step, as the CPU kernels see it.

    Attributes:
        slots: ``[T]`` int64 slot of each token.
        spans: one per sequence.
    """

    slots: torch.Tensor
    spans: list[Span]
    _factors: tuple[torch.Tensor, torch.Tensor] | None = None
    _masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        slot_mapping: list[int],
        block_tables: list[list[int]],
        seq_lens: list[int],
        query_start: list[int],
        block_size: int,
    ) -> CpuPlan:
        """From the step's plain lists.

        Args:
            slot_mapping: slot of each token.
            block_tables: block ids of each sequence.
            seq_lens: tokens of each sequence after this step.
            query_start: first row of each sequence, and the number of rows last.
            block_size: tokens a block.
        """
        spans = []
        for i, (table, length) in enumerate(zip(block_tables, seq_lens, strict=True)):
            used = table[: -(-length // block_size)]
            contiguous = used[-1] - used[0] == len(used) - 1 and used == list(range(used[0], used[-1] + 1))
            spans.append(
                Span(
                    query_start[i],
                    query_start[i + 1],
                    length,
                    used[0] * block_size if contiguous else -1,
                    None if contiguous else torch.tensor(used),
                )
            )
        return cls(torch.tensor(slot_mapping), spans)

    def rotary_factors(self, cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, 1, R]`` cosines twice, and sines negated, then plain: ``x * cos + swap(x) * sin`` turns x."""
        if self._factors is None:
            cos, sin = cos_sin[:, None, :].chunk(2, -1)
            self._factors = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        return self._factors

    def mask(self, queries: int, keys: int, window: int) -> torch.Tensor:
        """Which of the last ``keys`` tokens each of the last ``queries`` tokens sees: ``[queries, keys]`` bool.

        Args:
            queries: rows; row ``i`` is token ``keys - queries + i``.
            keys: columns.
            window: tokens that a token sees, itself included; 0 for all.
        """
        key = (queries, keys, window)
        if key not in self._masks:
            rows = torch.arange(keys - queries, keys)[:, None]
            columns = torch.arange(keys)[None, :]
            seen = columns <= rows
            if window:
                seen &= columns > rows - window
            self._masks[key] = seen
        return self._masks[key]
