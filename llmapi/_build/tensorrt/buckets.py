"""Buckets: the few fixed sizes that steps of a plan with plugins are padded to, one optimization profile each.

A plugin's module leaks when a shape changes (docs/kernels/plugins.md), so no profile has a range: its smallest, most
common and largest sizes are one, and an execution context of its own keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmapi._build.graph import STEP_INPUTS
from llmapi._tensorrt import BLOCK_SIZE
from llmapi.config import EngineConfig
from llmapi.errors import CacheError, CapacityError


@dataclass(frozen=True)
class Bucket:
    """Sizes of a ragged step.

    Attributes:
        tokens: new tokens of all sequences, ``T``.
        sequences: ``B``.
        rows: rows whose logits are wanted, ``N``.
    """

    tokens: int
    sequences: int
    rows: int

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the step's inputs by name.

        Args:
            width: blocks of a block table, ``M``.
        """
        sizes = {"T": self.tokens, "B": self.sequences, "B+1": self.sequences + 1, "M": width, "N": self.rows}
        return {name: tuple(sizes[size] for size in shape) for name, shape in STEP_INPUTS.items()}


def table_width(max_seq_len: int) -> int:
    """Blocks of the longest sequence, ``M``: as wide as block tables are in every step."""
    return -(-max_seq_len // BLOCK_SIZE)


def buckets(max_batch_size: int, max_num_tokens: int) -> list[Bucket]:
    """All buckets, small ones first.

    Tokens are the powers of two and the most that a step has. Each has as many sequences and rows as so many tokens
    can have; the last has logits of every token, as scores of prompts want them.

    Args:
        max_batch_size: most sequences in one step.
        max_num_tokens: most new tokens in one step.

    >>> [(b.tokens, b.sequences, b.rows) for b in buckets(3, 12)]
    [(1, 1, 1), (2, 2, 2), (4, 3, 3), (8, 3, 3), (12, 3, 3), (12, 3, 12)]
    """
    counts = [1 << power for power in range((max_num_tokens - 1).bit_length())] + [max_num_tokens]
    found = [Bucket(t, min(t, max_batch_size), min(t, max_batch_size)) for t in counts]
    return list(dict.fromkeys([*found, Bucket(max_num_tokens, min(max_num_tokens, max_batch_size), max_num_tokens)]))


def buckets_of(config: EngineConfig) -> list[Bucket]:
    """:func:`buckets` of an engine's limits."""
    return buckets(config.max_batch_size, config.max_num_tokens)


def buckets_in(profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> tuple[list[Bucket], int]:
    """The buckets that a plan was built with, in the order of its profiles, and the width of its block tables.

    Args:
        profiles: as a plan's description has them: for each, input to smallest, most common and largest shape.

    Raises:
        CacheError: they are no buckets of one width.
    """
    found: list[Bucket] = []
    widths: set[int] = set()
    try:
        for profile in profiles:
            [tokens], [sequences], [rows] = (profile[n][0] for n in ("input_ids", "seq_lens", "logits_indices"))
            width = profile["block_tables"][0][1]
            found.append(Bucket(tokens, sequences, rows))
            widths.add(width)
            same = all(tuple(size) == shape for name, shape in found[-1].shapes(width).items() for size in profile[name])
            if not same:
                raise ValueError(f"profile {len(found) - 1} is no bucket of fixed sizes")
        [width] = widths
    except (KeyError, IndexError, ValueError) as error:
        raise CacheError(
            f"the plan's description has no buckets of a paged step ({error}): remove the entry, build again"
        ) from error
    return found, width


def choose(of: Sequence[Bucket], tokens: int, sequences: int, rows: int) -> int:
    """Index of the smallest bucket that a step fits in.

    Args:
        of: from :func:`buckets`.
        tokens, sequences, rows: of the step.

    Raises:
        CapacityError: none is large enough.

    >>> choose(buckets(3, 12), 5, 2, 1), choose(buckets(3, 12), 5, 2, 5)
    (3, 5)
    """
    for index, bucket in enumerate(of):
        if tokens <= bucket.tokens and sequences <= bucket.sequences and rows <= bucket.rows:
            return index
    largest = of[-1]
    raise CapacityError(
        f"a step of {tokens} tokens of {sequences} sequences with {rows} rows of logits is larger than the plan's "
        f"{largest.tokens}, {largest.sequences} and {largest.rows}: raise max_num_tokens or max_batch_size"
    )
