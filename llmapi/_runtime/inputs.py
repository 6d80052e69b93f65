"""Prompts and sampling parameters, in the forms that users give them, to requests."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from llmapi._runtime.request import Request
from llmapi.errors import CapacityError, ConfigError, PromptTooLongError, RequestError
from llmapi.guided import GuidedDecodingParams
from llmapi.outputs import RequestMetrics
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    from llmapi._runtime.grammar import Grammars
    from llmapi._runtime.probe import Probe
    from llmapi._tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""

_FORMS = "a text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"


def listed(prompts: Any, what: str = "prompts") -> tuple[list[Any], bool]:
    """The prompts as a list, and whether they were a single one rather than a list.

    Args:
        prompts: in any form.
        what: what messages call them.

    Raises:
        RequestError: they are neither.

    >>> listed("Hello"), listed([1, 2]), listed(["Hello", [1, 2]])
    ((['Hello'], True), ([[1, 2]], True), (['Hello', [1, 2]], False))
    """
    prompts = _plain(prompts)
    if isinstance(prompts, (str, Mapping)) or (prompts and _are_ids(prompts)):
        return [prompts], True
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise RequestError(f"{what} of type {type(prompts).__name__} are not known: give {_FORMS}, or a list of these")
    return list(prompts), False


@contextlib.contextmanager
def naming(index: int, **lists: bool) -> Iterator[None]:
    """Say in errors of requests which entry of the user's lists they are about: ``texts[1]: the prompt is empty``.

    Args:
        index: of the entry.
        lists: for each argument that holds such entries, whether it is a list; one that is not is not named.
    """
    try:
        yield
    except RequestError as error:
        if places := [f"{name}[{index}]" for name, is_list in lists.items() if is_list]:
            error.args = (f"{' and '.join(places)}: {error}",)
        raise


def conversations(messages: Any) -> tuple[list[Any], bool]:
    """The conversations as a list, and whether they were a single one. What is in them is the chat template's business.

    >>> message = {"role": "user", "content": "Hello"}
    >>> conversations([message])[1], conversations([[message], [message]])[1]
    (True, False)
    """
    if not isinstance(messages, (list, tuple)) or not messages or isinstance(messages[0], Mapping):
        return [messages], True
    return list(messages), False


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists; the rest as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _are_ids(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        return False
    kinds = set(map(type, value))  # a long prompt is looked at once, quickly
    return kinds <= {int} or all(issubclass(kind, Integral) and not issubclass(kind, bool) for kind in kinds)


def pair_params(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams
) -> list[SamplingParams]:
    """One SamplingParams per prompt.

    Args:
        count: number of prompts.
        params: one for all, one for each, or None for the default.
        default: used for None.

    Raises:
        ConfigError: a list of another length, or of something else.
    """
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, Sequence) and all(isinstance(p, SamplingParams) for p in params):
        if len(params) != count:
            prompts = "1 prompt" if count == 1 else f"{count} prompts"
            raise ConfigError(f"{len(params)} sampling_params for {prompts}: give one for all, or one for each")
        return list(params)
    raise ConfigError(f"sampling_params={params!r}: give a SamplingParams or a list of them")


@dataclass
class RequestMaker:
    """Makes requests that the engine can certainly serve, or says why not.

    Attributes:
        tokenizer: None where the LLM has none.
        vocab_size: ids are below this.
        max_seq_len: tokens of prompt and output.
        capacity_tokens: tokens that the whole KV cache holds.
        end_token_ids: ids that end a sequence for this model.
        grammars: compiles those of guided decoding.
        seed: of the LLM; requests without one draw theirs from it, in order. None draws from the system.
        block_size: tokens of a KV block.
        max_batch_size: sequences of a step.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    max_seq_len: int
    capacity_tokens: int
    end_token_ids: frozenset[int]
    seed: int | None
    grammars: Grammars | None = None
    block_size: int = 1
    max_batch_size: int = 1 << 30

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._probes = itertools.count()  # of their own, so that they change no other request's seed
        if self.seed is None:
            self.seed = secrets.randbits(64)

    def make(self, prompt: Prompt, params: SamplingParams) -> Request:
        """A request.

        Args:
            prompt: in any of its forms.
            params: how to decode.

        Raises:
            RequestError: the prompt is empty, too long, holds an unknown id or has no known form, or the request can
                never fit the KV cache.
        """
        number = next(self._numbers)
        if self.tokenizer is None:
            params = self._without_text(params)
        text, ids = self._ids(prompt)
        self._check_ids("prompt token", ids)
        self._check_ids("logit_bias key", list(params.logit_bias or {}))
        self._check_ids("stop_token_ids entry", list(params.stop_token_ids or ()))
        room = self.max_seq_len - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and max_seq_len={self.max_seq_len} leaves room for a prompt of "
                f"{self.max_seq_len - 1}: shorten it, or make the LLM with a larger max_seq_len"
            )
        capacity = self._capacity(len(ids), params.num_beams)
        if params.max_tokens is None:  # as far as it goes
            max_tokens = max(1, min(room, capacity - len(ids)))
        else:
            max_tokens = min(params.max_tokens, room)
        if params.num_beams > self.max_batch_size:
            raise RequestError(
                f"{params.num_beams} beams are more than the {self.max_batch_size} sequences of a step: lower "
                "beam_width, or make the LLM with a larger max_batch_size"
            )
        if len(ids) + max_tokens > capacity and params.num_beams > 1:
            raise CapacityError(
                f"{params.num_beams} beams of {len(ids)} prompt tokens, which they share, and {max_tokens} new ones "
                f"can never fit the KV cache of {self.capacity_tokens} tokens: lower beam_width or max_tokens, or give "
                "kv_cache_config more memory"
            )
        if len(ids) + max_tokens > self.capacity_tokens:
            raise CapacityError(
                f"{len(ids)} prompt tokens and {max_tokens} new ones can never fit the KV cache of "
                f"{self.capacity_tokens} tokens: lower max_tokens, or give kv_cache_config more memory"
            )
        guided = params.guided_decoding
        assert guided is None or isinstance(guided, GuidedDecodingParams)
        grammar = None if guided is None or self.grammars is None else self.grammars.get(guided)
        ends = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.end_token_ids)
        return Request(
            id=str(number),
            prompt=text,
            prompt_token_ids=ids,
            params=params,
            seed=self._seed(number) if params.seed is None else params.seed,
            max_tokens=max_tokens,
            stop_token_ids=ends,
            metrics=RequestMetrics(arrival_time=time.time()),
            grammar=grammar,
        )

    def probing(self, ids: list[int], probe: Probe, what: str) -> Request:
        """A request that generates nothing, but asks about its tokens.

        Args:
            ids: the tokens to run; at least one.
            probe: what to find out.
            what: what messages call them.

        Raises:
            RequestError: they are too many, or one is not in the vocabulary.
        """
        self._check_ids("token", ids)
        if len(ids) > self.max_seq_len:
            raise PromptTooLongError(
                f"{len(ids)} tokens of {what} are to be run, and max_seq_len={self.max_seq_len}: shorten it, or make "
                "the LLM with a larger max_seq_len"
            )
        if len(ids) > self.capacity_tokens:
            raise CapacityError(
                f"{len(ids)} tokens of {what} can never fit the KV cache of {self.capacity_tokens} tokens: shorten it, "
                "or give kv_cache_config more memory"
            )
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        arrived = RequestMetrics(arrival_time=time.time())
        return Request(f"probe-{next(self._probes)}", None, ids, params, 0, 1, frozenset(), arrived, probe=probe)

    def ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text, where there is one, and token ids of a prompt in any of its forms.

        Raises:
            RequestError: it is empty, or has no known form.
        """
        return self._ids(prompt)

    def check(self, ids: list[int], what: str) -> None:
        """Refuse ids that are not in the vocabulary.

        Args:
            ids: any.
            what: what messages call one.

        Raises:
            RequestError: one is not.
        """
        self._check_ids(what, ids)

    def _capacity(self, prompt: int, beams: int) -> int:
        """Most tokens of each of so many sequences that share the full blocks of their prompt, alone in the cache."""
        if beams == 1:
            return self.capacity_tokens
        shared = prompt // self.block_size
        return (shared + max(0, self.capacity_tokens // self.block_size - shared) // beams) * self.block_size

    def _seed(self, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{number}".encode()).digest()[:8], "little")

    def _without_text(self, params: SamplingParams) -> SamplingParams:
        for name in ("stop", "bad_words"):
            if getattr(params, name):
                raise RequestError(f"{name} needs a tokenizer, and this LLM was made with skip_tokenizer_init=True")
        return dataclasses.replace(params, detokenize=False) if params.detokenize else params

    def _ids(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            known = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
            if not known or set(prompt) - {"prompt_token_ids", "prompt"}:
                raise RequestError(f"unknown prompt: a dict with the keys {sorted(map(str, prompt))}. Give {_FORMS}")
            inner, text = prompt[known[0]], prompt.get("prompt")
            if isinstance(inner, Mapping) or (known[0] == "prompt_token_ids" and isinstance(inner, str)):
                raise RequestError(f"unknown prompt: {known[0]} is a {type(inner).__name__}. Give {_FORMS}")
            _, ids = self._ids(inner)
            return (text if isinstance(text, str) else None), ids
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("a text prompt needs a tokenizer: give token ids, or drop skip_tokenizer_init=True")
            ids = self.tokenizer.encode(prompt)
            if not prompt or not ids:
                raise RequestError("the prompt is empty: give at least one token")
            return prompt, ids
        prompt = _plain(prompt)
        if _are_ids(prompt):
            if not prompt:
                raise RequestError("the prompt is empty: give at least one token")
            return None, [int(i) for i in prompt]
        raise RequestError(f"a prompt of type {type(prompt).__name__} is not known: give {_FORMS}")

    def _check_ids(self, what: str, ids: list[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise RequestError(
                f"{what} {wrong} is not in the model's vocabulary: ids go from 0 to {self.vocab_size - 1}"
            )
