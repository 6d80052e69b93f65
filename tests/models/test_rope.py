"""Rotary frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmapi.models.fields import rope_spec
from llmapi.models.rope import inverse_frequencies

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn untruncated": {"factor": 16.0, "original_max_position_embeddings": 128, "truncate": False, "beta_fast": 20.0},
    "yarn mscale": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn attention": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(kind: str, theta: float) -> None:
    name = kind.split()[0]
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": name, "rope_theta": theta, **KINDS[kind]},
    )
    spec = rope_spec(config.to_dict(), 64, default_theta=10000.0)
    if name == "default":
        expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"))
    actual = inverse_frequencies(spec)
    assert torch.allclose(actual, expected.float(), rtol=1e-6, atol=0)
    assert spec.attention_factor == pytest.approx(scale)
    if name != "default":
        assert not torch.allclose(actual, inverse_frequencies(rope_spec({}, 64, default_theta=theta)))


def test_the_spelling_before_transformers_5() -> None:
    old = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}}
    assert rope_spec(old, 64, default_theta=1.0) == rope_spec(new, 64, default_theta=1.0)
