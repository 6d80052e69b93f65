"""Mistral 7B v0.1 to v0.3, Mistral Nemo and Mistral Small (text)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmapi.models.families.llama import spec as llama_spec
from llmapi.models.family import Family
from llmapi.models.fields import llama_weights
from llmapi.models.spec import TransformerSpec


def spec(config: Mapping[str, Any]) -> TransformerSpec:
    """config.json of a Mistral checkpoint: Llama's, with a sliding window over every layer where one is given."""
    base = llama_spec({"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, **config})
    window = config.get("sliding_window", 4096)  # a null there means none
    return dataclasses.replace(base, family="mistral", windows=(window or 0,) * base.num_layers)


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    spec=spec,
    weights=llama_weights,
    prefix="model.",
    ignore=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
