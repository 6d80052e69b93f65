"""Write a checkpoint of a given shape with random weights, to measure speed where real weights cannot be had.

python benchmarks/random_checkpoint.py FOLDER            # the shape of SmolLM2-135M
"""

from __future__ import annotations

import argparse

import torch
import transformers

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }
}


def main() -> None:
    """Make the model and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[options.shape])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
