"""Engine: the one interface between the runtime and a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmapi._runtime.batch import StepBatch
from llmapi._runtime.sampler import Sampler, SamplerTokenizer
from llmapi.config import EngineConfig
from llmapi.errors import ConfigError
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    import torch


class Engine(ABC):
    """A loaded model that runs steps.

    Attributes:
        spec, config: what it was built for.
        num_blocks: KV blocks it has.
    """

    spec: TransformerSpec
    config: EngineConfig
    num_blocks: int

    @abstractmethod
    def step(self, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Copy blocks, then run the batch. On a GPU the step is queued, and the caller goes on.

        Args:
            sampled: what the step before chose, ``[rows]`` int32 on the engine's device; an input id ``~row`` stands
                for its ``row``. None where every id of the batch is known.
            batch: at most ``max_num_tokens`` tokens of at most ``max_batch_size`` sequences.

        Returns:
            ``[len(batch.logits_indices), vocab_size]`` logits in float32 or the model's dtype, on the engine's device,
            valid until the next step.
        """

    def sampler(self, tokenizer: SamplerTokenizer | None) -> Sampler:
        """What chooses tokens from this engine's logits.

        Args:
            tokenizer: None where there is none.
        """
        return Sampler(self.spec.vocab_size, tokenizer)

    @abstractmethod
    def close(self) -> None:
        """Give back all memory. The engine cannot be used after; closing twice is closing once."""


def num_kv_blocks(config: EngineConfig, spec: TransformerSpec, free_bytes: Callable[[], int], fraction: float) -> int:
    """How many KV blocks to allocate.

    Never more than ``max_batch_size`` sequences of ``max_seq_len`` tokens can use.

    Args:
        config: the engine's limits.
        spec: the model.
        free_bytes: tells how much memory is free for the cache; asked only where the user named no size.
        fraction: share of it to take, where the user named no size.

    Raises:
        ConfigError: not even one sequence of one block fits.
    """
    asked = config.kv_cache
    block_bytes = config.block_size * spec.kv_bytes_per_token(config.kv_dtype_bytes)
    per_sequence = -(-config.max_seq_len // config.block_size)
    useful = per_sequence * config.max_batch_size
    if asked.max_tokens is not None:
        blocks, origin = asked.max_tokens // config.block_size, f"max_tokens={asked.max_tokens}"
    elif asked.memory_bytes is not None:
        blocks, origin = asked.memory_bytes // block_bytes, f"memory_bytes={asked.memory_bytes}"
    else:
        share, free = asked.memory_fraction or fraction, free_bytes()
        blocks = min(int(free * share) // block_bytes, useful)
        origin = f"{share:.0%} of {free / 2**30:.1f} GiB free memory"
    if blocks < 1:
        raise ConfigError(
            f"the KV cache ({origin}) has no room for one block of {config.block_size} tokens, which takes "
            f"{block_bytes:,} bytes ({spec.num_layers} layers x 2 x {spec.kv_size} channels x "
            f"{config.kv_dtype_bytes} bytes x {config.block_size} tokens): give it more memory"
        )
    return blocks
