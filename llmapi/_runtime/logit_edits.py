"""LogitEdits: what a request changes in its logits before a token is chosen.

The order: logits_processors; the grammar of guided_decoding; the min_tokens mask; logit_bias; bad_words; penalties.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llmapi._runtime.guide import Guide, forbid
from llmapi._runtime.params_memo import ParamsMemo
from llmapi._runtime.penalties import Penalties
from llmapi._runtime.request import Sequence
from llmapi._runtime.transfer import indices, to_device
from llmapi.errors import RequestError
from llmapi.sampling import SamplingParams


class Encoder(Protocol):
    """The part of a tokenizer that bad_words need."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""


@dataclass(frozen=True, eq=False, slots=True)
class Foreseen:
    """What a request changes in its logits now, whatever its tokens are, but for penalties.

    Attributes:
        bias: ids, and what is added to their logits.
        banned: ids that may not come next.
        penalties: repetition, presence and frequency, by how often the sequence holds each token; None: no penalties.
    """

    bias: tuple[Tensor, Tensor] | None
    banned: list[int]
    penalties: tuple[float, float, float] | None


@dataclass(slots=True)
class _Plan:
    """A request's edits, prepared once."""

    edits: bool  # whether anything but min_tokens is asked for
    processors: list[tuple[Callable[..., Any], int]]
    bias: tuple[Tensor, Tensor] | None
    bad_words: list[tuple[int, ...]]
    longest: int  # tokens of the longest bad word
    error: str | None = None
    foreseen: dict[frozenset[int], Foreseen] = field(default_factory=dict)  # by the ends that may not come


