"""FrozenTokenizer: encode and decode as a tokenizer of transformers does, without importing transformers.

Importing transformers takes a large part of a warm start. Of its fast tokenizers the Rust library ``tokenizers`` does
the work; what the Python class around it adds when it is loaded (special tokens, the template around a prompt) ends up
in the state of the Rust object. So once a tokenizer is loaded, that state is written down, and the next start reads it
back. Tokenizers whose class does more than that in Python cannot be frozen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STATE_FILE = "frozen_tokenizer.json"
FACTS_FILE = "frozen_facts.json"

_PROBES = (
    "",
    " ",
    "Hello world",
    "  two  spaces, a\ttab and\nnew\r\nlines \n",
    "It's 3.14 o'clock; don't we'll .",
    "Grüße, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469 e\u0301 \u00e9",
    "<s></s><|im_start|>user\n<|endoftext|>[INST] <unk> </s>",
    "x" * 300,
)
_DECODED = 64


class FrozenTokenizer:
    """The frozen part of a tokenizer.

    Args:
        rust: a ``tokenizers.Tokenizer``.
        facts: what :func:`freeze` wrote beside it.

    Attributes:
        eos_token_id: id of the end-of-sequence token, or None.
        vocab_size: number of ids, added tokens included.
        special_ids: ids that ``skip_special_tokens`` leaves out.
    """

    def __init__(self, rust: Any, facts: dict[str, Any]) -> None:
        self._rust = rust
        self.eos_token_id: int | None = facts["eos_token_id"]
        self.vocab_size: int = facts["vocab_size"]
        self.special_ids: frozenset[int] = frozenset(facts["special_ids"])

    @property
    def rust(self) -> Any:
        """The ``tokenizers.Tokenizer`` that does the work."""
        return self._rust

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Text to ids."""
        [encoding] = self._rust.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Ids to text."""
        return str(self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def freeze(backend: Any, facts: dict[str, Any], folder: Path) -> bool:
    """Write a tokenizer of transformers down, if it can be frozen.

    Args:
        backend: the tokenizer.
        facts: its ``eos_token_id``, ``vocab_size`` and ``special_ids``.
        folder: where the two files go; a tokenizer that cannot be frozen has only the one that says so.

    Returns:
        whether it was frozen.
    """
    why = _obstacle(backend)
    state = "" if why else backend.backend_tokenizer.to_str()
    if why is None:
        why = _difference(backend, _thaw(state, facts))
    if why is None:
        (folder / STATE_FILE).write_text(state, encoding="utf-8")
        (folder / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
    else:
        (folder / FACTS_FILE).write_text(json.dumps({"not_frozen": why}), encoding="utf-8")
    return why is None


def thaw(folder: Path) -> FrozenTokenizer | None:
    """The tokenizer that :func:`freeze` wrote into ``folder``; None where it could not be frozen."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    if "not_frozen" in facts:
        return None
    return _thaw((folder / STATE_FILE).read_text(encoding="utf-8"), facts)


def _thaw(state: str, facts: dict[str, Any]) -> FrozenTokenizer:
    import tokenizers

    rust = tokenizers.Tokenizer.from_str(state)
    rust.no_truncation()  # as transformers does before it encodes one prompt
    rust.no_padding()
    return FrozenTokenizer(rust, facts)


def _obstacle(backend: Any) -> str | None:
    """What the Python class does that the Rust object does not; None for nothing."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if not isinstance(backend, PreTrainedTokenizerFast) or not type(backend).__module__.startswith("transformers."):
        return f"{type(backend).__name__} is no fast tokenizer of transformers"
    own = {"__call__": PreTrainedTokenizerBase, "decode": PreTrainedTokenizerBase}
    own |= {"_encode_plus": PreTrainedTokenizerFast, "_decode": PreTrainedTokenizerFast}
    for name, base in own.items():
        if getattr(type(backend), name, None) is not getattr(base, name, object()):
            return f"{type(backend).__name__} has a {name} of its own"
    if backend.clean_up_tokenization_spaces and type(backend.backend_tokenizer.model).__name__ != "BPE":
        return "it cleans up spaces in Python"
    if getattr(backend, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False):
        return "it cleans up spaces in Python"
    if backend.split_special_tokens:
        return "it splits special tokens, a setting that is not part of the state"
    return None


def _difference(backend: Any, frozen: FrozenTokenizer) -> str | None:
    """A text or some ids that the two take differently; None where all agree."""
    for text in _PROBES:
        for special in (True, False):
            theirs = list(backend(text, add_special_tokens=special, verbose=False)["input_ids"])
            if frozen.encode(text, special) != theirs:
                return f"it encodes {text!r} differently"
            for skip in (True, False):
                if frozen.decode(theirs, skip) != backend.decode(theirs, skip_special_tokens=skip):
                    return f"it decodes {theirs} differently"
    step = max(1, frozen.vocab_size // _DECODED)
    some = sorted({*range(0, frozen.vocab_size, step), *sorted(frozen.special_ids)[:_DECODED]})
    for ids in (some, *([i] for i in some)):
        for skip in (True, False):
            if frozen.decode(ids, skip) != backend.decode(ids, skip_special_tokens=skip):
                return f"it decodes {ids[:8]} differently"
    return None
