"""Requests as the runtime sees them: plain ints and lists, no tensor.

A :class:`Request` is what the user sent; it owns one :class:`Sequence` per sequence being generated. The scheduler
moves sequences; only the loop, the single place where decisions are committed, appends tokens to them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmapi.outputs import FinishReason, RequestMetrics
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    from concurrent.futures import Future

    from llmapi._runtime.grammar import Grammar
    from llmapi._runtime.guide import Guide
    from llmapi._runtime.probe import Probe


class Status(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # has no KV blocks: new, or preempted
    RUNNING = "running"  # has KV blocks and takes part in steps
    FINISHED = "finished"  # its blocks are given back


@dataclass(eq=False, slots=True)
class Sequence:
    """One line of tokens: the prompt and what was generated after it.

    Invariants (held by the scheduler's randomized test):
        ``0 <= num_computed <= len(token_ids)``; ``len(block_table) * block_size >= num_computed``;
        a WAITING or FINISHED sequence owns no block and has ``num_computed == 0``.

    Attributes:
        request: the request this belongs to.
        index: position among the request's sequences.
        token_ids: prompt ids followed by generated ids. While a step is in flight the last one may be a reference to
            its result, a negative number; see :class:`llmapi._runtime.flight.Flight`.
        num_prompt: how many of them are prompt.
        num_computed: how many leading tokens have their KV in the cache.
        num_cached: how many leading tokens were found in the prefix cache when it was first admitted.
        block_table: ids of the KV blocks that hold them, in order.
        block_hashes: hash of each full, computed block so far (prefix reuse).
        arrival: when the scheduler first saw it, as a running number; a fork has that of its parent.
        preemptions: how often it lost its blocks and was recomputed.
        guide: where it stands in its request's grammar, if there is one.
    """

    request: Request
    index: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int = 0
    num_cached: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    arrival: int = 0
    preemptions: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    guide: Guide | None = None

    @property
    def output_ids(self) -> list[int]:
        """Generated token ids that are known."""
        known = self.token_ids[self.num_prompt :]
        if known and known[-1] < 0:
            del known[-1]
        return known

    @property
    def num_output(self) -> int:
        """How many tokens were generated, one still in flight included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


@dataclass(eq=False, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        id: unique within the LLM.
        prompt: text of the prompt, where it was given as text.
        prompt_token_ids: its ids.
        params: how to decode.
        seed: 64-bit key of the random stream: ``params.seed``, or one drawn by the LLM.
        max_tokens: ``params.max_tokens`` cut to what ``max_seq_len`` leaves.
        stop_token_ids: every id that ends a sequence (generation config, tokenizer and params; empty of end tokens
            under ``ignore_eos``).
        priority: arrival order; smaller is served first.
        sequences: grows from one to ``params.num_drawn``, or to the beams of a search, when the prompt has been
            computed. Those of a search are the beams that run, by index.
        grammar: what the text follows, once it is compiled.
        probe: what is wanted of the prompt's rows, where nothing is to be generated.
        lockstep: whether its sequences must be in the same steps: those of a search with several beams.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    metrics: RequestMetrics
    priority: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    grammar: Future[Grammar] | None = None
    probe: Probe | None = None
    lockstep: bool = field(init=False)

    def __post_init__(self) -> None:
        self.lockstep = self.params.num_beams > 1
        if not self.sequences:
            self.sequences.append(Sequence(self, 0, list(self.prompt_token_ids), len(self.prompt_token_ids)))

    @property
    def first_wanted_row(self) -> int | None:
        """First position of the prompt whose row is wanted for itself; None where only the last one's is."""
        if self.probe is not None:
            return self.probe.first
        return 0 if self.params.needs_prompt_logits else None

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(s.finished for s in self.sequences)