class LogitEdits:
    """Applies the edits of a batch in place.

    Args:
        vocab_size: width of the logits.
        tokenizer: encodes bad_words; None where there is no tokenizer.
    """

    def __init__(self, vocab_size: int, tokenizer: Encoder | None = None) -> None:
        self._vocab = vocab_size
        self._tokenizer = tokenizer
        self._penalties = Penalties(vocab_size)
        self._plans = ParamsMemo(self._prepare)

    def wanted(self, sequence: Sequence) -> bool:
        """Whether this sequence's next logits would be changed."""
        params = sequence.request.params
        return self._plans(params).edits or sequence.guide is not None or _held_back(sequence)

    def foreseeable(self, params: SamplingParams) -> bool:
        """Whether :meth:`foreseen` tells, of every token of such a request, all that is changed."""
        plan = self._plans(params)
        return not (plan.error or plan.processors or plan.longest > 1 or params.guided_decoding)

    def foreseen(self, sequence: Sequence) -> Foreseen | None:
        """What is changed in this sequence's next logits, which may have references for tokens; None for nothing. The
        same object as long as it is the same.
        """
        if not self.wanted(sequence):
            return None
        p = sequence.request.params
        plan = self._plans(p)
        ends = sequence.request.stop_token_ids if _held_back(sequence) else frozenset()
        if ends not in plan.foreseen:
            banned = sorted({t for t in (*ends, *_completing(plan, sequence)) if t < self._vocab})
            penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) if _penalized(p) else None
            plan.foreseen[ends] = Foreseen(plan.bias, banned, penalties)
        return plan.foreseen[ends]

    def apply(self, x: Tensor, sequences: Rows[Sequence]) -> list[RequestError | None]:
        """Edit row ``i`` of ``x`` as ``sequences[i]`` asks.

        Args:
            x: ``[N, V]`` float32, contiguous; changed.
            sequences: one per row.

        Returns:
            One entry per row: None, or why this request cannot go on. Other rows are not touched by a failure.
        """
        errors: list[RequestError | None] = [None] * len(sequences)
        banned: list[int] = []
        guided: dict[int, Guide] = {}
        for row, sequence in enumerate(sequences):
            plan = self._plans(sequence.request.params)
            try:
                if plan.error is not None:
                    raise RequestError(plan.error)
                for number, (function, arity) in enumerate(plan.processors):
                    x[row] = self._process(function, arity, number, sequence, x[row])
            except RequestError as error:
                errors[row] = error
                continue
            if sequence.guide is not None:
                guided[row] = sequence.guide
            if plan.bias is not None:
                ids, values = plan.bias
                x[row, to_device(ids, x.device)] += to_device(values, x.device)
            offset = row * self._vocab
            if _held_back(sequence):
                banned.extend(offset + t for t in sequence.request.stop_token_ids if t < self._vocab)
            banned.extend(offset + t for t in _completing(plan, sequence) if t < self._vocab)
        if guided:
            forbid(x, list(guided), list(guided.values()))
        if banned:
            x.view(-1).index_fill_(0, indices(banned, x.device), -torch.inf)
        self._penalties.apply(x, sequences)
        return errors

    def _prepare(self, params: SamplingParams) -> _Plan:
        bias = None
        if params.logit_bias:
            pairs = [(t, v) for t, v in params.logit_bias.items() if t < self._vocab]
            ids = torch.tensor([t for t, _ in pairs], dtype=torch.int64)
            bias = ids, torch.tensor([v for _, v in pairs], dtype=torch.float32)
        plan = _Plan(_edits(params), [], bias, [], 0)
        try:
            plan.processors = [(p, _arity(p, i)) for i, p in enumerate(params.logits_processors or ())]
            plan.bad_words = self._encode_bad_words(params.bad_words or ())
            plan.longest = max(map(len, plan.bad_words), default=0)
        except RequestError as error:
            plan.error = str(error)
        return plan

    def _encode_bad_words(self, words: Rows[str]) -> list[tuple[int, ...]]:
        """Token sequences of each word as given, without leading space and with one, without duplicates."""
        if words and self._tokenizer is None:
            raise RequestError(
                f"bad_words={list(words)!r} must be turned into tokens, but this LLM has no tokenizer: "
                "load one, or forbid token ids with logit_bias={id: -100}"
            )
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip(" ")
            for text in (word, bare, " " + bare):
                if text and self._tokenizer is not None:
                    found[tuple(self._tokenizer.encode(text, add_special_tokens=False))] = None
        found.pop((), None)
        return list(found)

    def _process(
        self, function: Callable[..., Any], arity: int, number: int, sequence: Sequence, row: Tensor
    ) -> Tensor:
        name = f"logits_processors[{number}] ({getattr(function, '__name__', type(function).__name__)})"
        request = f"request {sequence.request.id}: {name}"
        ids: list[list[int]] = [sequence.token_ids[: sequence.num_prompt], sequence.output_ids]
        try:
            with torch.inference_mode(False):  # a tensor that the user may keep and change
                result = function(*ids[3 - arity :], row.clone())
        except Exception as error:
            raise RequestError(f"{request} raised {type(error).__name__}: {error}") from error
        expected = f"return the float32 vector of {self._vocab} logits that it was given, changed or not"
        if not isinstance(result, Tensor):
            raise RequestError(f"{request} returned {type(result).__name__}, not a torch.Tensor: {expected}")
        if tuple(result.shape) != (self._vocab,):
            raise RequestError(f"{request} returned the shape {list(result.shape)}: {expected}")
        if not result.is_floating_point():
            raise RequestError(f"{request} returned {result.dtype}: {expected}")
        return result.detach().to(row.device, torch.float32)


def _edits(p: SamplingParams) -> bool:
    return bool(p.logits_processors or p.logit_bias or p.bad_words or _penalized(p))


def _penalized(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _held_back(sequence: Sequence) -> bool:
    """Whether min_tokens forbids the end of this sequence now."""
    return sequence.num_output < sequence.request.params.min_tokens and bool(sequence.request.stop_token_ids)


def _completing(plan: _Plan, sequence: Sequence) -> list[int]:
    """Ids that would complete a bad word; only output tokens count as its beginning."""
    if not plan.bad_words:
        return []
    start = max(sequence.num_prompt, len(sequence.token_ids) - plan.longest + 1)
    tail = tuple(sequence.token_ids[start:])
    starts = {length: tail[len(tail) - length :] for length in range(len(tail) + 1)}
    return [word[-1] for word in plan.bad_words if starts.get(len(word) - 1) == word[:-1]]


def _arity(function: Callable[..., Any], number: int) -> int:
    """2 for ``(output_token_ids, logits)``, 3 for ``(prompt_token_ids, output_token_ids, logits)``.

    A function that needs three positional arguments takes the longer form, one that can do with two the shorter.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in callables have no signature
        return 2
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in positional)
    most = 3 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if needed > 3 or most < 2 or keywords:
        raise RequestError(
            f"logits_processors[{number}] has the signature {inspect.signature(function)}: it is called with "
            "(output_token_ids, logits) or (prompt_token_ids, output_token_ids, logits)"
        )
    return 3 if needed == 3 else 2
