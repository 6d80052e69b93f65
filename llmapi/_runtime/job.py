"""Job: one request in flight, what it has produced so far, and who wants to hear of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmapi._runtime.beam_run import BeamRun
from llmapi._runtime.request import Request, Sequence
from llmapi._runtime.transcript import Transcript
from llmapi.errors import LLMAPIError
from llmapi.outputs import CompletionOutput, Logprob, RequestOutput

if TYPE_CHECKING:
    import torch

    from llmapi._tokenizer import Tokenizer

Listener = Callable[[RequestOutput], None]


@dataclass(eq=False, slots=True)
class Record:
    """What one sequence has produced besides its token ids."""

    transcript: Transcript
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def fork(self) -> Record:
        """A copy for a sequence that goes on from here."""
        return Record(self.transcript.fork(), list(self.logprobs), list(self.logits))


@dataclass(eq=False, slots=True)
class Job:
    """One request in flight.

    Attributes:
        request: what was asked for.
        tokenizer: for its text; None where the LLM has none.
        listener: called on the loop's thread with the final output, and with each state before it when ``streaming``.
        streaming: whether states before the final one are wanted.
        records: one per sequence; none of a beam search.
        beams: the search, where the request is one.
        prompt_rows: prompt positions whose rows were seen, or are not wanted, so far.
        error: why it failed.
    """

    request: Request
    tokenizer: Tokenizer | None
    listener: Listener
    streaming: bool = False
    records: dict[Sequence, Record] = field(default_factory=dict)
    beams: BeamRun | None = None
    prompt_rows: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    prompt_logits: list[torch.Tensor] = field(default_factory=list)
    error: LLMAPIError | None = None
    _last_step: int = -1
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.prompt_rows = self.request.first_wanted_row or 0
        if self.request.params.use_beam_search:
            self.beams = BeamRun(self.request, self.tokenizer)
            return
        for seq in self.request.sequences:
            self.records[seq] = Record(Transcript.of(self.request.params, self.tokenizer))

    @property
    def wants_prompt(self) -> bool:
        """Whether rows of the prompt are still wanted."""
        return self.request.first_wanted_row is not None and self.prompt_rows < len(self.request.prompt_token_ids)

    def follow(self, wanted: bool) -> None:
        """Say whether states before the final one are wanted from now on; from any thread."""
        self.streaming = wanted

    def start(self) -> None:
        """Note that a step is about to run some of its tokens; only the first time counts."""
        if self.request.metrics.queue_time is None:
            self.request.metrics.queue_time = self.elapsed()

    def note_token(self, step: int) -> None:
        """Note the time of a step that gave it a token; several sequences' tokens of one step count once."""
        if self._last_step == step:
            return
        self._last_step = step
        metrics, now = self.request.metrics, self.elapsed()
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        metrics.token_times.append(now)

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self._started

    def output(self) -> RequestOutput:
        """The request's state as the user sees it."""
        import torch

        request, params = self.request, self.request.params
        metrics = request.metrics
        metrics.preemptions = sum(s.preemptions for s in request.sequences)
        outputs = []
        if self.beams is not None:
            metrics.beam_kv_blocks = self.beams.blocks
            outputs = self.beams.outputs()
        for seq in self.records:
            record = self.records[seq]
            logprobs = list(record.logprobs) if params.logprobs is not None else None
            ids = seq.output_ids
            total = None
            if params.kept_logprobs is not None:
                total = sum(e[t].logprob for e, t in zip(record.logprobs, ids, strict=True))
            logits = None
            if params.returns_generation_logits and record.logits:
                logits = torch.stack(record.logits)
            outputs.append(
                CompletionOutput(
                    index=seq.index,
                    text=record.transcript.text,
                    token_ids=ids,
                    cumulative_logprob=total,
                    logprobs=logprobs,
                    finish_reason=seq.finish_reason,
                    stop_reason=seq.stop_reason,
                    logits=logits,
                )
            )
        if params.num_drawn > params.n:
            outputs = _best(outputs, params.n)
        done = self.prompt_rows >= len(request.prompt_token_ids)
        return RequestOutput(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            finished=request.finished,
            prompt_logprobs=list(self.prompt_logprobs) if params.prompt_logprobs is not None and done else None,
            prompt_logits=torch.cat(self.prompt_logits) if params.returns_context_logits and done else None,
            num_cached_tokens=request.sequences[0].num_cached,
            metrics=metrics,
            error=self.error,
        )


def _best(outputs: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """The most probable of these, best first, numbered by rank; of equals those drawn first."""
    ranked = sorted(outputs, key=lambda o: -(o.cumulative_logprob or 0.0))[:count]
    return [dataclasses.replace(output, index=rank) for rank, output in enumerate(ranked)]
