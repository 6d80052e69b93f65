"""Carried: what the beams of a search carry besides their tokens, where the request asks for it.

Texts in which stop texts are looked for, places in a grammar, log probabilities and logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from llmapi._runtime.beam import Ending
from llmapi._runtime.beam_found import Found
from llmapi._runtime.beam_output import Kept, Line
from llmapi._runtime.guide import Guide
from llmapi._runtime.request import Request, Sequence
from llmapi._runtime.transcript import Transcript

if TYPE_CHECKING:
    from llmapi._tokenizer import Tokenizer

Pair = tuple[int, int]
"""A continuation: the row that it continues, and its token."""

Heir = tuple[Sequence, Kept | None, Guide | None]
"""A beam, and what it will carry."""


@dataclass(slots=True)
class Added:
    """What the tokens of one step add to the beams of a group, by continuation."""

    kept: dict[Pair, Kept] = field(default_factory=dict)
    guides: dict[Pair, Guide] = field(default_factory=dict)


class Carried:
    """What the beams of one request carry.

    Args:
        request: a search that has not begun.
        tokenizer: for stop texts and the texts of tokens; None where there is none.

    Attributes:
        nothing: whether beams carry nothing but their tokens.
        may_end: whether what they carry can end them.
        reported: whether anything is told of the tokens that were chosen.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        p = request.params
        self._params, self._tokenizer = p, tokenizer
        self._checks = bool(p.stop) and p.detokenize and tokenizer is not None
        guided = p.guided_decoding is not None
        self.may_end = self._checks or guided
        self.reported = p.logprobs is not None or p.returns_generation_logits
        self._kept: dict[Sequence, Kept] = {}
        if self.reported or self._checks:
            self._kept[request.sequences[0]] = Kept(Transcript.of(p, tokenizer) if self._checks else None)
        self.nothing = not (self._kept or guided)

    def ending(self, seqs: list[Sequence], added: Added) -> Callable[[int, int], Ending | None]:
        """Whether a token completes a stop text or the grammar of a beam; what it makes of them goes to ``added``."""

        def ending(row: int, token: int) -> Ending | None:
            found = self._append(seqs[row], row, token, added) if self._checks else None
            guide = seqs[row].guide
            if guide is not None:
                guide = added.guides[row, token] = guide.fork()
                guide.accept(token)
            if found is None and (guide is None or not guide.complete):
                return None
            return "stop", found

        return ending

    def _append(self, seq: Sequence, row: int, token: int, added: Added) -> str | None:
        """The stop text that a token completes."""
        before = self._kept[seq].transcript
        assert before is not None
        after = before.fork()
        added.kept.setdefault((row, token), Kept()).transcript = after
        return after.append(token)

    def report(self, chosen: Iterable[Pair], found: Found, added: Added) -> None:
        """Keep the log probabilities and the logits of the tokens that were chosen."""
        p, report = self._params, found.report
        assert report is not None
        decode = self._tokenizer.token_text if self._tokenizer is not None and p.detokenize else None
        places = {pair: place for place, pair in enumerate(zip(found.rows, found.tokens, strict=True))}
        for row, token in chosen:
            kept = added.kept.setdefault((row, token), Kept())
            if report.told is not None and p.logprobs is not None:
                first, of = report.first + places[row, token], report.first_row + row
                kept.logprobs = report.told.entries(first, of, [token], p.logprobs, decode)
            if report.logits is not None:
                with torch.inference_mode(False):  # a tensor that the user may change
                    kept.logits = [report.logits[row].clone()]

    def line(self, seq: Sequence, row: int, token: int, added: Added) -> Line:
        """A beam and one more token."""
        kept = self._kept[seq].extended(added.kept.get((row, token), Kept())) if self._kept else None
        return Line([*seq.output_ids, token], kept)

    def running(self, seq: Sequence) -> Line:
        """A beam as it is."""
        return Line(seq.output_ids, self._kept.get(seq))

    def heir(self, seq: Sequence, parent: Sequence, row: int, token: int, added: Added) -> Heir:
        """What a beam that goes on from another will carry; :meth:`settle` gives it to it."""
        kept = self._kept[parent].extended(added.kept[row, token]) if self._kept else None
        return seq, kept, None if parent.guide is None else added.guides[row, token]

    def settle(self, heirs: list[Heir]) -> None:
        """Give all beams what they carry from now on.

        Args:
            heirs: of all groups; beams that are not among them have ended.
        """
        for seq, _, guide in heirs:
            seq.guide = guide
        if self._kept:
            self._kept = {seq: kept for seq, kept, _ in heirs if kept is not None}
