"""What a request returns: :class:`RequestOutput`, its :class:`CompletionOutput` s and their metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from llmapi.errors import LLMAPIError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token at one position.

    Attributes:
        logprob: natural logarithm of the token's probability under the model's own distribution
            (before temperature, penalties and truncation).
        rank: 1 for the most probable token of the vocabulary at this position.
        decoded_token: the token as text; None when no tokenizer is in use.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence of a request.

    Attributes:
        index: position among the request's ``n`` sequences; those of a beam search stand best first, and those of
            ``best_of`` by falling ``cumulative_logprob``.
        text: generated text, empty when the request has ``detokenize=False``.
        token_ids: generated ids, the stop token included where one ended the sequence.
        cumulative_logprob: sum of the log probabilities of ``token_ids``; None unless ``logprobs`` or ``best_of`` was
            asked for.
        logprobs: one dict per generated token, from token id to :class:`Logprob`.
        finish_reason: ``"stop"`` (end of sequence, stop token or stop string), ``"length"`` (``max_tokens`` or
            ``max_seq_len``), ``"abort"``, ``"error"``, or None while the sequence is still growing.
        stop_reason: the stop string or stop token id that ended the sequence; None for the model's own end token.
        logits: ``[len(token_ids), vocab_size]`` float32 raw logits where ``return_logits`` asked for them.
        score: of a beam search: the sum of the log probabilities after penalties and other edits, over the number of
            tokens to the power of ``length_penalty``; None otherwise.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logits: torch.Tensor | None = None
    score: float | None = None

    @property
    def finished(self) -> bool:
        """Whether this sequence has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a model finds a given continuation.

    Attributes:
        logprob: natural logarithm of its probability: the sum of ``logprobs``.
        is_greedy: whether greedy decoding would have produced exactly these tokens.
        token_ids: the tokens that were scored.
        logprobs: log probability of each, given all tokens before it.
    """

    logprob: float
    is_greedy: bool
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How probable a model finds a text.

    Attributes:
        perplexity: ``exp(-logprob / num_tokens)``.
        logprob: natural logarithm of its probability.
        num_tokens: tokens that were scored.
    """

    perplexity: float
    logprob: float
    num_tokens: int


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds.

    Attributes:
        arrival_time: ``time.time()`` when the request was submitted.
        queue_time: from arrival to the first step that ran any of its tokens.
        first_token_time: from arrival to its first generated token.
        finished_time: from arrival to its end.
        token_times: from arrival to each step that produced a token for it.
        preemptions: how often it lost its KV blocks and was recomputed.
        beam_kv_blocks: of a beam search: the most KV blocks that its beams held, those that they share counted once;
            looked at every eighth token and at the end. None otherwise.
    """

    arrival_time: float
    queue_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    preemptions: int = 0
    beam_kv_blocks: int | None = None

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between generated tokens after the first; None with fewer than two."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: final when :attr:`finished`, else what exists so far (streaming).

    Attributes:
        request_id: unique within its LLM.
        prompt: the prompt as text, where it was given as text.
        prompt_token_ids: the ids that were run.
        outputs: ``n`` sequences.
        finished: whether every sequence has ended.
        prompt_logprobs: one entry per prompt token (None for the first), where ``prompt_logprobs`` asked for them.
        prompt_logits: ``[len(prompt_token_ids), vocab_size]`` float32 where ``return_logits`` asked for the context.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache.
        metrics: times of this request.
        error: why the request failed; None unless ``outputs[0].finish_reason == "error"``.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_logits: torch.Tensor | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: LLMAPIError | None = None

    @property
    def text(self) -> str:
        """Text of the first sequence: shorthand for ``outputs[0].text``."""
        return self.outputs[0].text
