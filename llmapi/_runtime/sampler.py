"""Sampler: from a step's logits to token ids.

The order of operations, for each row by its own request:

1. raw logits: ``logprobs`` and ``return_logits`` are of these, the model's own distribution
2. ``logits_processors``, in the order given; then ids that ``guided_decoding`` does not allow become -inf
3. ``min_tokens``: ids that end a sequence become -inf until there are enough
4. ``logit_bias``
5. ``bad_words``: the id that would complete one becomes -inf
6. ``repetition_penalty``, then ``frequency_penalty`` and ``presence_penalty``
7. greedy (``temperature=0``): the largest logit, the lowest id among equals; otherwise
8. ``temperature``, ``top_k``, ``top_p``, ``min_p``
9. the draw: inverse CDF, in the order of token ids, at one Philox number of (seed, sequence index, output position)

A row's tokens depend on its logits and its request alone, bit for bit, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmapi._runtime.candidates import Candidates
from llmapi._runtime.draw import Truncation, argmax, draw
from llmapi._runtime.logit_edits import Encoder, LogitEdits
from llmapi._runtime.logprobs import prompt_logprobs, token_logprobs
from llmapi._runtime.no_choice import no_choice
from llmapi._runtime.philox import uniforms
from llmapi._runtime.request import Sequence
from llmapi.errors import RequestError
from llmapi.outputs import Logprob

__all__ = ["ReadyTokens", "SampleRow", "Sampled", "Sampler", "SamplerTokenizer", "prompt_logprobs"]


class SamplerTokenizer(Encoder, Protocol):
    """What the sampler asks of a tokenizer: ``encode`` for bad_words, ``token_text`` for logprobs."""

    def token_text(self, token_id: int) -> str:
        """One token as text."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What to take from one row of logits.

    Attributes:
        sequence: the sequence whose next token is wanted.
        count: how many tokens to draw: 1, or ``n`` for the first token of an n-sample request, which then go to
            the sequences with indices 0 to ``n - 1``.
    """

    sequence: Sequence
    count: int = 1


@dataclass(slots=True)
class Sampled:
    """What was taken from one row of logits.

    Attributes:
        token_ids: ``count`` ids; empty where the row failed.
        logprobs: one dict per id, where ``logprobs`` was asked for.
        logits: ``[V]`` float32 raw logits on the host, where ``return_logits`` asked for those of the output.
        error: why this request cannot go on; other rows are unharmed.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    logits: Tensor | None = None
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class ReadyTokens:
    """Tokens that were chosen already; see :class:`llmapi._runtime.flight.Pending`."""

    sampled: list[Sampled]
    ids: Tensor | None = None

    def result(self) -> list[Sampled]:
        """The tokens of each row."""
        return self.sampled


