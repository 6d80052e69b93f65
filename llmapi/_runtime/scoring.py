"""Scoring: log probabilities of given continuations, and of whole texts in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from llmapi._runtime.inputs import RequestMaker, listed, naming
from llmapi._runtime.probe import ScoreProbe
from llmapi._runtime.request import Request
from llmapi.errors import CapacityError, ConfigError, PromptTooLongError, RequestError
from llmapi.outputs import Perplexity, Score

Run = Callable[[list[Request], bool], None]
"""Runs requests, with a bar or without; raises where one fails."""


class Scorer:
    """Turns pairs and texts into requests with probes, and what these find into scores.

    Args:
        maker: of the LLM.
    """

    def __init__(self, maker: RequestMaker) -> None:
        self._maker = maker

    def score(self, prompts: Any, continuations: Any, truncate: bool, run: Run, bar: bool) -> Score | list[Score]:
        """See :meth:`llmapi.LLM.score`."""
        if not isinstance(truncate, bool):
            raise ConfigError(f"truncate={truncate!r}: give True or False")
        (before, one), (after, alone) = listed(prompts), listed(continuations, "continuations")
        if not one and not alone and len(before) != len(after):
            raise ConfigError(
                f"{len(after)} continuations for {len(before)} prompts: give one for each, or one for all, or several "
                "for one prompt"
            )
        count = len(after) if one else len(before)
        pairs = zip(before * count if one else before, after * count if alone else after, strict=True)
        jobs: list[tuple[Request, list[int]]] = []
        for index, (prompt, continuation) in enumerate(pairs):
            with naming(index, prompts=not one, continuations=not alone):
                jobs.append(self._job(*self._pair(prompt, continuation), truncate))
        run([request for request, _ in jobs], bar)
        scores = [_score(request, targets) for request, targets in jobs]
        return scores[0] if one and alone else scores

    def perplexity(
        self, texts: Any, max_length: int | None, stride: int | None, run: Run, bar: bool
    ) -> Perplexity | list[Perplexity]:
        """See :meth:`llmapi.LLM.perplexity`."""
        most = min(self._maker.max_seq_len, self._maker.capacity_tokens)
        length = _whole("max_length", max_length, most)
        step = _whole("stride", stride, length)
        items, single = listed(texts, "texts")
        prefix = self._prefix() if items else 0
        jobs: list[tuple[Request, list[int]]] = []
        ends = []
        for index, item in enumerate(items):
            with naming(index, texts=not single):
                ids = self._text(item)
                self._maker.check(ids, "token")
            for window, targets in windows(ids, prefix, length, step):
                probe = ScoreProbe(len(window) - len(targets), targets)
                jobs.append((self._maker.probing(window, probe, "a window of a text"), targets))
            ends.append(len(jobs))
        run([request for request, _ in jobs], bar)
        out, start = [], 0
        for end in ends:
            logprobs = [p for request, targets in jobs[start:end] for p in _score(request, targets).logprobs]
            total = math.fsum(logprobs)
            out.append(Perplexity(_exp(-total / len(logprobs)), total, len(logprobs)))
            start = end
        return out[0] if single else out

    def _job(self, context: list[int], targets: list[int], truncate: bool) -> tuple[Request, list[int]]:
        """A request that computes all but the last token, and asks for the rows that predict ``targets``."""
        most = min(self._maker.max_seq_len, self._maker.capacity_tokens) + 1  # the last token is not run
        ids = [*context, *targets]
        if len(ids) > most:
            if not truncate or len(targets) >= most:
                raise self._too_long(len(context), len(targets), most)
            ids = ids[-most:]
        self._maker.check(context, "prompt token")
        self._maker.check(targets, "continuation token")
        probe = ScoreProbe(len(ids) - 1 - len(targets), targets)
        return self._maker.probing(ids[:-1], probe, "a prompt and its continuation"), targets

    def _too_long(self, context: int, targets: int, most: int) -> RequestError:
        limit, capacity = self._maker.max_seq_len, self._maker.capacity_tokens
        remedy = "shorten the continuation" if targets >= most else "give truncate=True to drop the prompt's oldest"
        many = f"{context} tokens of the prompt and {targets} of the continuation are more than the {most} that fit"
        if capacity < limit:
            return CapacityError(
                f"{many} a KV cache of {capacity} tokens: {remedy}, or give kv_cache_config more memory"
            )
        return PromptTooLongError(f"{many} max_seq_len={limit}: {remedy}, or make the LLM with a larger max_seq_len")

    def _pair(self, prompt: Any, continuation: Any) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, at least one, and of its continuation."""
        text = prompt.get("prompt") if isinstance(prompt, dict) and "prompt_token_ids" not in prompt else prompt
        if isinstance(continuation, str) and not continuation:
            raise RequestError("the continuation is empty: give at least one token")
        if isinstance(text, str) and isinstance(continuation, str):
            if not text:
                ids, prefix = self._encode(continuation), self._prefix()
                return (ids[:1], ids[1:]) if ids[0] == prefix and len(ids) > 1 else ([prefix], ids)
            kept = text.rstrip()
            if kept:
                text, continuation = kept, text[len(kept) :] + continuation
            whole = self._maker.ids(text + continuation)[1]
            begin = len(self._maker.ids(text)[1])
            if begin >= len(whole):
                raise RequestError(
                    f"the continuation {continuation!r} adds no token to its prompt: give both as token ids"
                )
            return whole[:begin], whole[begin:]
        context = [self._prefix()] if text == "" else self._maker.ids(prompt)[1]
        return context, self._text(continuation)

    def _text(self, text: Any) -> list[int]:
        """Token ids of a text without special tokens, or as they were given."""
        return self._encode(text) if isinstance(text, str) and text else self._maker.ids(text)[1]

    def _encode(self, text: str) -> list[int]:
        if self._maker.tokenizer is None:
            raise RequestError("a text needs a tokenizer: give token ids, or drop skip_tokenizer_init=True")
        ids = self._maker.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise RequestError(f"the text {text!r} has no tokens: give another one")
        return ids

    def _prefix(self) -> int:
        """The token that stands before a text's first one."""
        tokenizer = self._maker.tokenizer
        found: int | None = None
        if tokenizer is not None:
            found = tokenizer.backend.bos_token_id
            found = tokenizer.eos_token_id if found is None else found
        if found is None:
            raise RequestError(
                "nothing stands before the first token: this LLM has no tokenizer, or one without a beginning- or "
                "end-of-sequence token. Score a continuation of token ids after a prompt of at least one instead"
            )
        return found


def windows(ids: list[int], prefix: int, length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text into windows that score each token once.

    Args:
        ids: the text.
        prefix: stands before its first token.
        length: most tokens in a window.
        stride: most tokens that a window after the first one scores.

    Yields:
        tokens to run, and the tokens that the last rows of these predict.

    >>> list(windows([1, 2, 3, 4, 5], 0, 2, 2))
    [([0, 1], [1, 2]), ([2, 3], [3, 4]), ([3, 4], [5])]
    """
    whole = [prefix, *ids]  # whole[i] predicts ids[i]
    done = 0
    while done < len(ids):
        end = min(len(ids), done + (stride if done else length))
        yield whole[max(0, end - length) : end], ids[done:end]
        done = end


def _score(request: Request, targets: list[int]) -> Score:
    assert request.probe is not None
    logprobs, best = request.probe.result.tolist()
    return Score(math.fsum(logprobs), all(best), list(targets), logprobs)


def _whole(name: str, value: int | None, most: int) -> int:
    if value is None:
        return most
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name}={value!r}: give a whole number from 1 to {most}, or None for {most}")
    return value


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
