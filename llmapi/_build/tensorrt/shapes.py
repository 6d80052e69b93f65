"""Shapes: the sizes a plan takes, as optimization profiles, and the sizes that are run, as buckets.

Two profiles of one network. Decode: many sequences, one token each. Prefill: one sequence, many tokens. Kernels are made
for the sizes that come up, so a step is padded to one of few: the powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmapi._build.graph import Graph
from llmapi.config import EngineConfig
from llmapi.models.spec import TransformerSpec

DECODE, PREFILL = 0, 1
"""Indices of the profiles."""

_SMALLEST_CHUNK = 16  # tokens; shorter prompts are padded to it

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Sizes between which the step's inputs may vary.

    Attributes:
        sequences: fewest, most common and most sequences ``B``.
        tokens: likewise of new tokens a sequence, ``S``.
        rows: likewise of rows whose logits are wanted, ``N``.
    """

    sequences: tuple[int, int, int]
    tokens: tuple[int, int, int]
    rows: tuple[int, int, int]

    def shapes(self, graph: Graph, spec: TransformerSpec, max_seq_len: int) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Smallest, most common and largest shape of every input of a natively lowered graph that varies in size.

        Args:
            graph: the step.
            spec: the model.
            max_seq_len: tokens of a sequence.
        """
        caches = [i.name for i in graph.inputs if i.kind in ("k_cache", "v_cache")]
        row = (spec.num_kv_heads, max_seq_len, spec.head_dim)
        found: dict[str, tuple[Shape, Shape, Shape]] = {}

        def put(name: str, shape: list[Shape]) -> None:
            found[name] = (shape[0], shape[1], shape[2])

        for name in ("input_ids", "positions"):
            put(name, [(b, s) for b, s in zip(self.sequences, self.tokens, strict=True)])
        for name in ("write_index", "kv_lengths"):
            put(name, [(b,) for b in self.sequences])
        put("logits_indices", [(n,) for n in self.rows])
        for name in caches:
            put(name, [(b, *row) for b in self.sequences])
        return found


def max_chunk(config: EngineConfig) -> int:
    """Most new tokens of one sequence in one step."""
    return min(config.max_num_tokens, config.max_seq_len)


def profiles(config: EngineConfig) -> tuple[Profile, Profile]:
    """The profiles for decode and for prefill, in the order of their indices.

    Args:
        config: the engine's limits.
    """
    batch, chunk = config.max_batch_size, max_chunk(config)
    many = (1, max(1, batch // 2), batch)
    long = (1, min(chunk, 512), chunk)
    return Profile(many, (1, 1, 1), many), Profile((1, 1, 1), long, (1, 1, chunk))


def native_profiles(
    graph: Graph, spec: TransformerSpec, config: EngineConfig
) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """The shapes of a natively lowered graph's inputs in each profile.

    Args:
        graph: the step.
        spec: the model.
        config: the engine's limits.
    """
    return [profile.shapes(graph, spec, config.max_seq_len) for profile in profiles(config)]


def decode_bucket(count: int, most: int) -> int:
    """How many rows of the cache a decode step runs over when it needs ``count``.

    >>> [decode_bucket(n, 12) for n in (1, 3, 8, 9)]
    [1, 4, 8, 12]
    """
    return min(most, 1 << (count - 1).bit_length())


def prefill_bucket(count: int, room: int, most: int) -> int:
    """How many tokens a prefill of ``count`` is padded to.

    Args:
        count: new tokens.
        room: tokens from the first new one to the end of the row: what is written may not leave it.
        most: of a step.

    >>> [prefill_bucket(n, 100, 64) for n in (3, 17, 64)], prefill_bucket(17, 20, 64)
    ([16, 32, 64], 20)
    """
    return min(max(_SMALLEST_CHUNK, 1 << (count - 1).bit_length()), room, most)
