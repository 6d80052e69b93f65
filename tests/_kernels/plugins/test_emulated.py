"""The plugins' kernels, run on the CPU by the emulator with the parameters that TensorRT passes, against references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmapi._device import HEAD_SIZES
from llmapi._kernels.plugins import pool_addresses
from tests.emulator import plugin_cases as cases
from tests.emulator.gpu import EmulatedGpu

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def gpu(kernel_folder: Path) -> EmulatedGpu:
    return EmulatedGpu(kernel_folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    cases.write(gpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    cases.add_rms_norm(gpu, dtype)


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [(torch.bfloat16, size) for size in (8, 16, 32, 64, 128)]
    + [(torch.float32, size) for size in (8, 32, 128)]
    + [(torch.float16, size) for size in (16, 64)],
    ids=str,
)
def test_attention(gpu: EmulatedGpu, dtype: torch.dtype, block_size: int) -> None:
    heads, kv_heads = {8: (6, 2), 16: (2, 2), 32: (4, 1), 64: (3, 3), 128: (4, 2)}[block_size]
    cases.attention(gpu, dtype, heads, kv_heads, 64, block_size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (3, 3), (20, 1), (48, 1)])
@pytest.mark.parametrize("head_dim", HEAD_SIZES[1:])
def test_head_sizes(gpu: EmulatedGpu, head_dim: int, heads: int, kv_heads: int) -> None:
    steps = ["mixed"] if heads < 20 else ["decode"]  # prompts take each head by itself, whatever the group
    others = [torch.float32, torch.float16][:: 1 if HEAD_SIZES.index(head_dim) % 2 else -1]
    # Every type with every size, and with both of these.
    dtype = {3: others[0], 20: others[1]}.get(heads, torch.bfloat16)
    cases.attention(gpu, dtype, heads, kv_heads, head_dim, 16, steps, ["plain", "all"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_parts(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    """Into more parts than a sequence has tiles, into a few, and into one."""
    for parts in (150, 40, 2) if dtype == torch.bfloat16 else (40,):
        cases.attention(gpu, dtype, 4, 2, 64, 16, ["mixed", "decode"], parts=parts)
    cases.attention(gpu, dtype, 20, 1, 80, 8, ["decode"], ["plain", "all"], parts=60)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_on_turing(kernel_folder: Path, head_dim: int) -> None:
    """Without cp.async, and with the matrix instructions of half the depth."""
    gpu = EmulatedGpu(kernel_folder, capability=(7, 5), shared_memory=48 << 10)
    cases.attention(gpu, torch.float16, 4, 2, head_dim, 16, ["mixed"], ["plain", "all"])


def test_many_sequences(gpu: EmulatedGpu) -> None:
    cases.many_sequences(gpu)


def test_impossible_lengths(gpu: EmulatedGpu) -> None:
    cases.impossible_lengths(gpu)


def test_without_the_guard_nothing_is_read(gpu: EmulatedGpu) -> None:
    cases.no_guard(gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_then_attend(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    cases.write_then_attend(gpu, dtype)


def test_caches_that_plugins_cannot_read_are_refused() -> None:
    good, wide = torch.zeros(2, 16, 2, 64), torch.zeros(2, 16, 2, 128)
    assert pool_addresses([(good, good)]).tolist()[1:] == [good.data_ptr()] * 2
    with pytest.raises(ValueError, match=r"the values of layer 1 have strides .* plugins need contiguous caches"):
        pool_addresses([(good, good), (good, wide[..., :64])])
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        pool_addresses([(torch.zeros(4097)[1:].view(2, 16, 2, 64), good)])
