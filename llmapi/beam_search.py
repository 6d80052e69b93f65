"""Beam search under vLLM's names: what :meth:`llmapi.LLM.beam_search` takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from llmapi.errors import ConfigError, unknown_name
from llmapi.outputs import FinishReason, Logprob, RequestOutput
from llmapi.sampling import EarlyStopping, SamplingParams


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """A beam search. All arguments are keywords.

    Args:
        beam_width: sequences that are kept at each step, and returned. From 1 to 256.
        max_tokens: most new tokens; None goes on to the engine's ``max_seq_len``.
        ignore_eos: go on past the model's end-of-sequence tokens.
        temperature: 0 or 1; beam search draws nothing.
        length_penalty: as of :class:`SamplingParams`.
        include_stop_str_in_output: keep the stop token's text.
        early_stopping: as of :class:`SamplingParams`; vLLM has no such argument.
        logprobs: as of :class:`SamplingParams`, with 0 as the default; vLLM has no such argument.

    Raises:
        ConfigError: an unknown name or a value outside its range; the message gives both.

    Example:
        >>> BeamSearchParams(beam_width=4, max_tokens=16).sampling_params().num_beams
        4
    """

    beam_width: int
    max_tokens: int | None
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: EarlyStopping = False
    logprobs: int | None = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> BeamSearchParams:
        valid = [f.name for f in fields(cls)]
        if args:
            raise ConfigError(f"BeamSearchParams takes keyword arguments only, e.g. beam_width=4; got {args[0]!r}")
        for name in kwargs:
            if name not in valid:
                raise ConfigError(unknown_name("BeamSearchParams argument", name, valid))
        if missing := [name for name in ("beam_width", "max_tokens") if name not in kwargs]:
            raise ConfigError(f"BeamSearchParams needs {missing[0]}: for example beam_width=4, max_tokens=64")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        width = self.beam_width
        if isinstance(width, bool) or not isinstance(width, int):
            raise ConfigError(f"beam_width={width!r}: give a whole number from 1 to 256")
        if not 1 <= width <= 256:
            raise ConfigError(f"beam_width={width} is out of range: give a whole number from 1 to 256")
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """The same search for :meth:`llmapi.LLM.generate`."""
        return SamplingParams(
            use_beam_search=True,
            n=self.beam_width,
            beam_width=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            early_stopping=self.early_stopping,
            logprobs=self.logprobs,
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence that a search found.

    Attributes:
        tokens: ids of the prompt and of what was generated, a stop token included.
        logprobs: of the generated tokens, as of :class:`CompletionOutput`; empty where none were asked for.
        cum_logprob: sum of the log probabilities of the generated tokens.
        text: prompt and generated text; None where there is no tokenizer.
        finish_reason, stop_reason: as of :class:`CompletionOutput`.
        score: by which the sequences are ranked, as of :class:`CompletionOutput`.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What a search found, best first.

    Attributes:
        sequences: as many as there were beams.
        output: the same as :meth:`llmapi.LLM.generate` returns it, with metrics and the reason of a failure.
    """

    sequences: list[BeamSearchSequence]
    output: RequestOutput

    @classmethod
    def of(cls, output: RequestOutput, params: BeamSearchParams, decode: Any = None) -> BeamSearchOutput:
        """From what ``generate`` returns.

        Args:
            output: of a finished search.
            params: that asked for it.
            decode: ids of the prompt to text; None where there is no tokenizer.
        """
        prompt = output.prompt if output.prompt is not None or decode is None else decode(output.prompt_token_ids)
        sequences = []
        for one in output.outputs if output.error is None else ():
            total = one.cumulative_logprob
            if total is None:
                total = (one.score or 0.0) * float(max(1, len(one.token_ids))) ** params.length_penalty
            sequences.append(
                BeamSearchSequence(
                    tokens=[*output.prompt_token_ids, *one.token_ids],
                    logprobs=one.logprobs or [],
                    cum_logprob=total,
                    text=None if decode is None else f"{prompt}{one.text}",
                    finish_reason=one.finish_reason,
                    stop_reason=one.stop_reason,
                    score=one.score,
                )
            )
        return cls(sequences, output)
