"""StepPlan: everything one step computes, decided before any of it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmapi._runtime.request import Sequence


@dataclass(eq=False, slots=True)
class Entry:
    """Tokens ``start`` to ``start + count`` (exclusive) of ``seq``, computed in this step."""

    seq: Sequence
    start: int
    count: int

    @property
    def produces_logits(self) -> bool:
        """Whether the step reaches the sequence's last token. Ask before a token is appended."""
        return self.start + self.count == len(self.seq.token_ids)


@dataclass(eq=False, slots=True)
class StepPlan:
    """One step: first the copies, in any order; then the entries, all at once.

    Invariants: ``entries`` is not empty and names no sequence twice; each sequence's block table has room for its
    entry; no block is the target of two copies, or the target of one and the source of another.

    Attributes:
        entries: what to compute.
        copies: ``(source, target)`` blocks whose whole contents must be copied before anything is written.
        preempted: sequences that lost their blocks for this step's sake; they wait to be recomputed.
    """

    entries: list[Entry]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """How many tokens the step computes."""
        return sum(entry.count for entry in self.entries)


@dataclass(eq=False, slots=True)
class Draft:
    """A plan in the making.

    A copy owns a reference to its source until the plan is done: when the last sequence that owned the source is
    preempted in the same step, the block cannot be handed out while it is still to be read.
    """

    tokens: int  # still to give away
    slots: int  # entries still to give away
    entries: dict[Sequence, Entry] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)  # target -> source
    held: Counter[int] = field(default_factory=Counter)  # source -> references owned by copies
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether no further entry can be planned."""
        return not (self.tokens and self.slots)
