"""Tokenizer: text to token ids and back.

A thin layer over transformers' ``AutoTokenizer``: it reads local files only, and its errors say what to do. One that
was frozen (see :mod:`llmapi._frozen_tokenizer`) encodes and decodes without it, and loads it for everything else.
Token by token, text comes from :class:`~llmapi._detokenizer.Detokenizer`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llmapi._detokenizer import Detokenizer
from llmapi._frozen_tokenizer import FrozenTokenizer, freeze
from llmapi.errors import CheckpointError, ConfigError, RequestError, not_unicode, unknown_name

__all__ = ["Detokenizer", "Tokenizer"]

_log = logging.getLogger(__name__)

_MODES = ("auto", "slow")
_EXAMPLE = "each message is a dict such as {'role': 'user', 'content': 'Hello'}"
_FIXED = ("conversation", "tokenize", "return_dict", "return_tensors")
"""Options of transformers' ``apply_chat_template`` that are set here, so that token ids come of it."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: a tokenizer of transformers (``PreTrainedTokenizerBase``).
        name: what messages call it, usually the folder it came from.

    Attributes:
        eos_token_id: id of the end-of-sequence token, or None.
        vocab_size: number of ids, added tokens included; the model's logits may be wider.

    Example:
        >>> tokenizer = Tokenizer.load(Path("my-model"))  # doctest: +SKIP
        >>> tokenizer.decode(tokenizer.encode("Hello"))  # doctest: +SKIP
        'Hello'
    """

    def __init__(self, backend: Any, name: str = "this model") -> None:
        self._backend = backend
        self._load: Callable[[], Any] | None = None
        self._loading = threading.Lock()
        self._frozen: FrozenTokenizer | None = None
        self.name = name
        if backend is not None:
            self.eos_token_id: int | None = backend.eos_token_id
            self.vocab_size: int = len(backend)
            self.special_ids: frozenset[int] = _special_ids(backend)
        self._texts: dict[int, str] = {}

    @classmethod
    def of_frozen(cls, frozen: FrozenTokenizer, load: Callable[[], Any], name: str) -> Tokenizer:
        """A tokenizer that needs no transformers to encode and decode.

        Args:
            frozen: does that.
            load: gives the tokenizer of transformers that it was frozen from; called when something else is asked.
            name: as of the class.
        """
        made = cls(None, name)
        made._frozen, made._load = frozen, load
        made.eos_token_id, made.vocab_size, made.special_ids = (
            frozen.eos_token_id,
            frozen.vocab_size,
            frozen.special_ids,
        )
        return made

    @property
    def backend(self) -> Any:
        """The tokenizer of transformers."""
        if self._backend is None:
            with self._loading:
                if self._backend is None and self._load is not None:
                    self._backend = self._load()
        return self._backend

    @property
    def rust(self) -> Any:
        """The ``tokenizers.Tokenizer`` that does the work; None where Python does it."""
        if self._frozen is not None:
            return self._frozen.rust
        return getattr(self.backend, "backend_tokenizer", None)

    def freeze(self, folder: Path) -> bool:
        """Write down what :class:`FrozenTokenizer` needs; whether that is possible.

        Args:
            folder: where the files go.
        """
        special = sorted(self.special_ids)
        facts = {"eos_token_id": self.eos_token_id, "vocab_size": self.vocab_size, "special_ids": special}
        return freeze(self.backend, facts, folder)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        mode: Literal["auto", "slow"] = "auto",
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
    ) -> Tokenizer:
        """Read a tokenizer from a folder, never from the network.

        Args:
            folder: where the tokenizer's files are.
            mode: ``"auto"`` takes the Rust implementation where there is one; ``"slow"`` asks for the Python one,
                which recent transformers have for few models: where it has none, the Rust one is used and logged.
            trust_remote_code: run Python code that the model brings along.
            gguf_file: name of a ``.gguf`` file in the folder that holds the tokenizer.

        Raises:
            ConfigError: an unknown mode, or the tokenizer needs ``trust_remote_code``.
            CheckpointError: the folder has no tokenizer, or a broken one.
        """
        if mode not in _MODES:
            raise ConfigError(unknown_name("tokenizer_mode", mode, _MODES))
        from transformers import AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
        if mode == "slow":
            options["use_fast"] = False
        advice = "Put its files beside the weights, name another with tokenizer=..., or set skip_tokenizer_init=True"
        if not folder.is_dir():
            raise CheckpointError(f"no tokenizer in {folder}: there is no such folder. {advice}")
        try:
            backend = AutoTokenizer.from_pretrained(str(folder), **options)
        except Exception as error:  # whatever a broken file makes transformers raise
            if "trust_remote_code" in str(error) and not trust_remote_code:
                raise ConfigError(
                    f"the tokenizer in {folder} is Python code that came with the model: "
                    "read it, then set trust_remote_code=True to run it"
                ) from error
            raise CheckpointError(f"no tokenizer could be read in {folder}: {_first_line(error)}. {advice}") from error
        if backend is None or isinstance(backend, bool) or len(backend) <= len(backend.all_special_ids):
            raise CheckpointError(f"the tokenizer in {folder} has no vocabulary: its files are missing. {advice}")
        if mode == "slow" and backend.is_fast:
            _log.warning("tokenizer_mode='slow': transformers has no Python tokenizer for %s, only a Rust one", folder)
        return cls(backend, str(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids.

        Args:
            text: any text, the empty one included.
            add_special_tokens: put what the model expects around it (such as a beginning-of-sequence token).

        Raises:
            RequestError: not a text, or one that is not valid Unicode.
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be a text or a list of token ids, not {type(text).__name__}")
        try:
            if self._frozen is not None:
                return self._frozen.encode(text, add_special_tokens)
            encoded = self.backend(text, add_special_tokens=add_special_tokens, verbose=False)
        except (UnicodeError, TypeError) as error:
            raise RequestError(f"the text {not_unicode(text) or f'cannot be encoded: {error}'}") from error
        return list(encoded["input_ids"])

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Token ids to text.

        Args:
            token_ids: any number of ids; ids that the tokenizer does not know give no text.
            skip_special_tokens: leave special tokens out.
            spaces_between_special_tokens: passed to the tokenizer; only some Python tokenizers heed it.
        """
        if self._frozen is not None:
            return self._frozen.decode(token_ids, skip_special_tokens)
        text = self.backend.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        return str(text)

    def token_text(self, token_id: int) -> str:
        """One token as text, special tokens shown; remembered."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def detokenizer(
        self, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        """A new :class:`Detokenizer`, for one sequence."""
        return Detokenizer(
            self, skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """A conversation to token ids, by the model's chat template.

        Args:
            messages: dicts with a ``role`` and a ``content``, oldest first.
            chat_template: a Jinja template, or the name of one of the model's, in place of its default.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: leave the last message open, to be continued; then no generation prompt.
            tools: functions or JSON schemas that the model may call.
            documents: texts for retrieval.
            template_arguments: passed on to the template.

        Raises:
            ConfigError: an option that is set here already, or that is not of its form.
            RequestError: the model has no chat template, a message is malformed, or the template refuses it.
        """
        for name in _FIXED:
            if name in template_arguments:
                raise ConfigError(
                    f"{name}={template_arguments[name]!r} cannot be given to a chat, which sets {', '.join(_FIXED)} "
                    f"itself: leave out {name}"
                )
        for name, given in (("tools", tools), ("documents", documents)):
            if given is not None and not isinstance(given, (list, tuple)):
                raise ConfigError(f"{name}={given!r}: give a list, or leave {name} out")
        _check_messages(messages)
        if chat_template is None and not self.backend.chat_template:
            raise RequestError(
                f"the tokenizer of {self.name} has no chat template: it is not a chat model. "
                "Use generate() with a plain prompt, or pass chat_template=..."
            )
        try:
            ids = self.backend.apply_chat_template(
                [dict(m) for m in messages],
                tools=None if tools is None else list(tools),
                documents=None if documents is None else [dict(d) for d in documents],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=True,
                return_dict=False,
                **template_arguments,
            )
        except Exception as error:  # Jinja errors, and whatever a template trips over
            reason = _first_line(error)
            raise RequestError(f"the chat template of {self.name} refused the messages: {reason}") from error
        return [int(t) for t in ids]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, for :meth:`load`."""
        self.backend.save_pretrained(str(folder))


