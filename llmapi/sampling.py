"""SamplingParams: how the tokens of one request are chosen and when it stops.

The defaults below are the only ones; ``docs/sampling.md`` shows them as a table, checked by a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from llmapi.errors import ConfigError, not_unicode, unknown_name
from llmapi.guided import GuidedDecodingParams

if TYPE_CHECKING:
    import torch

LogitsProcessor = Callable[..., "torch.Tensor"]
ReturnLogits = Literal["context", "generation", "both"]
EarlyStopping = bool | Literal["never"]

_MAX_LOGPROBS = 1024
_MAX_N = 1024
_MAX_BEAMS = 256
_SWITCHES = (
    "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "detokenize",
)  # fmt: skip
_MAX_LENGTH_PENALTY = 32.0  # 2**17 tokens to this power are near the largest float


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. All arguments are keywords; all have a default.

    Args:
        n: number of sequences to sample from the prompt; they share the prompt's KV blocks. From 1 to 1024.
        temperature: divides the logits; 0 means greedy. At least 0.
        top_k: keep the ``k`` most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches ``p`` (Holtzman et al. 2019,
            arXiv:1904.09751). In (0, 1].
        min_p: drop tokens less probable than ``min_p`` times the most probable one (Nguyen et al. 2024,
            arXiv:2407.01082). In [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (Keskar et al. 2019, arXiv:1909.05858). Greater than 0; 1 is off.
        presence_penalty: subtracted from the logit of each token already in the output. In [-2, 2].
        frequency_penalty: subtracted once for each time a token is in the output. In [-2, 2].
        seed: makes this request reproducible: the same text alone, in any batch and across runs. From 0 to 2**64 - 1.
        stop: text or texts that end a sequence; they may span tokens.
        stop_token_ids: token ids that end a sequence, besides those of the model's generation_config.json.
        bad_words: texts that never appear as a token sequence of the output.
        logit_bias: token id to a value added to its logit, in [-100, 100].
        ignore_eos: go on past the model's end-of-sequence tokens.
        include_stop_str_in_output: keep the stop text at the end of ``text``.
        skip_special_tokens: leave special tokens out of ``text``.
        spaces_between_special_tokens: put spaces between special tokens where they are kept.
        min_tokens: no end of sequence and no stop before this many tokens.
        max_tokens: stop after this many tokens; None goes on to the engine's ``max_seq_len``.
        logprobs: log probabilities of each output token and the ``k`` most probable ones; 0 gives the token alone,
            None nothing.
        prompt_logprobs: likewise for the prompt's tokens.
        logits_processors: functions ``(output_token_ids, logits) -> logits`` or
            ``(prompt_token_ids, output_token_ids, logits) -> logits`` on a float32 vector of the vocabulary's size,
            run in order before everything else.
        detokenize: False leaves ``text`` empty and skips the tokenizer (stop texts then cannot be used).
        return_logits: ``"generation"`` (or True) keeps the raw logits of each output token, ``"context"`` those of
            each prompt token, ``"both"`` both.
        guided_decoding: a grammar that the text follows: a :class:`GuidedDecodingParams`, or a dict of its arguments.
        best_of: sample this many sequences from the prompt and return the ``n`` of them with the largest cumulative log
            probability, best first. From ``n`` to 1024; None is ``n``, in the order in which they were drawn.
        structured_outputs: another name of ``guided_decoding``; it becomes None.
        use_beam_search: search for the most probable sequences instead of sampling; ``n`` is then how many of them are
            returned. ``temperature`` has no meaning, and ``top_k``, ``top_p`` and ``min_p`` must be off.
        beam_width: sequences that are kept at each step; None is ``n``, where that is above 1. From 1 (greedy) to 256.
        length_penalty: finished sequences are compared by the sum of their log probabilities over their number of new
            tokens to this power; larger values prefer longer ones. In [-32, 32].
        early_stopping: when ``beam_width`` sequences are finished, True ends the search at once, False as soon as what
            runs would not be better if it ended now, ``"never"`` once it cannot become better.
        num_beam_groups: groups of beams that search one after the other, away from the groups before
            (Vijayakumar et al. 2016, arXiv:1610.02424); divides ``beam_width``.
        diversity_penalty: taken off a token's score for each beam of an earlier group with the same token in the same
            step. At least 0; needs groups.

    Raises:
        ConfigError: an unknown name or a value outside its range; the message gives both.

    Example:
        >>> SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64, seed=1).greedy
        False
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    min_tokens: int = 0
    max_tokens: int | None = 256
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    detokenize: bool = True
    return_logits: bool | ReturnLogits = False
    guided_decoding: GuidedDecodingParams | Mapping[str, Any] | None = None
    structured_outputs: GuidedDecodingParams | Mapping[str, Any] | None = None
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        valid = [f.name for f in fields(cls)]
        if args:
            raise ConfigError(f"SamplingParams takes keyword arguments only, e.g. temperature=0.8; got {args[0]!r}")
        for name in kwargs:
            if name not in valid:
                raise ConfigError(unknown_name("SamplingParams argument", name, valid))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        self._whole("n", 1, _MAX_N)
        self._real("temperature", 0.0, math.inf)
        self._whole("top_k", -1)
        self._real("top_p", 0.0, 1.0, open_low=True)
        self._real("min_p", 0.0, 1.0)
        self._real("repetition_penalty", 0.0, math.inf, open_low=True)
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._whole("seed", 0, 2**64 - 1, optional=True)
        self._whole("min_tokens", 0)
        self._whole("max_tokens", 1, optional=True)
        self._whole("logprobs", 0, _MAX_LOGPROBS, optional=True)
        self._whole("prompt_logprobs", 0, _MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: change one")
        self._check_beams()
        if self.n > 1 and self.temperature == 0 and not self.use_beam_search:
            raise ConfigError(
                f"n={self.n} with temperature=0 would give {self.n} equal sequences: set temperature above 0, or n=1"
            )
        self._whole("best_of", self.n, _MAX_N, optional=True)
        if self.best_of is not None and self.best_of > 1 and self.temperature == 0:
            raise ConfigError(
                f"best_of={self.best_of} with temperature=0 would compare equal sequences: set temperature above 0"
            )
        self._set("stop", self._strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        self._set("bad_words", self._strings("bad_words", self.bad_words))
        self._set("stop_token_ids", self._ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", self._bias(self.logit_bias))
        self._set("logits_processors", self._processors(self.logits_processors))
        self._set("return_logits", self._logits(self.return_logits))
        if self.structured_outputs is not None:
            if self.guided_decoding is not None:
                raise ConfigError("guided_decoding and structured_outputs are two names of one thing: give one of them")
            self._set("guided_decoding", self.structured_outputs)
            self._set("structured_outputs", None)
        self._set("guided_decoding", GuidedDecodingParams.of(self.guided_decoding))
        if self.stop and not self.detokenize:
            raise ConfigError("stop texts need the text: use detokenize=True, or stop_token_ids instead of stop")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken at each step (``temperature == 0``)."""
        return self.temperature == 0.0

    @property
    def num_drawn(self) -> int:
        """Sequences that are sampled from the prompt."""
        return self.best_of or self.n

    @property
    def kept_logprobs(self) -> int | None:
        """``logprobs``, or 0 where ``best_of`` needs those of the tokens that were chosen."""
        return 0 if self.logprobs is None and self.num_drawn > self.n else self.logprobs

    @property
    def num_beams(self) -> int:
        """Beams of the search; 1 without one."""
        return (self.beam_width or self.n) if self.use_beam_search else 1

    @property
    def returns_context_logits(self) -> bool:
        """Whether the raw logits of the prompt are kept."""
        return self.return_logits in ("context", "both")

    @property
    def returns_generation_logits(self) -> bool:
        """Whether the raw logits of the output are kept."""
        return self.return_logits in ("generation", "both")

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether every prompt position must be projected to the vocabulary."""
        return self.prompt_logprobs is not None or self.returns_context_logits

    def _check_beams(self) -> None:
        if not isinstance(self.use_beam_search, bool):
            raise ConfigError(f"use_beam_search={self.use_beam_search!r}: give True or False")
        self._whole("beam_width", 1, _MAX_BEAMS, optional=True)
        self._real("length_penalty", -_MAX_LENGTH_PENALTY, _MAX_LENGTH_PENALTY)
        self._whole("num_beam_groups", 1, _MAX_BEAMS)
        self._real("diversity_penalty", 0.0, math.inf)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(unknown_name("early_stopping", self.early_stopping, [True, False, "never"]))
        if not self.use_beam_search:
            for name in ("beam_width", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"):
                if getattr(self, name) != _BEAM_DEFAULTS[name]:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} means something in beam search only: add use_beam_search=True"
                    )
            return
        width = self.beam_width
        if width is None and self.n == 1:
            raise ConfigError("use_beam_search=True needs a width: add beam_width=4, for example")
        if width is not None and self.n > width:
            raise ConfigError(
                f"n={self.n} is more than beam_width={width}: a search returns no more sequences than it has beams"
            )
        if self.n > _MAX_BEAMS:
            raise ConfigError(f"n={self.n} without beam_width asks for {self.n} beams: at most {_MAX_BEAMS}")
        if self.best_of is not None:
            raise ConfigError(
                f"best_of={self.best_of} with use_beam_search=True: beam search draws nothing. Give beam_width instead"
            )
        for name, off in (("temperature", (0, 1)), ("top_k", (0, -1)), ("top_p", (1,)), ("min_p", (0,))):
            if getattr(self, name) not in off:
                raise ConfigError(
                    f"{name}={getattr(self, name)} with use_beam_search=True: beam search draws nothing. Leave {name} "
                    "out, or sample with use_beam_search=False"
                )
        if self.num_beams % self.num_beam_groups:
            raise ConfigError(
                f"num_beam_groups={self.num_beam_groups} does not divide the {self.num_beams} beams into equal groups"
            )
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ConfigError(
                f"diversity_penalty={self.diversity_penalty} needs num_beam_groups above 1: it acts between groups"
            )
        if self.num_beam_groups > 1 and not self.diversity_penalty:
            raise ConfigError(
                f"num_beam_groups={self.num_beam_groups} without diversity_penalty gives {self.num_beam_groups} equal "
                "groups: set diversity_penalty above 0"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _whole(self, name: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={value!r}: give a whole number {limit}" + (" or None" if optional else ""))
        if value < low or (high is not None and value > high):
            raise ConfigError(f"{name}={value} is out of range: give a whole number {limit}")

    def _real(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        bracket = "(" if open_low else "["
        limit = f"{bracket}{low:g}, {high:g}" + (")" if math.isinf(high) else "]")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name}={value!r}: give a number in {limit}")
        if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
            raise ConfigError(f"{name}={value} is out of range: give a number in {limit}")

    @staticmethod
    def _strings(name: str, values: object) -> tuple[str, ...]:
        if values is None:
            return ()
        if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Sequence):
            raise ConfigError(f"{name}={values!r}: give a list of texts")
        for value in values:
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{name} holds {value!r}: every entry must be a text of at least one character")
            if why := not_unicode(value):
                raise ConfigError(f"{name} holds {value!r}, which {why}")
        return tuple(values)

    @staticmethod
    def _ids(name: str, values: object) -> tuple[int, ...]:
        if values is None:
            return ()
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(f"{name}={values!r}: give a list of token ids")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} holds {value!r}: token ids are whole numbers from 0")
        return tuple(values)

    @staticmethod
    def _bias(values: object) -> dict[int, float]:
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"logit_bias={values!r}: give a dict from token id to a number in [-100, 100]")
        out: dict[int, float] = {}
        for key, value in values.items():
            if isinstance(key, bool) or not isinstance(key, int) or key < 0:
                raise ConfigError(f"logit_bias has the key {key!r}: keys are token ids, whole numbers from 0")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
                raise ConfigError(f"logit_bias[{key}]={value!r} is out of range: give a number in [-100, 100]")
            out[key] = float(value)
        return out

    @staticmethod
    def _processors(values: object) -> tuple[LogitsProcessor, ...]:
        if values is None:
            return ()
        if callable(values):
            raise ConfigError("logits_processors takes a list of functions: put the function in [ ]")
        if not isinstance(values, Sequence):
            raise ConfigError(f"logits_processors={values!r}: give a list of functions")
        for value in values:
            if not callable(value):
                raise ConfigError(f"logits_processors holds {value!r}, which cannot be called")
        return tuple(values)

    @staticmethod
    def _logits(value: object) -> bool | str:
        if value is True:
            return "generation"
        if value is False or value is None:
            return False
        if value not in ("context", "generation", "both"):
            raise ConfigError(unknown_name("return_logits value", value, ["context", "generation", "both"]))
        return str(value)


_BEAM_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}
