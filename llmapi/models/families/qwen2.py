"""Qwen 1.5, 2 and 2.5 (dense)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmapi.models.families.llama import spec as llama_spec
from llmapi.models.family import Family
from llmapi.models.fields import llama_weights
from llmapi.models.spec import TransformerSpec


def spec(config: Mapping[str, Any]) -> TransformerSpec:
    """config.json of a Qwen2 checkpoint: Llama's with biases on q, k and v, and a window on some layers."""
    base = llama_spec({"max_position_embeddings": 32768, **config, "attention_bias": False})
    return dataclasses.replace(base, family="qwen2", qkv_bias=True, windows=_windows(config, base.num_layers))


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    if not window:
        return (0,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", 28)
        return tuple(window if i >= full else 0 for i in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    spec=spec,
    weights=llama_weights,
    prefix="model.",
    ignore=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
