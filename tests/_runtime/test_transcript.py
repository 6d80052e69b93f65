"""Transcript: the text is the same whoever looks at it in between, and costs one decoding where nobody does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmapi import SamplingParams
from llmapi._runtime.transcript import Transcript
from llmapi._tokenizer import Tokenizer
from tests.test_tokenizer import BACKENDS


def transcript(tokenizer: Tokenizer | None, **options: Any) -> Transcript:
    return Transcript.of(SamplingParams(**options), tokenizer)


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    return [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("skip", [True, False])
def test_looking_in_between_changes_nothing(kind: str, skip: bool) -> None:
    tokenizer, rng = Tokenizer(BACKENDS[kind]), random.Random(5)
    for _ in range(200):
        ids = random_ids(tokenizer, rng)
        looked, never = (transcript(tokenizer, skip_special_tokens=skip) for _ in range(2))
        seen = [""]
        for token in ids:
            assert looked.append(token) is None and never.append(token) is None
            if rng.random() < 0.3:
                seen.append(looked.text)
        assert looked.finish() is None and never.finish() is None
        assert never.text == tokenizer.decode(ids, skip)
        assert all(b.startswith(a) for a, b in zip(seen, [*seen[1:], looked.text], strict=True))
        if kind == "byte_level":  # elsewhere a stray byte may undo a character that was shown
            assert looked.text == never.text


def test_nobody_looks_one_decoding() -> None:
    calls: list[int] = []

    class Spy(Tokenizer):
        def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
            calls.append(len(token_ids))
            return super().decode(token_ids, *args, **kwargs)

    spy = Spy(BACKENDS["byte_level"])
    plain = transcript(spy)
    for token in range(2, 60):
        plain.append(token)
    assert calls == []
    plain.end_with(0)
    assert calls == [58]
    stops = transcript(spy, stop=["zzz"])
    stops.append(5)
    assert len(calls) > 1  # a stop text is found at once


def test_the_token_that_ends_it_is_kept_where_asked() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    [*ids] = tokenizer.encode("hello there", add_special_tokens=False)
    for keep in (True, False):
        found = transcript(tokenizer, include_stop_str_in_output=keep)
        for token in ids[:-1]:
            found.append(token)
        found.end_with(ids[-1])
        assert found.text == tokenizer.decode(ids if keep else ids[:-1])


def test_a_fork_goes_on_alone() -> None:
    tokenizer, rng = Tokenizer(BACKENDS["byte_level"]), random.Random(6)
    for _ in range(50):
        start, mine, other = (random_ids(tokenizer, rng) for _ in range(3))
        first = transcript(tokenizer)
        for token in start:
            first.append(token)
        if rng.random() < 0.5:
            assert tokenizer.decode(start).startswith(first.text)
        second = first.fork()
        for one, ids in ((first, mine), (second, other)):
            for token in ids:
                one.append(token)
            one.finish()
            assert one.text == tokenizer.decode(start + ids)


def test_without_a_tokenizer_there_is_no_text() -> None:
    for one in (transcript(None), transcript(Tokenizer(BACKENDS["byte_level"]), detokenize=False)):
        one.append(5)
        one.end_with(6)
        assert one.text == "" and one.finish() is None
