"""Options: what resolves to what, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmapi import _device
from llmapi._kernels import context_attention_cuda, decode_attention_cuda
from llmapi.config import EngineOptions, KvCacheConfig, resolve
from llmapi.errors import ConfigError
from llmapi.models.family import spec_of
from tests.tiny import tiny_config

SPEC = spec_of({**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]})


def test_defaults_resolve_to_concrete_values() -> None:
    config = resolve(EngineOptions(), SPEC)
    assert config.shape_parts() == {
        "backend": "cpu",
        "dtype": "float32",
        "kv_dtype": "float32",
        "max_seq_len": 512,
        "max_batch_size": 64,
        "max_num_tokens": 512,
        "block_size": 16,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"backend": "cuda"}, "backend='cuda' cannot run here"),
        ({"dtype": "fp32"}, "unknown dtype 'fp32'"),
        ({"dtype": "float16"}, "does not run on the cpu backend: use float32 or bfloat16"),
        ({"max_seq_len": 513}, "max_seq_len=513 is more than the 512 positions"),
        ({"max_seq_len": 0}, "max_seq_len=0: give a positive whole number"),
        ({"max_batch_size": True}, "max_batch_size=True"),
        ({"max_num_tokens": 8, "max_batch_size": 9}, "max_num_tokens=8 is less than max_batch_size=9"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"gpu_memory_utilization": "a"}, "gpu_memory_utilization='a': give a number in (0, 1]"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching='no': give True or False"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
    ],
)
def test_what_is_refused_names_value_and_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineOptions(**options), SPEC)
    assert message in str(caught.value)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU the cuda backend can use."""
    monkeypatch.setattr(_device, "cuda_problem", lambda: None)
    monkeypatch.setattr(_device, "cuda_capability", lambda: (9, 0))


WIDE = dataclasses.replace(SPEC, head_dim=64)


def test_a_gpu_that_can_be_used_is_taken(hopper: None) -> None:
    config = resolve(EngineOptions(), WIDE)
    assert (config.backend, config.dtype, config.kv_dtype, config.block_size) == ("cuda", "bfloat16", "bfloat16", 64)
    assert (config.max_batch_size, config.max_num_tokens) == (256, 8192)
    assert resolve(EngineOptions(), dataclasses.replace(WIDE, dtype="float16")).dtype == "float16"
    assert resolve(EngineOptions(dtype="float32"), WIDE).dtype == "float32"
    assert resolve(EngineOptions(backend="cpu"), WIDE).backend == "cpu"


def test_turing_has_no_bfloat16(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "cuda_capability", lambda: (7, 5))
    assert resolve(EngineOptions(), WIDE).dtype == "float16"
    with pytest.raises(ConfigError, match=r"dtype='bfloat16' needs a GPU of compute capability 8\.0"):
        resolve(EngineOptions(dtype="bfloat16"), WIDE)


def test_heads_that_the_kernels_are_not_made_for(hopper: None) -> None:
    assert resolve(EngineOptions(), SPEC).backend == "cpu"
    with pytest.raises(ConfigError, match=r"heads have 16 channels, and the cuda backend's attention takes 64, 80, "):
        resolve(EngineOptions(backend="cuda"), SPEC)
    for module in (context_attention_cuda, decode_attention_cuda):
        assert module.HEAD_DIMS == _device.HEAD_SIZES


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({"block_size": 12}, "block_size=12: give one of 8, 16, 32, 64, 128"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 8, "memory_bytes": 8}, "give one of them"),
        ({"memory_fraction": 0}, "memory_fraction=0"),
        ({"memory_fraction": True}, "memory_fraction=True"),
        ({"memory_fraction": "x"}, "memory_fraction='x'"),
        ({"block_size": 16.0}, "block_size=16.0"),
        ({"dtype": "fp8"}, "unknown KV cache dtype 'fp8'"),
        ({"free_gpu_memory_fraction": 0.9}, "unknown KvCacheConfig argument 'free_gpu_memory_fraction'"),
        (7, "give a KvCacheConfig or a dict"),
    ],
)
def test_kv_cache_config_refuses_clearly(kv: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KvCacheConfig.of(kv)
    assert message in str(caught.value)