def _special_ids(backend: Any) -> frozenset[int]:
    """The ids that ``skip_special_tokens`` leaves out."""
    ids = set(backend.all_special_ids)
    ids.update(i for i, token in backend.added_tokens_decoder.items() if token.special)
    return frozenset(ids)


def _check_messages(messages: object) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f"a conversation must be a list of messages, not {type(messages).__name__}: give "
            "[{'role': 'user', 'content': 'Hello'}], for example, or a list of such lists for several conversations"
        )
    if not messages:
        raise RequestError(f"messages is empty: give at least one; {_EXAMPLE}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{i}] is {message!r}, not a dict: {_EXAMPLE}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise RequestError(f"messages[{i}] has role={role!r}: give a text such as 'user'; {_EXAMPLE}")
        if content is None and "tool_calls" in message:
            continue
        if isinstance(content, (list, tuple)):
            for part in content:
                if not isinstance(part, Mapping) or "type" not in part:
                    raise RequestError(
                        f"messages[{i}] has the content part {part!r}: give dicts such as "
                        "{'type': 'text', 'text': 'Hello'}"
                    )
        elif not isinstance(content, str):
            raise RequestError(f"messages[{i}] has content={content!r}: give a text; {_EXAMPLE}")
        elif why := not_unicode(content):
            raise RequestError(f"the content of messages[{i}] {why}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"
