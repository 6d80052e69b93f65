"""StopChecker: where stop texts end a sequence, and how much of its text may be shown until then.

The loop feeds it what the :class:`~llmapi._tokenizer.Detokenizer` yields::

    shown = checker.push(detokenizer.push([token_id]), sequence.num_output)
    if checker.matched is not None: ...  # finish_reason "stop", stop_reason checker.matched
    # at the end for any other reason:
    shown = checker.finish(detokenizer.finish(), sequence.num_output)
"""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Follows the text of one sequence.

    The stop text that is complete first ends the sequence; of those complete at the same character, the one that
    begins first. So the result does not depend on how the text was cut into tokens. Text that may be the beginning
    of a stop text is held back until it is known not to be, so that what was shown is never taken back.

    Args:
        stop: the stop texts; none of them empty.
        include_stop_str_in_output: keep the stop text at the end; nothing is then held back.
        min_tokens: a stop text completed by an earlier token does not count.

    Attributes:
        matched: the stop text that ended the sequence, or None.

    Example:
        >>> checker = StopChecker(["###"])
        >>> [checker.push("one #", 1), checker.push("# two ##", 2), checker.push("# three", 3)]
        ['one ', '## two ', '']
        >>> checker.text, checker.matched
        ('one ## two ', '###')
    """

    def __init__(
        self, stop: Sequence[str] = (), *, include_stop_str_in_output: bool = False, min_tokens: int = 0
    ) -> None:
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._longest = max(map(len, self._stop), default=0)
        self._parts: list[str] = []  # text that may be shown
        self._held = ""  # text after it that may be the beginning of a stop text
        self._context = ""  # the last shown characters, which a stop text may begin in
        self.matched: str | None = None

    @property
    def watches(self) -> bool:
        """Whether there are stop texts."""
        return bool(self._stop)

    @property
    def text(self) -> str:
        """All text that may be shown so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, text: str, num_tokens: int) -> str:
        """Add text.

        Args:
            text: what the newest tokens added.
            num_tokens: how many tokens the sequence has generated, those included.

        Returns:
            What may be shown now. After a match nothing more is taken in.
        """
        if self.matched is not None:
            return ""
        if not self._stop:
            return self._show(text)
        window = self._context + self._held + text
        old = len(window) - len(text)
        allowed = num_tokens >= self._min_tokens
        hit = self._first(window, old) if allowed and text else None
        if hit is not None:
            begin, end, self.matched = hit
            cut = end if self._include else begin
        else:
            cut = len(window) if self._include else self._safe(window)
        shown = self._show(window[len(self._context) : cut])
        self._held = "" if hit is not None else window[cut:]
        self._context = window[max(0, cut - self._longest + 1) : cut]
        return shown

    def finish(self, text: str = "", num_tokens: int = 0) -> str:
        """Add the last text, which may still complete a stop text, and show what was held back.

        Returns:
            What may be shown now.
        """
        shown = self.push(text, num_tokens)
        if self.matched is None and self._held:
            shown += self._show(self._held)
            self._held = ""
        return shown

    def fork(self) -> StopChecker:
        """A copy that goes on independently."""
        other = StopChecker(self._stop, include_stop_str_in_output=self._include, min_tokens=self._min_tokens)
        other._parts = [self.text]
        other._held, other._context, other.matched = self._held, self._context, self.matched
        return other

    def _show(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _first(self, window: str, old: int) -> tuple[int, int, str] | None:
        """Begin, end and text of the match that is complete first after ``old`` characters."""
        hits = []
        for stop in self._stop:
            begin = window.find(stop, max(0, old - len(stop) + 1))
            if begin >= 0:
                hits.append((begin + len(stop), begin, stop))
        if not hits:
            return None
        end, begin, stop = min(hits)
        return begin, end, stop

    def _safe(self, window: str) -> int:
        """Where the longest ending of ``window`` that begins a stop text starts."""
        for size in range(min(self._longest - 1, len(window)), 0, -1):
            ending = window[-size:]
            if any(len(stop) > size and stop.startswith(ending) for stop in self._stop):
                return len(window) - size
        return len(window)
