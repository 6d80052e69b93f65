"""Llama 1 to 3.3, and every checkpoint that calls itself LlamaForCausalLM (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmapi.models.family import Family
from llmapi.models.fields import activation, checkpoint_dtype, llama_weights, rope_spec
from llmapi.models.spec import TransformerSpec


def spec(config: Mapping[str, Any]) -> TransformerSpec:
    """config.json of a Llama checkpoint."""
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // heads
    return TransformerSpec(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=activation(config.get("hidden_act", "silu")),
        gated=True,
        rope=rope_spec(config, head_dim, default_theta=10000.0),
        qkv_bias=config.get("attention_bias", False),
        o_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_scale=head_dim**-0.5,
        windows=(0,) * layers,
        dtype=checkpoint_dtype(config),
    )


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    spec=spec,
    weights=llama_weights,
    prefix="model.",
    ignore=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
