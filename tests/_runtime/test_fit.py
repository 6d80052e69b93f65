"""A model that cannot fit the GPU is refused with the arithmetic, before anything is fetched."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from llmapi._runtime.fit import RESERVE, check_config_file, check_fits, complain
from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.errors import ConfigError, UnsupportedModelError
from llmapi.models.family import spec_of
from llmapi.models.spec import TransformerSpec

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
PARAMETERS = 6_738_415_616  # of Llama-2-7B, as its authors count them
BLOCK = 64 * 2 * 32 * 4096 * 2  # 64 tokens, keys and values, layers, channels, bytes


def gpu_config() -> tuple[TransformerSpec, EngineConfig]:
    spec = spec_of(LLAMA_7B)
    config = resolve(EngineOptions(backend="cpu", dtype="bfloat16"), spec)
    return spec, dataclasses.replace(config, backend="cuda", block_size=64)


def test_the_limit_is_weights_reserve_and_one_block() -> None:
    spec, config = gpu_config()
    need = 2 * PARAMETERS + RESERVE + BLOCK
    complain(spec, config, 1.0, need, need, "a GPU")
    with pytest.raises(ConfigError) as caught:
        complain(spec, config, 1.0, need - 1, need, "a GPU")
    text = str(caught.value)
    assert "does not fit a GPU: its weights take 12.55 GiB in bfloat16" in text
    assert re.search(r"one KV block of 64 tokens takes 0\.031 GiB: 13\.08 GiB together", text)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0.9 allows 11\.77 more"):
        complain(spec, config, 0.9, need, need, "a GPU")


def test_the_cpu_takes_any_model() -> None:
    spec, config = gpu_config()
    check_fits(spec, dataclasses.replace(config, backend="cpu"), 0.9)


def test_a_configuration_is_checked_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    options = EngineOptions(backend="cpu")
    check_config_file(path, options)
    for broken in ("", "[]", "{"):
        path.write_text(broken)
        check_config_file(path, options)
    path.write_text(json.dumps(LLAMA_7B))
    check_config_file(path, options)
    with pytest.raises(ConfigError, match="max_seq_len=5000"):
        check_config_file(path, EngineOptions(backend="cpu", max_seq_len=5000))
    path.write_text(json.dumps({**LLAMA_7B, "architectures": ["Unheard"]}))
    with pytest.raises(UnsupportedModelError):
        check_config_file(path, options)
