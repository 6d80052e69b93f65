"""A step's integers as the GPU gets them, on a device that is none: padding, tables that change, fixed places."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmapi._runtime import step_buffers
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.step_buffers import Layout, StepBuffers, StepShape, num_decodes


class NoEvent:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Device:
    device = torch.device("cpu")

    def event(self) -> NoEvent:
        return NoEvent()


@pytest.fixture
def buffers() -> StepBuffers:
    gpu: Any = Device()
    return StepBuffers(gpu, max_tokens=16, max_seqs=4, table_width=6)


def batch(tables: list[list[int]], counts: list[int]) -> StepBatch:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    total = starts[-1]
    ids, lens = list(range(5, 5 + total)), [10 * (i + 1) for i in range(len(counts))]
    return StepBatch(ids, ids, ids, tables, lens, starts, [s - 1 for s in starts[1:]], [1] * len(counts), [])


def upload(buffers: StepBuffers, step: StepBatch, shape: StepShape) -> Layout:
    return buffers.upload(step, shape, num_decodes(step))


def test_what_is_beyond_the_batch_computes_nothing(buffers: StepBuffers) -> None:
    step = batch([[1], [2, 3]], [1, 3])
    arrays = upload(buffers, step, StepShape(8, 4, 4, False)).device
    assert arrays["counts"].tolist() == [1, 2, 4, 2]
    assert arrays["source_ids"].tolist() == [5, 6, 7, 8, 0, 0, 0, 0]
    assert arrays["slot_mapping"].tolist() == [5, 6, 7, 8, -1, -1, -1, -1]
    assert arrays["seq_lens"].tolist() == [10, 20, 0, 0]
    assert arrays["query_start"].tolist() == [0, 1, 4, 4, 4]
    assert arrays["logits_indices"].tolist() == [0, 3, 0, 0]
    assert arrays["block_tables"].tolist()[:2] == [[1, 0, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0]]


def test_tables_follow_every_change(buffers: StepBuffers) -> None:
    """A table that grows, one whose last block is replaced, and a row that goes to another sequence."""
    first, second = [1, 2], [3]
    shape = StepShape(2, 2, 2, True)
    upload(buffers, batch([first, second], [1, 1]), shape)
    first.append(7)
    second[-1] = 9
    upload(buffers, batch([first, second], [1, 1]), shape)
    assert buffers.tables[:2, :3].tolist() == [[1, 2, 7], [9, 0, 0]]
    first[-1] = 8
    first.append(4)  # replaced and grown at once
    upload(buffers, batch([first, [5, 6]], [1, 1]), shape)
    assert buffers.tables[:2, :4].tolist() == [[1, 2, 8, 4], [5, 6, 0, 0]]
    upload(buffers, batch([[5, 6], first], [1, 1]), shape)
    assert buffers.tables[0, :2].tolist() == [5, 6] and buffers.tables[1, :4].tolist() == [1, 2, 8, 4]


def test_a_shape_keeps_its_place_and_few_are_kept(buffers: StepBuffers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_buffers, "_MOST_LAYOUTS", 3)
    shape = StepShape(4, 4, 4, True)
    places = {name: array.data_ptr() for name, array in buffers.layout(shape).device.items()}
    for tokens in range(5, 12):
        buffers.layout(StepShape(tokens, 2, 1, False))
        assert len(buffers._layouts) <= 3
    assert {name: array.data_ptr() for name, array in buffers.layout(shape).device.items()} == places
    assert all(place % 16 == 0 for place in places.values())


def test_sequences_of_one_token_are_counted_from_the_start() -> None:
    assert num_decodes(batch([[1]] * 4, [1, 1, 3, 1])) == 2
    assert num_decodes(batch([[1]] * 2, [2, 1])) == 0
    assert num_decodes(batch([[1]] * 3, [1, 1, 1])) == 3
