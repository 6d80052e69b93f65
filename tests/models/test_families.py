"""config.json to spec: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest

from llmapi.errors import UnsupportedModelError
from llmapi.models.family import families, spec_of
from llmapi.models.spec import TransformerSpec
from tests.tiny import tiny_config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**tiny_config(family).to_dict(), "architectures": [ARCHITECTURES[family]], **changes}


def test_every_family_is_found_by_its_architecture() -> None:
    assert {name: f.name for name, f in families().items()} == {v: k for k, v in ARCHITECTURES.items()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_spec_survives_json(family: str) -> None:
    spec = spec_of(config(family))
    assert TransformerSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_weight_table_names_every_parameter_once(family: str) -> None:
    import torch

    from llmapi.models.transformer import Transformer

    spec = spec_of(config(family))
    with torch.device("meta"):
        names = {name for name, _ in Transformer(spec).named_parameters()}
    assert set(families()[ARCHITECTURES[family]].weights(spec)) == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": []}, "names no architecture"),
        ({"architectures": ["LlamaForCausalML"]}, "did you mean 'LlamaForCausalLM'"),
        ({"hidden_act": "mish"}, "unknown activation 'mish'"),
        ({"dtype": "float8"}, "unknown checkpoint dtype 'float8'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "unknown rope scaling 'longrope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(config(**changes))
    assert message in str(caught.value)


def test_a_missing_field_is_named() -> None:
    broken = config()
    del broken["hidden_size"]
    with pytest.raises(UnsupportedModelError, match="lacks the field 'hidden_size'"):
        spec_of(broken)


@pytest.mark.parametrize("option", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_gpt2_options_that_change_the_mathematics_are_refused(option: str) -> None:
    with pytest.raises(UnsupportedModelError, match=option):
        spec_of(config("gpt2", **{option: True}))


def test_old_configs_get_the_defaults_of_their_family() -> None:
    bare = {"architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8}
    spec = spec_of({**bare, "num_hidden_layers": 1, "num_attention_heads": 2, "torch_dtype": "float16"})
    assert (spec.num_kv_heads, spec.norm_eps, spec.dtype, spec.max_position_embeddings) == (2, 1e-6, "float16", 2048)
    assert spec.rope is not None and spec.rope.theta == 10000.0
