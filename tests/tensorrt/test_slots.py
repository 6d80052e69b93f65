"""A ragged step as runs over rows of the linear cache: plain ints."""

from __future__ import annotations

import random

import pytest

from llmapi._build.tensorrt.shapes import DECODE, PREFILL, decode_bucket, prefill_bucket, profiles
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.slots_tensorrt import runs_of
from llmapi.config import EngineOptions, resolve
from tests._runtime.test_engine_cpu import SPEC

LIMITS = {"slots": 6, "capacity": 50, "max_batch": 6, "max_tokens": 20}


def batch_of(parts: list[tuple[int, int, int, bool]]) -> StepBatch:
    """From ``(row, start, count, whether its last token's logits are wanted)``; the id of a token tells its place."""
    batch = StepBatch([], [], [], [], [], [0], [], [], [])
    for row, start, count, wanted in parts:
        batch.input_ids += [row * 100 + p for p in range(start, start + count)]
        batch.positions += range(start, start + count)
        batch.block_tables.append([row])
        batch.seq_lens.append(start + count)
        batch.query_start.append(len(batch.input_ids))
        batch.logits_indices += [len(batch.input_ids) - 1] * wanted
        batch.logits_rows.append(int(wanted))
    return batch


def test_decodes_run_together_and_prompts_alone() -> None:
    batch = batch_of([(4, 7, 1, True), (1, 0, 17, True), (2, 30, 1, True)])
    prompt, decode = runs_of(batch, **LIMITS)
    assert (prompt.profile, prompt.first_row, prompt.write_index, prompt.kv_lengths) == (PREFILL, 1, [0], [20])
    assert prompt.input_ids == [[*range(100, 117), 0, 0, 0]] and prompt.positions == [list(range(20))]
    assert (prompt.logits_indices, prompt.places) == ([16], [1])
    assert (decode.profile, decode.first_row) == (DECODE, 2)
    assert decode.input_ids == [[230], [0], [407], [0]]
    assert decode.write_index == [30, 49, 7, 49] and decode.kv_lengths == [31, 1, 8, 1]
    assert (decode.logits_indices, decode.places) == ([0, 2], [2, 0])


def test_a_window_never_leaves_the_cache() -> None:
    [run] = runs_of(batch_of([(5, 3, 1, True), (3, 4, 1, True)]), **LIMITS)
    assert run.first_row == 2 and len(run.input_ids) == 4
    [run] = runs_of(batch_of([(5, 3, 1, False)]), **LIMITS)
    assert run.first_row == 5 and run.logits_indices == run.places == []


def test_padding_never_leaves_the_row() -> None:
    [run] = runs_of(batch_of([(0, 45, 4, True)]), **LIMITS)
    assert len(run.input_ids[0]) == 5 and run.positions[0][-1] == 49


def test_any_step_is_covered_once() -> None:
    rng = random.Random(1)
    for _ in range(300):
        slots = rng.randrange(1, 9)
        limits = {"slots": slots, "capacity": 50, "max_batch": rng.randrange(1, slots + 1), "max_tokens": 20}
        parts = []
        for row in rng.sample(range(slots), rng.randrange(1, slots + 1)):
            start = rng.randrange(0, 48)
            parts.append((row, start, rng.randrange(1, min(20, 49 - start) + 1), rng.random() < 0.8))
        batch = batch_of(parts)
        written: dict[tuple[int, int], int] = {}
        places = []
        for run in runs_of(batch, **limits):
            assert run.first_row + len(run.input_ids) <= slots and len(run.input_ids) <= limits["max_batch"]
            assert len(run.places) == len(run.logits_indices)
            flat = [i for row in run.input_ids for i in row]
            for index, place in zip(run.logits_indices, run.places, strict=True):
                assert flat[index] == batch.input_ids[batch.logits_indices[place]]
            places += run.places
            for offset, (ids, positions) in enumerate(zip(run.input_ids, run.positions, strict=True)):
                assert positions[0] == run.write_index[offset] and positions[-1] < 50
                for token, position in zip(ids, positions, strict=True):
                    if token:
                        assert (run.first_row + offset, position) not in written
                        written[run.first_row + offset, position] = token
        expected = {(row, p): row * 100 + p for row, start, count, _ in parts for p in range(start, start + count)}
        assert {k: v for k, v in expected.items() if v} == written
        assert sorted(places) == list(range(len(batch.logits_indices)))


def test_buckets_are_few_and_profiles_hold_them() -> None:
    config = resolve(EngineOptions(backend="tensorrt", max_batch_size=12, max_num_tokens=200, max_seq_len=100), SPEC)
    decode, prefill = profiles(config)
    assert decode.sequences == (1, 6, 12) and decode.tokens == (1, 1, 1)
    assert prefill.sequences == (1, 1, 1) and prefill.tokens == (1, 100, 100)
    assert {decode_bucket(n, 12) for n in range(1, 13)} == {1, 2, 4, 8, 12}
    assert {prefill_bucket(n, 100, 100) for n in range(2, 101)} == {16, 32, 64, 100}


@pytest.mark.parametrize("row", [0, 3])
def test_rows_of_other_sequences_are_left_alone(row: int) -> None:
    """What an idle row writes goes to its last place, which no token is ever computed for."""
    for run in runs_of(batch_of([(row, 5, 1, True), (5, 9, 1, True)]), **LIMITS):
        idle = [w for ids, w in zip(run.input_ids, run.write_index, strict=True) if ids == [0]]
        assert set(idle) <= {49}