class Sampler:
    """Chooses tokens for a batch of rows.

    Args:
        vocab_size: width of the logits.
        tokenizer: encodes bad_words and gives logprobs their texts; None where there is none.

    Attributes:
        candidates: finds the candidates of beam searches.

    Example:
        >>> from llmapi._runtime.request import Request
        >>> from llmapi.outputs import RequestMetrics
        >>> from llmapi.sampling import SamplingParams
        >>> greedy = SamplingParams(temperature=0)
        >>> request = Request("r0", None, [0], greedy, 0, 8, frozenset(), RequestMetrics(0.0))
        >>> Sampler(3)(torch.tensor([[0.1, 0.7, 0.2]]), [SampleRow(request.sequences[0])])[0].token_ids
        [1]
    """

    def __init__(self, vocab_size: int, tokenizer: SamplerTokenizer | None = None) -> None:
        self._vocab = vocab_size
        self._tokenizer = tokenizer
        self._edits = LogitEdits(vocab_size, tokenizer)
        self.candidates = Candidates(vocab_size, self._edits)

    def overlaps(self, row: SampleRow) -> bool:
        """Whether the next step may be launched before this row's tokens are known to the host: never, here."""
        return False

    def waits(self, row: SampleRow) -> bool:
        """Whether the host must know all tokens before this row's when the choice begins: always, here."""
        return True

    def start(self, logits: Tensor, rows: Rows[SampleRow]) -> ReadyTokens:
        """Begin to choose; the choice is waited for with ``result()``. Arguments as those of a call."""
        return ReadyTokens(self(logits, rows))

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Rows[SampleRow]) -> list[Sampled]:
        """Choose the next token or tokens of every row.

        Args:
            logits: ``[N, V]`` raw logits in float32, bfloat16 or float16, on any device; never changed.
            rows: ``N`` of them.

        Returns:
            ``N`` results in the same order. A failure that is one request's own is in its ``error``.

        Raises:
            ValueError: the shape of the logits is not ``[len(rows), vocab_size]``.
        """
        if tuple(logits.shape) != (len(rows), self._vocab):
            raise ValueError(
                f"logits have the shape {list(logits.shape)}, but {len(rows)} rows of {self._vocab} were expected"
            )
        results = [Sampled([]) for _ in rows]
        edited = [i for i, row in enumerate(rows) if self._edits.wanted(row.sequence)]
        if edited:
            x = _take(logits, edited).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            errors = self._edits.apply(x, [rows[i].sequence for i in edited])
            alive = [j for j, error in enumerate(errors) if error is None]
            for i, error in zip(edited, errors, strict=True):
                results[i].error = error
            self._choose(_take(x, alive), logits, [edited[j] for j in alive], rows, results)
            changed = set(edited)
            plain = [i for i in range(len(rows)) if i not in changed]
            self._choose(_take(logits, plain), logits, plain, rows, results)
        else:
            self._choose(logits, logits, list(range(len(rows))), rows, results)
        self._report(logits, rows, results)
        return results

    def _choose(
        self, x: Tensor, raw: Tensor, members: list[int], rows: Rows[SampleRow], results: list[Sampled]
    ) -> None:
        """Choose for the rows ``members`` of the batch, whose edited logits are ``x`` and unedited ones in ``raw``."""
        greedy = [j for j, i in enumerate(members) if rows[i].sequence.request.params.greedy]
        if greedy:
            values, ids = argmax(_take(x, greedy))
            for j, value, token in zip(greedy, values.tolist(), ids.tolist(), strict=True):
                i = members[j]
                if value != value or value == -torch.inf:
                    results[i].error = no_choice(raw[i], x[j], rows[i].sequence)
                else:
                    results[i].token_ids = [token] * rows[i].count
        drawn = [j for j, i in enumerate(members) if not rows[i].sequence.request.params.greedy]
        if not drawn:
            return
        picked = [rows[members[j]] for j in drawn]
        x = _take(x, drawn).float()
        settings = [_truncation(row.sequence) for row in picked]
        uniform = _uniform(picked).to(x.device)
        chosen: list[list[int]] = draw(x, settings, uniform).tolist()
        for j, (row, own) in enumerate(zip(picked, chosen, strict=True)):
            i = members[drawn[j]]
            if own[0] < 0 and not bool(x[j].isnan().any()) and bool((x[j] == torch.inf).any()):
                forced = torch.where(x[j] == torch.inf, 0.0, -torch.inf)[None]  # +inf stands for certainty
                [own] = draw(forced, [settings[j]], uniform[j : j + 1]).tolist()
            if own[0] < 0:
                results[i].error = no_choice(raw[i], x[j], row.sequence)
            else:
                results[i].token_ids = own[: row.count]

    def _report(self, logits: Tensor, rows: Rows[SampleRow], results: list[Sampled]) -> None:
        """Add logprobs and raw logits where they were asked for."""
        asking: dict[tuple[int, bool], list[int]] = {}
        for i, row in enumerate(rows):
            params = row.sequence.request.params
            if results[i].error is not None:
                continue
            if params.returns_generation_logits:
                with torch.inference_mode(False):  # a tensor that the user may change
                    results[i].logits = logits[i].to("cpu", torch.float32, copy=True)
            if params.kept_logprobs is not None:
                asking.setdefault((params.kept_logprobs, params.detokenize), []).append(i)
        for (k, texts), members in asking.items():
            decode = self._tokenizer.token_text if self._tokenizer is not None and texts else None
            found = token_logprobs(_take(logits, members), [results[i].token_ids for i in members], k, decode)
            for i, entries in zip(members, found, strict=True):
                results[i].logprobs = entries


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """These rows, without a copy when they are all."""
    return x if len(rows) == x.shape[0] else x[torch.tensor(rows, dtype=torch.int64, device=x.device)]


def _truncation(sequence: Sequence) -> Truncation:
    p = sequence.request.params
    return Truncation(p.temperature, p.top_k, p.top_p, p.min_p)


def _uniform(rows: list[SampleRow]) -> Tensor:
    """``[N, D]`` float64, ``D`` the largest count: row ``i`` has its first ``count`` numbers and then zeros."""
    seeds: list[int] = []
    streams: list[int] = []
    counters: list[int] = []
    for row in rows:
        seeds += [row.sequence.request.seed] * row.count
        streams += range(row.count) if row.count > 1 else [row.sequence.index]
        counters += [row.sequence.num_output] * row.count
    numbers = uniforms(seeds, streams, counters)
    out = np.zeros((len(rows), max(row.count for row in rows)))
    out[np.arange(out.shape[1]) < np.array([row.count for row in rows])[:, None]] = numbers
    return torch.from_numpy(out)
