"""Detokenizer: a growing list of token ids to text, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmapi._tokenizer import Tokenizer

_UNKNOWN = "\ufffd"  # stands for bytes that are no character, or not yet
_PATIENCE = 16  # tokens that may be pending before they are taken for garbage


class Detokenizer:
    """Turns a growing list of token ids into text, a piece at a time, in constant time per token.

    A token's text can depend on the one before it (spaces) and a character can span tokens (UTF-8 bytes). So the ids
    after the last piece are decoded together with those of that piece, and what is new is given out, unless it ends
    in an incomplete character. This is the method of transformers' ``TextStreamer`` and of vLLM. At the end the text
    is exactly that of :meth:`Tokenizer.decode` on all ids.

    Args:
        tokenizer: decodes.
        skip_special_tokens: as of :meth:`Tokenizer.decode`.
        spaces_between_special_tokens: likewise.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._ids: list[int] = []  # all, less those that are skipped
        self._before = 0  # ids[before:read] were given out last: the context
        self._read = 0  # ids[read:] are pending
        self._context = ""  # text of ids[before:read]
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text given out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Add ids.

        Returns:
            The text that they complete; ``""`` while a character is incomplete.
        """
        return "".join([self._advance(t) for t in self._shown(token_ids)])

    def _advance(self, token_id: int) -> str:
        """Add one id; one at a time, so that the pieces do not depend on how many arrive together."""
        self._ids.append(token_id)
        window = self._decode(self._before, len(self._ids))
        if len(window) <= len(self._context) or window.endswith(_UNKNOWN):
            return self._give_up(window) if len(self._ids) - self._read > _PATIENCE else ""
        piece = window[len(self._context) :]
        self._before, self._read = self._read, len(self._ids)
        self._context = self._decode(self._before, self._read)
        self._parts.append(piece)
        return piece

    def finish(self, token_ids: Iterable[int] = ()) -> str:
        """Give out what is pending, an incomplete character as U+FFFD; :attr:`text` is then exact.

        Args:
            token_ids: the last ids; they need not come to :meth:`push`.

        Returns:
            The rest of the text.
        """
        shown = self.text
        self._ids += self._shown(token_ids)
        full = self._decode(0, len(self._ids))
        if full.startswith(shown):
            piece = full[len(shown) :]
        else:  # bytes that turned an earlier, already given character invalid
            piece = self._decode(self._before, len(self._ids))[len(self._context) :]
        self._parts = [full]
        self._before = self._read = len(self._ids)
        self._context = ""
        return piece

    def fork(self) -> Detokenizer:
        """A copy that goes on independently."""
        other = Detokenizer(self._tokenizer, skip_special_tokens=self._skip, spaces_between_special_tokens=self._spaces)
        other._ids = list(self._ids)
        other._before, other._read, other._context = self._before, self._read, self._context
        other._parts = [self.text]
        return other

    def _shown(self, token_ids: Iterable[int]) -> list[int]:
        return [t for t in token_ids if not (self._skip and t in self._tokenizer.special_ids)]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], self._skip, self._spaces)

    def _give_up(self, window: str) -> str:
        """Give out a long run that is no text, but for the last tokens if they may begin a character."""
        size = len(self._ids)
        for cut in range(size - 3, size + 1):  # an incomplete character has at most three bytes
            head = self._decode(self._before, cut)
            if cut == size or head + self._decode(cut, size) == window:
                break
        piece = head[len(self._context) :]
        self._before = self._read = cut
        self._context = ""
        self._parts.append(piece)
        return piece
