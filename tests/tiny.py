"""Tiny random Hugging Face checkpoints and tokenizers, made by the tests themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, what is the capital of France?",
    "one two three",
]


def tiny_config(family: str = "llama", **overrides: Any) -> transformers.PretrainedConfig:
    """Configuration of a tiny model.

    Args:
        family: llama, mistral, qwen2 or gpt2.
        overrides: fields to change; ``num_key_value_heads`` and the like have no meaning for gpt2.
    """
    if family == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512}
        return transformers.GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 1, **overrides})
    kinds = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }
    return kinds[family](**{**SIZES, **overrides})


def tiny_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose weights are large enough that wrong mathematics shows, norms and biases included."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.12)
        else:
            torch.nn.init.normal_(parameter, 0.9, 0.2)
    return model


def tiny_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer of ``VOCAB`` ids with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return fast


def tiny_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, tokenizer: bool = True, **overrides: Any
) -> Path:
    """Write a tiny random checkpoint with config.json, generation_config.json, safetensors and tokenizer.

    Args:
        folder: made if needed.
        family: see :func:`tiny_config`.
        seed: of the weights.
        tokenizer: whether to write one.
        overrides: of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(tiny_config(family, **overrides), seed).save_pretrained(str(folder))
    if tokenizer:
        tiny_tokenizer(folder)
    return folder
