"""StepBuffers: a step's integers on the GPU, at addresses that CUDA graphs can rely on.

The host writes them into pinned memory, and one copy brings them over. Where each array lies follows from the step's
shape alone, so a graph captured for a shape can be replayed for any step of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmapi._kernels.gpu import Gpu
from llmapi._runtime.batch import StepBatch

_ALIGNMENT = 4  # int32s: 16 bytes
_MOST_LAYOUTS = 512  # that are kept

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's arrays; a step with fewer tokens, sequences or rows fits, too.

    Attributes:
        tokens, seqs, rows: T, B and N of the step.
        decode: every sequence has one token: row ``i`` of everything belongs to sequence ``i``.
        prompts: the first sequence has several tokens, so that decode attention has nothing to do.
    """

    tokens: int
    seqs: int
    rows: int
    decode: bool
    prompts: bool = False

    def sections(self) -> dict[str, int]:
        """Names and sizes of the arrays, in the order in which they lie."""
        return {
            "counts": 4,
            "source_ids": self.tokens,
            "positions": self.tokens,
            "slot_mapping": self.tokens,
            "seq_lens": self.seqs,
            "query_start": self.seqs + 1,
            "logits_indices": self.rows,
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """One shape's arrays: views of the pinned and of the device memory, and how many int32s are copied."""

    host: dict[str, Ints]
    device: dict[str, torch.Tensor]
    size: int


class StepBuffers:
    """Buffers for steps up to some size.

    Args:
        gpu: the device.
        max_tokens, max_seqs: limits of a step.
        table_width: most blocks of a sequence.
    """

    def __init__(self, gpu: Gpu, max_tokens: int, max_seqs: int, table_width: int) -> None:
        device, pinned = gpu.device, gpu.device.type == "cuda"
        largest = StepShape(max_tokens, max_seqs, max_tokens, False)
        total = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in largest.sections().values())
        self._pinned = torch.empty(total, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._pinned_tables = torch.zeros(max_seqs, table_width, dtype=torch.int32, pin_memory=pinned)
        self.tables = torch.zeros(max_seqs, table_width, dtype=torch.int32, device=device)
        self._moved = False  # whether the last step changed its tables on the device
        self._owners: list[tuple[list[int], int, int] | None] = [None] * max_seqs
        self._layouts: dict[StepShape, Layout] = {}
        self._copied = gpu.event()

    def layout(self, shape: StepShape) -> Layout:
        """Where a shape's arrays lie."""
        found = self._layouts.get(shape)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:  # steps without a graph have a shape each
                self._layouts.clear()
            host: dict[str, Ints] = {}
            device: dict[str, torch.Tensor] = {}
            at, array = 0, self._pinned.numpy()
            for name, size in shape.sections().items():
                host[name] = array[at : at + size]
                device[name] = self._device[at : at + size]
                at += -(-size // _ALIGNMENT) * _ALIGNMENT
            device["input_ids"] = self._ids[: shape.tokens]
            device["block_tables"] = self.tables[: shape.seqs]
            found = self._layouts[shape] = Layout(host, device, at)
        return found

    def upload(self, batch: StepBatch, shape: StepShape, decodes: int) -> Layout:
        """Bring a step over; the copies are queued on torch's current stream.

        Args:
            batch: what to run; at most as large as ``shape``.
            shape: how its arrays are to lie. What is beyond the batch's own is filled so that nothing is computed:
                sequences of no tokens, slots that are not written.
            decodes: :func:`num_decodes` of the batch.
        """
        layout = self.layout(shape)
        host = layout.host
        self._copied.synchronize()  # the copy of the step before must have left the pinned memory
        tokens, seqs, rows = len(batch.input_ids), len(batch.seq_lens), len(batch.logits_indices)
        _fill(host["source_ids"], batch.input_ids, 0)
        _fill(host["positions"], batch.positions, 0)
        _fill(host["slot_mapping"], batch.slot_mapping, -1)
        _fill(host["seq_lens"], batch.seq_lens, 0)
        _fill(host["query_start"], batch.query_start, tokens)
        _fill(host["logits_indices"], batch.logits_indices, 0)
        host["counts"][:] = (decodes, seqs, tokens, rows)
        self._device[: layout.size].copy_(self._pinned[: layout.size], non_blocking=True)
        moves = batch.moves is not None
        self._upload_tables(batch.block_tables, moves or self._moved)
        self._moved = moves
        self._copied.record()
        return layout

    def _upload_tables(self, tables: Sequence[list[int]], changed: bool) -> None:
        """Write the rows that changed since the last step, and copy the part of the table that is in use.

        Args:
            tables: of the step.
            changed: whether to copy it where no row changed, too.
        """
        array, width = self._pinned_tables.numpy(), 0
        for row, table in enumerate(tables):
            length = len(table)
            width = max(width, length)
            owner = self._owners[row]
            if owner is not None and owner[0] is table:
                if owner[1] == length and owner[2] == table[-1]:
                    continue
                start = max(0, min(owner[1], length) - 1)  # only the last block of a table is ever replaced
            else:
                start = 0
            array[row, start:length] = table[start:]
            self._owners[row] = (table, length, table[-1])
            changed = True
        if changed:
            _copy_rectangle(self.tables, self._pinned_tables, len(tables), width)


def num_decodes(batch: StepBatch) -> int:
    """How many sequences at the beginning of a batch have one token."""
    starts = batch.query_start
    count = 0
    while count < len(batch.seq_lens) and starts[count + 1] - starts[count] == 1:
        count += 1
    return count


def _fill(to: Ints, values: Sequence[int], rest: int) -> None:
    to[: len(values)] = values
    to[len(values) :] = rest


def _copy_rectangle(to: torch.Tensor, pinned: torch.Tensor, rows: int, columns: int) -> None:
    """Copy ``[:rows, :columns]`` of two int32 tables of one shape, in one operation of torch's current stream."""
    if not to.is_cuda:
        to[:rows, :columns] = pinned[:rows, :columns]
        return
    from cuda.bindings import runtime

    pitch = to.shape[1] * 4
    kind: Any = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    stream = torch.cuda.current_stream().cuda_stream
    (error,) = runtime.cudaMemcpy2DAsync(
        to.data_ptr(), pitch, pinned.data_ptr(), pitch, columns * 4, rows, kind, stream
    )
    if int(error) != 0:
        raise RuntimeError(f"CUDA failed to copy the block tables: {error}")
