"""GPT-2: learned positions, LayerNorm, plain GELU, packed q/k/v stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmapi.errors import UnsupportedModelError
from llmapi.models.family import Family, Take
from llmapi.models.fields import activation, checkpoint_dtype
from llmapi.models.spec import TransformerSpec


def spec(config: Mapping[str, Any]) -> TransformerSpec:
    """config.json of a GPT-2 checkpoint."""
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(option):
            raise UnsupportedModelError(f"config.json sets {option}=true, which is not supported for gpt2 models")
    hidden, heads, layers = config.get("n_embd", 768), config.get("n_head", 12), config.get("n_layer", 12)
    positions = config.get("n_positions", config.get("n_ctx", 1024))
    return TransformerSpec(
        family="gpt2",
        vocab_size=config.get("vocab_size", 50257),
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config.get("activation_function", "gelu_new")),
        gated=False,
        rope=None,
        learned_positions=positions,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        attention_scale=(hidden // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0,
        windows=(0,) * layers,
        dtype=checkpoint_dtype(config),
    )


def weights(spec: TransformerSpec) -> dict[str, Take]:
    """GPT-2's names: ``Conv1D`` modules hold ``[in, out]``, and ``c_attn`` holds q, k and v one after the other."""
    table = {
        "embed.weight": Take("wte.weight"),
        "positions.weight": Take("wpe.weight"),
        "norm.weight": Take("ln_f.weight"),
        "norm.bias": Take("ln_f.bias"),
    }
    for i in range(spec.num_layers):
        here, there = f"layers.{i}.", f"h.{i}."
        for ours, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for part in ("weight", "bias"):
                table[f"{here}{ours}.{part}"] = Take(f"{there}{theirs}.{part}")
        for index, part in enumerate("qkv"):
            rows = (index * spec.hidden_size, (index + 1) * spec.hidden_size)
            table[f"{here}attn.{part}.weight"] = Take(f"{there}attn.c_attn.weight", transpose=True, rows=rows)
            table[f"{here}attn.{part}.bias"] = Take(f"{there}attn.c_attn.bias", rows=rows)
        for ours, theirs in (("attn.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            table[f"{here}{ours}.weight"] = Take(f"{there}{theirs}.weight", transpose=True)
            table[f"{here}{ours}.bias"] = Take(f"{there}{theirs}.bias")
    if not spec.tie_word_embeddings:
        table["lm_head.weight"] = Take("lm_head.weight")
    return table


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    spec=spec,
    weights=weights,
    prefix="transformer.",
    ignore=(r"h\.\d+\.attn\.(masked_)?bias",),
)
