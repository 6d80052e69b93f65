"""BeamOutputs: the sequences of a search as the user sees them. Their texts are made at the end, or while streaming."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmapi._runtime.beam import Finished
from llmapi._runtime.request import Request
from llmapi._runtime.transcript import Transcript
from llmapi.outputs import CompletionOutput, FinishReason, Logprob

if TYPE_CHECKING:
    import torch

    from llmapi._tokenizer import Tokenizer


@dataclass(slots=True)
class Kept:
    """What a beam carries besides its tokens, where the request asks for it: one entry per new token.

    Attributes:
        transcript: its text so far, to find stop texts.
        logprobs, logits: as of :class:`CompletionOutput`.
    """

    transcript: Transcript | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def extended(self, token: Kept) -> Kept:
        """This and what one more token adds."""
        return Kept(token.transcript, self.logprobs + token.logprobs, self.logits + token.logits)


@dataclass(slots=True)
class Line:
    """A sequence's new tokens and what it carries besides."""

    ids: list[int]
    kept: Kept | None = None


class BeamOutputs:
    """Makes the outputs of one request.

    Args:
        request: a search.
        tokenizer: for texts; None where there is none.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._request = request
        self._tokenizer = tokenizer if request.params.detokenize else None
        self._shown = self._transcript()
        self._shown_ids: list[int] = []

    def leading(self, line: Line, score: float | None) -> CompletionOutput:
        """The beam that leads, still running."""
        known = len(self._shown_ids)
        if line.ids[:known] != self._shown_ids:  # another one leads now
            self._shown, known = self._transcript(), 0
        if self._tokenizer is not None:
            for token in line.ids[known:]:
                self._shown.append(token)
        self._shown_ids = list(line.ids)
        return self._output(0, line, self._shown.text, score, None, None)

    def final(self, finished: list[Finished], reason: FinishReason | None = None) -> list[CompletionOutput]:
        """The best ``n``, best first; of equal ones the first.

        Args:
            finished: all there are; ``output`` is a :class:`Line`.
            reason: why the search was ended before its time; None where it was not.
        """
        best = sorted(finished, key=lambda f: -f.score)[: self._request.params.n]
        outputs = []
        for index, one in enumerate(best):
            line: Line = one.output
            text, stop = self._spell(line.ids, one)
            why = reason or ("stop" if stop is not None else one.reason)
            outputs.append(self._output(index, line, text, one.score, why, stop if reason is None else None))
        return outputs

    def _output(
        self, index: int, line: Line, text: str, score: float | None, why: FinishReason | None, stop: int | str | None
    ) -> CompletionOutput:
        import torch

        params, kept = self._request.params, line.kept
        logprobs = kept.logprobs if kept is not None and params.logprobs is not None else None
        total = None
        if logprobs is not None:
            total = sum(entry[token].logprob for entry, token in zip(logprobs, line.ids, strict=True))
        logits = torch.stack(kept.logits) if kept is not None and kept.logits else None
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=line.ids,
            cumulative_logprob=total,
            logprobs=logprobs,
            finish_reason=why,
            stop_reason=stop,
            logits=logits,
            score=score,
        )

    def _spell(self, ids: list[int], one: Finished) -> tuple[str, int | str | None]:
        """The text of a finished sequence, and the stop token or text that ended it, as ``stop_reason`` tells."""
        p = self._request.params
        token_ended = one.reason == "stop" and isinstance(one.stop, int)
        stop: int | str | None = one.stop if not token_ended or one.stop in (p.stop_token_ids or ()) else None
        if self._tokenizer is None:
            return "", stop
        if not p.stop:
            shown = ids[:-1] if token_ended and not p.include_stop_str_in_output else ids
            return self._tokenizer.decode(shown, p.skip_special_tokens, p.spaces_between_special_tokens), stop
        transcript = self._transcript()
        for token in ids[:-1] if token_ended else ids:
            transcript.append(token)
        if token_ended:
            transcript.end_with(ids[-1])
            return transcript.text, stop
        found = transcript.finish()
        return transcript.text, found

    def _transcript(self) -> Transcript:
        return Transcript.of(self._request.params, self._tokenizer)
