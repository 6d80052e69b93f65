"""Options: what resolves to what, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

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
