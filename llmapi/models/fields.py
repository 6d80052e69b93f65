"""Pieces of config.json that several families spell the same way, and the weight table that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from llmapi.errors import UnsupportedModelError, unknown_name
from llmapi.models.family import Take
from llmapi.models.spec import Activation, RopeSpec, TransformerSpec

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_DTYPES = ("float32", "float16", "bfloat16")
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def activation(name: str) -> Activation:
    """The non-linearity that Hugging Face calls ``name``."""
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(unknown_name("activation", name, _ACTIVATIONS))
    return _ACTIVATIONS[name]


def checkpoint_dtype(config: Mapping[str, Any]) -> str:
    """The dtype config.json names (``dtype``, formerly ``torch_dtype``); float32 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModelError(unknown_name("checkpoint dtype", name, _DTYPES))
    return name


def rope_spec(config: Mapping[str, Any], head_dim: int, *, default_theta: float) -> RopeSpec:
    """Rotary embedding from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

    Args:
        config: parsed config.json.
        head_dim: channels of a head.
        default_theta: base where none is given.
    """
    options = dict(config.get("rope_scaling") or {})
    options.update(config.get("rope_parameters") or {})
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedModelError(unknown_name("rope scaling", kind, _ROPE_KINDS))
    theta = float(options.get("rope_theta", config.get("rope_theta", default_theta)))
    partial = options.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    factor = float(options["factor"])
    if kind == "linear":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind="linear", factor=factor)
    original = options.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            rotary_dim=rotary_dim,
            kind="llama3",
            factor=factor,
            original_max_positions=cast(int, original),
            low_freq_factor=float(options["low_freq_factor"]),
            high_freq_factor=float(options["high_freq_factor"]),
        )
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="yarn",
        factor=factor,
        original_max_positions=original or config["max_position_embeddings"],
        beta_fast=float(options.get("beta_fast") or 32.0),
        beta_slow=float(options.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention(options, factor),
        truncate=bool(options.get("truncate", True)),
    )


def _yarn_attention(options: Mapping[str, Any], factor: float) -> float:
    """Equation 22 of the YaRN paper, with DeepSeek's ``mscale`` variants as transformers reads them."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = options.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, mscale_all = options.get("mscale"), options.get("mscale_all_dim")
    if mscale and mscale_all:
        return scale(mscale) / scale(mscale_all)
    return scale(1.0)


def llama_weights(spec: TransformerSpec) -> dict[str, Take]:
    """The names that Llama introduced and most families kept."""
    table = {"embed.weight": Take("embed_tokens.weight"), "norm.weight": Take("norm.weight")}
    linears = {
        "attn.q": ("self_attn.q_proj", spec.qkv_bias),
        "attn.k": ("self_attn.k_proj", spec.qkv_bias),
        "attn.v": ("self_attn.v_proj", spec.qkv_bias),
        "attn.o": ("self_attn.o_proj", spec.o_bias),
        "mlp.gate": ("mlp.gate_proj", spec.mlp_bias),
        "mlp.up": ("mlp.up_proj", spec.mlp_bias),
        "mlp.down": ("mlp.down_proj", spec.mlp_bias),
    }
    for i in range(spec.num_layers):
        here = f"layers.{i}."
        table[f"{here}attn_norm.weight"] = Take(f"{here}input_layernorm.weight")
        table[f"{here}mlp_norm.weight"] = Take(f"{here}post_attention_layernorm.weight")
        for ours, (theirs, bias) in linears.items():
            table[f"{here}{ours}.weight"] = Take(f"{here}{theirs}.weight")
            if bias:
                table[f"{here}{ours}.bias"] = Take(f"{here}{theirs}.bias")
    if not spec.tie_word_embeddings:
        table["lm_head.weight"] = Take("lm_head.weight")
    return table
