"""Grammars: compiled once each, on threads of their own, for guided decoding.

llguidance (https://github.com/guidance-ai/llguidance) does the work: a lexer of derivatives of regular expressions and
an Earley parser, over a trie of the tokenizer's tokens.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from llmapi._runtime.grammar_lines import GrammarLines
from llmapi._runtime.guide import Guide
from llmapi.errors import RequestError
from llmapi.guided import GrammarKey, GuidedDecodingParams

if TYPE_CHECKING:
    from llmapi._tokenizer import Tokenizer

_MOST = 128  # grammars that are kept

INSTALL = 'pip install "llguidance>=1.9", or llmapi with the extra [guided]'


class Grammar:
    """A compiled grammar.

    Args:
        lines: its matchers.
        end_token_ids: the ids that they take as the end of the text.
    """

    def __init__(self, lines: GrammarLines, end_token_ids: frozenset[int]) -> None:
        self._lines = lines
        self._ends = end_token_ids

    def start(self, stop_token_ids: frozenset[int]) -> Guide:
        """The beginning of a text.

        Args:
            stop_token_ids: ids that end this request.
        """
        added, dropped = stop_token_ids - self._ends, self._ends - stop_token_ids
        return Guide(self._lines, sorted(added), sorted(dropped))


class Grammars:
    """Compiles grammars in the background and keeps the last ones.

    Args:
        tokenizer: of the LLM; None where it has none.
        vocab_size: width of the logits.
        end_token_ids: ids that end a sequence of this model.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab_size
        self._ends = end_token_ids
        self._lock = threading.Lock()
        self._kept: OrderedDict[GrammarKey, Future[Grammar]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False
        self._tokens: Any = None
        self._making_tokens = threading.Lock()

    def get(self, params: GuidedDecodingParams) -> Future[Grammar]:
        """A grammar, compiled already or on its way; the future's exception says what is wrong with it.

        Raises:
            RequestError: no grammar can be used here, or this one is known to be wrong.
        """
        self._check()
        with self._lock:
            found = self._kept.get(params.key)
            if found is None:
                found = self._kept[params.key] = self._pool().submit(self.compile, params.key)
                while len(self._kept) > _MOST:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(params.key)
        if found.done() and (error := found.exception()) is not None:
            raise error
        return found

    def compile(self, key: GrammarKey) -> Grammar:
        """Compile a grammar.

        Args:
            key: which.

        Raises:
            RequestError: it is wrong, or asks for what llguidance cannot do.
        """
        return Grammar(GrammarLines(self._matcher(key), partial(self._more, key)), self._ends)

    def _more(self, key: GrammarKey, count: int) -> Future[list[Any]] | None:
        """Begin to compile a grammar so many times more."""
        with self._lock:
            if self._closed:
                return None
            return self._pool().submit(lambda: [self._matcher(key) for _ in range(count)])

    def _matcher(self, key: GrammarKey) -> Any:
        from llguidance import LLMatcher

        kind, text, _, _ = key
        matcher = LLMatcher(self._tokens_once(), _source(key), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # limits show here, and the first step has less to do
        if matcher.is_error():
            why = matcher.get_error().partition("\n<state>")[0].strip()
            raise RequestError(f"guided_decoding: this {kind} cannot be used: {why}. It is {_short(text)}")
        return matcher

    def close(self) -> None:
        """End the threads; what is being compiled is not waited for."""
        with self._lock:
            self._closed = True
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._threads = None
            self._kept.clear()

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, thread_name_prefix="llmapi-grammar")
        return self._threads

    def _check(self) -> None:
        if self._tokenizer is None:
            raise RequestError("guided_decoding needs a tokenizer, and this LLM was made with skip_tokenizer_init=True")
        if not self._ends:
            raise RequestError(
                "guided_decoding needs an end-of-sequence token, and this model names none: add eos_token_id to its "
                "generation_config.json"
            )
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise RequestError(f"guided_decoding needs the package llguidance, which is missing: {INSTALL}") from error

    def _tokens_once(self) -> Any:
        """The tokenizer as llguidance has it."""
        with self._making_tokens:
            if self._tokens is None:
                from llguidance import LLTokenizer

                assert self._tokenizer is not None
                text = _rust_text(self._tokenizer)
                try:
                    self._tokens = LLTokenizer(text, n_vocab=self._vocab, eos_token=sorted(self._ends))
                except ValueError as error:
                    raise RequestError(
                        f"guided_decoding: the tokenizer of {self._tokenizer.name}, of {self._tokenizer.vocab_size} "
                        f"tokens, cannot be used with this model of {self._vocab} logits ({error}): name the model's "
                        "own with tokenizer=..."
                    ) from error
            return self._tokens


def _source(key: GrammarKey) -> str:
    """A grammar as llguidance reads it."""
    from llguidance import LLMatcher, grammar_from

    kind, text, whitespace, compact = key
    if kind in ("json", "json_object"):
        options: dict[str, Any] = {"whitespace_flexible": False} if compact else {}
        if whitespace is not None:
            options["whitespace_pattern"] = whitespace
        return str(LLMatcher.grammar_from_json_schema(text, overrides=options))
    try:
        return str(grammar_from(kind, text))
    except ValueError as error:
        raise RequestError(f"guided_decoding: this {kind} cannot be used: {error}. It is {_short(text)}") from error


def _rust_text(tokenizer: Tokenizer) -> str:
    """The state of the tokenizer's Rust object, as JSON.

    Raises:
        RequestError: it has none.
    """
    rust = tokenizer.rust
    if rust is None:
        raise RequestError(
            f"guided_decoding needs a tokenizer of the Rust library tokenizers, and that of {tokenizer.name} is "
            "written in Python: name another with tokenizer=..."
        )
    rust = copy.copy(rust)
    rust.no_padding()
    rust.no_truncation()
    return str(rust.to_str())


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
