"""Grammars over tokenizers of both kinds: every walk through the allowed tokens spells a text of the grammar."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import Future

import jsonschema
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, normalizers, trainers

from llmapi._runtime import grammar_lines
from llmapi._runtime.grammar import Grammars
from llmapi._runtime.guide import Guide, fill, words
from llmapi._tokenizer import Tokenizer
from llmapi.errors import RequestError
from llmapi.guided import GuidedDecodingParams
from tests.tiny import VOCAB, tiny_tokenizer

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")

WIDTH = VOCAB + 33  # the logits are wider than the vocabulary, and no multiple of 32


def sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As those of Llama 2 and Mistral: spaces are ``▁``, one stands before the text, bytes are a fallback."""
    special = ["<unk>", "<s>", "</s>"]
    rust = Rust(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = ['hello big world {"a": 12}', "a b c, abc; some more words", "yes please", "12345 67890"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    rust.train_from_iterator(texts, trainer)
    state = json.loads(rust.to_str())
    del state["added_tokens"][len(special) :]  # bytes are plain tokens
    rust = Rust.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(params=["byte level", "sentencepiece"], scope="module")
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece":
        return Tokenizer(sentencepiece_tokenizer())
    return Tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    assert tokenizer.eos_token_id is not None
    return Grammars(tokenizer, WIDTH, frozenset([tokenizer.eos_token_id]))


def allowed(guides: list[Guide]) -> list[set[int]]:
    masks = np.zeros((len(guides), words(WIDTH)), dtype=np.int32)
    fill(guides, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(np.nonzero(row)[0].tolist()) for row in bits]


def walk(grammars: Grammars, tokenizer: Tokenizer, rng: random.Random, most: int, **kinds: object) -> str | None:
    """The text of a random walk; None where it did not end in time."""
    eos = tokenizer.eos_token_id
    guide = grammars.get(GuidedDecodingParams(**kinds)).result(30).start(frozenset([eos or 0]))  # type: ignore[arg-type]
    ids: list[int] = []
    while not guide.complete and len(ids) < most:
        [choices] = allowed([guide])
        assert choices and max(choices) < tokenizer.vocab_size, choices
        token = rng.choice(sorted(choices))
        if token == eos:
            return tokenizer.decode(ids)
        assert token not in tokenizer.special_ids
        guide.accept(token)
        ids.append(token)
    return tokenizer.decode(ids) if guide.complete else None


@pytest.mark.parametrize(
    "regex", ["([a-e]{1,3} )*[0-9]{2}", "yes|no|yes please", "x(é|日本 ?){0,4}y", '"[^"\\\\]{0,5}"']
)
def test_random_walks_match_a_regex(grammars: Grammars, tokenizer: Tokenizer, regex: str) -> None:
    found = [walk(grammars, tokenizer, random.Random(i), 60, regex=regex) for i in range(60)]
    ended = [text for text in found if text is not None]
    assert len(ended) > 40 and len(set(ended)) > 2
    for text in ended:
        assert re.fullmatch(regex, text), text


def test_random_walks_fit_a_schema(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                       "c": {"type": "string", "maxLength": 4}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    found = [walk(grammars, tokenizer, random.Random(i), 200, json=schema, whitespace_pattern=" ?") for i in range(60)]
    ended = [text for text in found if text is not None]
    assert len(ended) > 30 and any(" " in text for text in ended)
    for text in ended:
        jsonschema.validate(json.loads(text), schema)


def test_every_allowed_token_can_be_accepted_and_no_other(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.get(GuidedDecodingParams(regex="(hello|abc d|12*)+")).result(30)
    eos = tokenizer.eos_token_id or 0
    guide = grammar.start(frozenset([eos]))
    for step in range(6):
        [choices] = allowed([guide])
        for token in range(tokenizer.vocab_size):
            matcher = guide.fork()._matcher
            assert matcher.consume_token(token) == (token in choices), (step, token)
        guide.accept(min(choices - {eos}))


def test_forks_and_rows_of_one_call_are_independent(grammars: Grammars, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id or 0
    first = grammars.get(GuidedDecodingParams(regex="[ab]{4}")).result(30).start(frozenset([eos]))
    other = grammars.get(GuidedDecodingParams(regex="[12]+")).result(30).start(frozenset([eos]))
    [before] = allowed([first])
    fork = first.fork()
    for _ in range(4):
        single = [t for t in allowed([fork])[0] if len(tokenizer.decode([t]).strip()) == 1]
        fork.accept(min(single))
    assert fork.complete and not first.complete
    together = allowed([first, other, fork])
    assert together == [*allowed([first]), *allowed([other]), *allowed([fork])]
    assert together[0] == before and together[2] == {eos} and not together[0] & together[1]


def test_end_tokens_of_a_request(grammars: Grammars, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id or 0
    last, beyond = WIDTH - 1, 10**6
    grammar = grammars.get(GuidedDecodingParams(regex="1*")).result(30)
    plain = allowed([grammar.start(frozenset([eos]))])[0]
    assert eos in plain and last not in plain
    assert allowed([grammar.start(frozenset([eos, last, beyond]))])[0] == plain | {last}
    assert allowed([grammar.start(frozenset([last]))])[0] == plain - {eos} | {last}
    started = grammars.get(GuidedDecodingParams(regex="11")).result(30).start(frozenset([eos, last]))
    assert not {eos, last} & allowed([started])[0]


def test_a_tokenizer_that_is_not_the_models(tokenizer: Tokenizer) -> None:
    wrong = Grammars(tokenizer, 100, frozenset([1]))
    with pytest.raises(RequestError, match=r"of \d+ tokens, cannot be used with this model of 100 logits"):
        wrong.get(GuidedDecodingParams(regex="a")).result(30)
    with pytest.raises(RequestError, match="names none: add eos_token_id"):
        Grammars(tokenizer, WIDTH, frozenset()).get(GuidedDecodingParams(regex="a"))


def test_lines_come_with_sequences_and_change_no_mask(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_lines, "THREADS", 4)
    eos, rng = tokenizer.eos_token_id or 0, random.Random(3)
    key = GuidedDecodingParams(regex="(hello|abc d|12*|[a-e]{2,5} )+").key
    grammar, alone = grammars.compile(key), grammars.compile(key)
    guides = [grammar.start(frozenset([eos])) for _ in range(7)]
    taken: list[list[int]] = [[] for _ in guides]
    held = []
    for step in range(14):
        if step in (3, 12):  # one copy is early, one late
            guides.append(guides[step % 5].fork())
            taken.append(taken[step % 5].copy())
        found = allowed(guides)
        for guide, ids, choices in zip(guides, taken, found, strict=True):
            reference = alone.start(frozenset([eos]))
            for token in ids:
                reference.accept(token)
            assert allowed([reference]) == [choices], ids
            ids.append(rng.choice(sorted(choices - {eos})))
            guide.accept(ids[-1])
        if grammar._lines._coming is not None:
            grammar._lines._coming.result(30)
        held.append(len(grammar._lines))
    assert held[:4] == [1, 2, 4, 4] and held[-1] == 4 and len(alone._lines) == 1
    assert sorted(guide._line for guide in guides[:8]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert guides[8]._line == guides[2]._line


def test_without_more_lines_what_there_is_goes_on(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_lines, "THREADS", 4)
    eos = frozenset([tokenizer.eos_token_id or 0])
    own = Grammars(tokenizer, WIDTH, eos)
    key = GuidedDecodingParams(regex="[ab]{4}").key
    grammar, closed = own.compile(key), own.compile(key)
    own.close()
    guides = [closed.start(eos) for _ in range(4)]
    assert len({frozenset(choices) for choices in allowed(guides)}) == 1 and len(closed._lines) == 1
    broken: Future[list[object]] = Future()
    broken.set_exception(RuntimeError("no memory"))
    grammar._lines._more = lambda count: broken
    guides = [grammar.start(eos) for _ in range(4)]
    before = allowed(guides)
    assert allowed(guides) == before and len(grammar._lines) == 1


def test_a_sequence_that_cannot_move_stays(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_lines, "THREADS", 2)
    eos = frozenset([tokenizer.eos_token_id or 0])
    grammar = grammars.compile(GuidedDecodingParams(regex="[ab]{4}").key)
    grammar._lines._roots.append(grammars.compile(GuidedDecodingParams(regex="[12]{4}").key)._lines.copy(0))
    guides = [grammar.start(eos) for _ in range(2)]
    token = min(allowed(guides[:1])[0])
    for guide in guides:
        guide.accept(token)
    [stays, refused] = allowed(guides)
    assert stays == refused and stays and guides[1]._line == 0
