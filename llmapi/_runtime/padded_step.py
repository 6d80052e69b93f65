"""PaddedStep: the integers of a ragged step in one bucket of a plan, one after the other in one array.

A bucket has more tokens, sequences and rows than most of its steps. What is beyond a step's own is filled so that
nothing comes of it: tokens without a slot are not written, sequences of no tokens attend to nothing, and nobody reads
the logits of rows that were not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llmapi._build.tensorrt.buckets import Bucket
from llmapi._runtime.batch import StepBatch

ALIGNMENT = 256
"""Bytes that the address of a tensor of TensorRT is a multiple of."""

NO_SLOT = -1
"""Slot of a token that is none: its keys and values are not written."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PaddedStep:
    """Where a bucket's arrays lie.

    Attributes:
        bucket: the sizes.
        sections: input to its first int32 and its shape.
        size: int32s of all.
    """

    bucket: Bucket
    sections: Mapping[str, tuple[int, tuple[int, ...]]]
    size: int

    @classmethod
    def of(cls, bucket: Bucket, width: int) -> PaddedStep:
        """The arrays of a bucket.

        Args:
            bucket: the sizes.
            width: blocks of a block table.
        """
        sections: dict[str, tuple[int, tuple[int, ...]]] = {}
        at, step = 0, ALIGNMENT // 4
        for name, shape in bucket.shapes(width).items():
            sections[name] = (at, shape)
            at += -(-math.prod(shape) // step) * step
        return cls(bucket, sections, at)

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays by name.

        Args:
            memory: ``[n]`` int32 on any device, at least :attr:`size` of them.
        """
        return {name: memory[at : at + math.prod(shape)].view(shape) for name, (at, shape) in self.sections.items()}

    def fill(self, memory: Ints, batch: StepBatch) -> None:
        """Write a step.

        Args:
            memory: ``[n]``, at least :attr:`size` of them; whatever it held is overwritten.
            batch: the step, no larger than the bucket.
        """
        tokens = len(batch.input_ids)
        self._put(memory, "input_ids", batch.input_ids, 0)
        self._put(memory, "positions", batch.positions, 0)
        self._put(memory, "slot_mapping", batch.slot_mapping, NO_SLOT)
        self._put(memory, "seq_lens", batch.seq_lens, 0)
        self._put(memory, "query_start", batch.query_start, tokens)
        self._put(memory, "logits_indices", batch.logits_indices, 0)
        at, shape = self.sections["block_tables"]
        tables = memory[at : at + math.prod(shape)].reshape(shape)
        tables[:] = 0
        for row, table in enumerate(batch.block_tables):
            tables[row, : len(table)] = table

    def _put(self, memory: Ints, name: str, values: Sequence[int], rest: int) -> None:
        at, (size,) = self.sections[name]
        end = at + len(values)
        memory[at:end] = values
        memory[end : at + size] = rest


def empty_step() -> StepBatch:
    """A step of no tokens: a bucket that holds it computes nothing that anyone sees."""
    return StepBatch([], [], [], [], [], [0], [], [], [])
