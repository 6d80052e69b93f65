"""Transcript: the text of one sequence as it grows: tokens in, text out, stop texts found."""

from __future__ import annotations

from llmapi._runtime.stop import StopChecker
from llmapi._tokenizer import Detokenizer, Tokenizer
from llmapi.sampling import SamplingParams


class Transcript:
    """Text of one sequence; empty throughout where the request wants none.

    Where there are no stop texts, tokens become text when it is asked for: at the end, in one piece, unless somebody
    follows the sequence.

    Args:
        detokenizer: turns tokens into text; None for no text.
        checker: finds stop texts.
        keep_stop_token: whether the token that ends the sequence adds its text.
    """

    def __init__(self, detokenizer: Detokenizer | None, checker: StopChecker, keep_stop_token: bool) -> None:
        self._detokenizer = detokenizer
        self._checker = checker
        self._keep_stop_token = keep_stop_token
        self._tokens = 0
        self._pending: list[int] = []  # not text yet

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> Transcript:
        """For a request.

        Args:
            params: how it wants its text.
            tokenizer: None where the LLM has none.
        """
        checker = StopChecker(
            tuple(params.stop or ()),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        detokenizer = None
        if tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        return cls(detokenizer, checker, params.include_stop_str_in_output)

    @property
    def text(self) -> str:
        """What may be shown so far."""
        if self._pending and self._detokenizer is not None:
            self._checker.push(self._detokenizer.push(self._take()), self._tokens)
        return self._checker.text

    def append(self, token_id: int) -> str | None:
        """Add a token; the stop text that it completed, or None."""
        self._tokens += 1
        if self._detokenizer is None:
            return None
        if not self._checker.watches:
            self._pending.append(token_id)
            return None
        self._checker.push(self._detokenizer.push([token_id]), self._tokens)
        return self._checker.matched

    def end_with(self, token_id: int) -> None:
        """Add the stop token that ends the sequence, and close the text."""
        if self._keep_stop_token:
            self.append(token_id)
        else:
            self._tokens += 1
        self.finish()

    def finish(self) -> str | None:
        """Close the text, incomplete characters and held-back text included; the stop text found last, or None."""
        if self._detokenizer is None:
            return None
        self._checker.finish(self._detokenizer.finish(self._take()), self._tokens)
        return self._checker.matched

    def _take(self) -> list[int]:
        """What is not text yet. Where it cannot be made text, that is said once, and the text before it stays."""
        pending, self._pending = self._pending, []
        return pending

    def fork(self) -> Transcript:
        """A copy that goes on independently."""
        detokenizer = None if self._detokenizer is None else self._detokenizer.fork()
        other = Transcript(detokenizer, self._checker.fork(), self._keep_stop_token)
        other._tokens, other._pending = self._tokens, self._pending.copy()
        return other
