"""Engine: the one interface between the runtime and a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmapi._runtime.batch import StepBatch
from llmapi._runtime.plan import StepPlan
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
        moves_beams: whether it runs batches with :class:`~llmapi._runtime.batch.Moves`.
    """

    moves_beams = False
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

    @abstractmethod
    def step_hidden(
        self, batch: StepBatch, sampled: torch.Tensor | None, projected: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`step`, where the final hidden states (after the last norm) are wanted of some rows.

        Args:
            batch, sampled: as of :meth:`step`.
            projected: ascending places in ``batch.logits_indices`` whose logits are wanted; only these are projected to
                the vocabulary.

        Returns:
            ``[N, hidden_size]`` hidden states of every row of ``batch.logits_indices``, and ``[len(projected),
            vocab_size]`` logits; both valid until the next step.
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


def run_step(
    engine: Engine, plan: StepPlan, batch: StepBatch, sampled: torch.Tensor | None
) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    """Run a step whose entries may want hidden states, logits, or both kinds mixed.

    Args:
        engine: runs it.
        plan, batch: the step.
        sampled: see :meth:`Engine.step`.

    Returns:
        the rows of each entry that wants hidden states, and the logits of all other rows in order.
    """
    hidden: list[tuple[int, int]] = []
    projected: list[int] = []
    first = 0
    for entry, count in zip(plan.entries, batch.logits_rows, strict=True):
        probe = entry.seq.request.probe
        if probe is not None and probe.hidden:
            hidden.append((first, first + count))
        else:
            projected += range(first, first + count)
        first += count
    if not hidden:
        return iter(()), engine.step(batch, sampled)
    states, logits = engine.step_hidden(batch, sampled, projected)
    return (states[start:stop] for start, stop in hidden), logits


def cache_names(spec: TransformerSpec) -> list[str]:
    """The graph's names of its caches: keys, then values, layer by layer."""
    return [f"{kind}_cache.{layer}" for layer in range(spec.num_layers) for kind in "kv"]


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
