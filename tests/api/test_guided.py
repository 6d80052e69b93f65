"""Guided decoding: what comes out parses, whatever the model would say, and nobody else notices."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llmapi import LLM, ConfigError, GuidedDecodingParams, RequestError, SamplingParams
from llmapi._runtime import grammar as grammar_module
from tests.api.test_smollm2 import gguf_file
from tests.api.truth import Truth, idle, prompts_of, until

llguidance = pytest.importorskip("llguidance", reason="the extra [guided] is not installed")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "d e"]}, "minItems": 1, "maxItems": 3},
        "deep": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"type": "boolean"}},
                                              "required": ["x"], "additionalProperties": False}]},
    },
    "required": ["name", "age", "tags", "deep"],
    "additionalProperties": False,
}  # fmt: skip
REGEX = r"([0-9]{3}-[0-9]{4}|[A-Fé]{2,5}( ja)?)!"
CHOICE = ["yes", "no", "yes, please", "ünïcode \U0001f600", 'a "quote"\\ and\nline']
GRAMMAR = 'root ::= expr\nexpr ::= term | "(" expr "+" term ")"\nterm ::= [0-9] | [0-9] term2\nterm2 ::= [0-9]'


def guided(max_tokens: int = 200, *, temperature: float = 1.0, seed: int | None = None, **kinds: Any) -> Any:
    options = {n: kinds.pop(n) for n in list(kinds) if n not in GuidedDecodingParams.__dataclass_fields__}
    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        guided_decoding=GuidedDecodingParams(**kinds),
        **options,
    )


def sums(text: str) -> bool:
    """Whether the text is one of ``GRAMMAR``, by a parser of the test's own."""
    while (found := re.sub(r"^(\(*)\((\d{1,2})\+(\d{1,2})\)", r"\g<1>7", text)) != text:
        text = found
    return re.fullmatch(r"\d{1,2}", text) is not None


def fits(text: str) -> bool:
    """Whether the text is JSON of ``SCHEMA``."""
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


KINDS = {
    "json": ({"json": SCHEMA, "disable_any_whitespace": True}, fits),
    "regex": ({"regex": REGEX}, lambda t: re.fullmatch(REGEX, t) is not None),
    "choice": ({"choice": CHOICE}, lambda t: t in CHOICE),
    "grammar": ({"grammar": GRAMMAR}, sums),
}  # fmt: skip


def test_the_checks_can_fail() -> None:
    good = {"name": "é", "age": 3, "tags": ["a"], "deep": None}
    assert KINDS["json"][1](json.dumps(good))
    with pytest.raises(jsonschema.ValidationError):
        KINDS["json"][1](json.dumps({**good, "age": 151}))
    assert sums("7") and sums("((1+2)+33)") and not sums("1+2") and not sums("(1+2)+3") and not sums("()")


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_random_texts_parse(llm: LLM, kind: str) -> None:
    """A random model says anything at all; here, only what the grammar allows."""
    kinds, check = KINDS[kind]
    prompts = prompts_of([1 + i % 9 for i in range(200)], seed=1)
    options = [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}]
    params = [
        guided(temperature=[0.0, 1.0, 4.0][i % 3], seed=i, **options[i % 5], **kinds) for i in range(len(prompts))
    ]
    outputs = [o.outputs[0] for o in llm.generate(prompts, params)]
    done = [o for o in outputs if o.finish_reason == "stop"]
    for output in done:
        assert check(output.text), output.text
    assert len({o.text for o in done}) >= min(4, len(done))
    # a sum in parentheses may go on for ever, and one that repeats itself does not end
    assert len(done) == len(outputs) or (kind == "grammar" and len(done) > 100)
    until(lambda: idle(llm))


def test_any_json_object(llm: LLM) -> None:
    outputs = llm.generate(prompts_of([3] * 60, seed=2), guided(300, json_object=True, disable_any_whitespace=True))
    ended = [o.text for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert len(ended) > 5 and all(isinstance(json.loads(t), dict) for t in ended)


def test_company_does_not_notice(llm: LLM, truth: Truth) -> None:
    """Free and guided requests in one batch: each has the text that it has alone."""
    prompts = prompts_of([5, 9, 14, 3, 8, 8], seed=3)
    free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    params = [free, guided(seed=1, **KINDS["json"][0]), SamplingParams(max_tokens=40, seed=2, ignore_eos=True)]
    params += [guided(seed=3, **KINDS["regex"][0]), free, guided(temperature=0, **KINDS["choice"][0])]
    together = [o.outputs[0] for o in llm.generate(prompts, params)]
    alone = [llm.generate(p, s).outputs[0] for p, s in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    for i in (0, 4):
        assert together[i].token_ids == truth.greedy(prompts[i], 40)


def test_greedy_takes_the_most_probable_allowed_token(llm: LLM, truth: Truth) -> None:
    """Log probabilities are the model's own, of all tokens."""
    [prompt] = prompts_of([12], seed=4)
    done = llm.generate(prompt, guided(temperature=0, regex="[a-f]{8}", logprobs=2)).outputs[0]
    exact = truth.logprobs(prompt + done.token_ids)[11:]
    letters = {int(t) for t in range(300) if re.fullmatch("[a-f]+", llm.tokenizer.decode([t]))}
    assert done.logprobs is not None
    length = 0
    for row, token, told in zip(exact, done.token_ids, done.logprobs, strict=False):
        allowed = [t for t in letters if length + len(llm.tokenizer.decode([t])) <= 8]
        assert token == max(allowed, key=lambda t: row[t].item())
        assert told[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert row.argmax().item() in told and len(told) >= 2
        length += len(llm.tokenizer.decode([token]))
    assert len(done.text) == 8


def test_samples_of_one_prompt_follow_their_own_way(llm: LLM) -> None:
    output = llm.generate("hello", guided(n=24, seed=5, **KINDS["json"][0]))
    assert len({o.text for o in output.outputs}) == 24
    for one in output.outputs:
        assert one.finish_reason == "stop" and KINDS["json"][1](one.text)
    until(lambda: idle(llm))


def test_preemption_loses_no_state(checkpoint: Path, cache: Path) -> None:
    prompts = prompts_of([24] * 5, seed=6)
    params = [guided(90, seed=i, regex="([a-z]{5} ){12}") for i in range(5)]
    texts = []
    for blocks in (200, 16):
        kv = {"max_tokens": blocks * 8, "block_size": 8}
        with LLM(checkpoint, cache_dir=cache, kv_cache_config=kv, max_batch_size=8) as llm:
            outputs = llm.generate(prompts, params)
            lost = sum(o.metrics.preemptions for o in outputs if o.metrics)
            assert (lost > 0) == (blocks == 16)
            texts.append([o.text for o in outputs])
    assert texts[0] == texts[1] and all(re.fullmatch("([a-z]{5} ){12}", t) for t in texts[0])


# ---- the end


def test_the_end_is_allowed_where_the_grammar_allows_it(llm: LLM) -> None:
    eos = llm.tokenizer.eos_token_id
    bias = {eos: 100.0}
    for regex, text in (("a{3,}", "aaa"), ("b", "b"), ("(c{2})+", "cc"), ("(d{4})?", "")):
        done = llm.generate("hello", guided(regex=regex, logit_bias=bias)).outputs[0]
        assert (done.text, done.finish_reason, done.stop_reason) == (text, "stop", None)
        # what can only end needs no end token
        assert (eos in done.token_ids) == (regex != "b")
    done = llm.generate("hello", guided(regex="a*", logit_bias=bias, min_tokens=4)).outputs[0]
    assert len(done.token_ids) == 5 and re.fullmatch("a+", done.text)
    done = llm.generate("hello", guided(regex="ab", logit_bias=bias, min_tokens=50)).outputs[0]
    assert done.text == "ab"  # the grammar has no more


def test_ignore_eos_and_other_end_tokens(llm: LLM) -> None:
    eos, bias = llm.tokenizer.eos_token_id, {llm.tokenizer.eos_token_id: 100.0}
    done = llm.generate("hello", guided(20, regex="a*", logit_bias=bias, ignore_eos=True)).outputs[0]
    assert done.finish_reason == "length" and set(done.text) == {"a"}
    done = llm.generate("hello", guided(regex="a?", logit_bias=bias, ignore_eos=True)).outputs[0]
    assert done.text == "a"  # the only thing that is left
    other = llm.tokenizer.convert_tokens_to_ids("<|user|>")
    assert other not in (None, eos)
    for regex, text in (("a{3,}", "aaa"), ("(d{4})?", "")):
        params = guided(regex=regex, logit_bias={other: 100.0}, stop_token_ids=[other])
        done = llm.generate("hello", params).outputs[0]
        assert (done.text, done.stop_reason) == (text, other)


def test_stop_texts_end_it_earlier(llm: LLM) -> None:
    done = llm.generate("hello", guided(regex="abcdef", stop=["d"])).outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("abc", "stop", "d")
    done = llm.generate("hello", guided(regex="abcdef", stop=["f"])).outputs[0]
    assert (done.text, done.stop_reason) == ("abcde", "f")


def test_max_tokens_cut_it(llm: LLM) -> None:
    done = llm.generate("hello", guided(3, regex="[a-z]{40}")).outputs[0]
    assert done.finish_reason == "length" and re.fullmatch("[a-z]{3,39}", done.text)


def test_processors_and_bad_words_come_on_top(llm: LLM) -> None:
    def only_b(output: list[int], logits: Any) -> Any:
        logits[:] = -20
        logits[llm.tokenizer("b")["input_ids"][0]] = 20
        return logits

    done = llm.generate("hello", guided(temperature=0, regex="[ab]{5}", logits_processors=[only_b], return_logits=True))
    assert done.text == "bbbbb"
    assert done.outputs[0].logits is not None and done.outputs[0].logits.isfinite().all()  # raw ones
    banned = ["a", "c", "ac", "ca"]
    assert llm.generate("hello", guided(regex="[a-c]{3}", bad_words=banned, temperature=9.0)).text == "bbb"
    with pytest.raises(RequestError, match="no token is left of 300: logits_processors, guided_decoding"):
        llm.generate("hello", guided(regex="a", bad_words=["a"]))


# ---- compiling


def test_a_slow_grammar_stalls_nobody(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others begin and end while it is compiled; an abort does not wait for it, either."""
    begun, go = threading.Event(), threading.Event()
    compile_ = grammar_module.Grammars.compile

    def slow(self: Any, key: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return compile_(self, key)

    monkeypatch.setattr(grammar_module.Grammars, "compile", slow)
    events: list[str] = []
    held = llm.generate_async("hello", guided(regex="slow1"))
    aborted = llm.generate_async("hello", guided(regex="slow2"))
    assert begun.wait(60)
    for i in range(3):
        llm.generate("hello", SamplingParams(max_tokens=5, ignore_eos=True))
        events.append(f"free {i}")
    aborted.abort()
    assert aborted.result(60).outputs[0].finish_reason == "abort"
    assert not held.done()
    events.append("opened")
    go.set()
    assert held.result(60).text == "slow1"
    events.append("guided")
    assert events == ["free 0", "free 1", "free 2", "opened", "guided"]
    until(lambda: idle(llm))


def test_a_grammar_is_compiled_once_and_few_are_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_ = grammar_module.Grammars.compile
    monkeypatch.setattr(grammar_module.Grammars, "compile", lambda s, key: compiled.append(key) or compile_(s, key))
    monkeypatch.setattr(grammar_module, "_MOST", 3)
    llm._maker.grammars._kept.clear()  # type: ignore[union-attr]
    texts = {o.text for o in llm.generate(["hello"] * 6, guided(regex="once[0-9]"))}
    assert len(compiled) == 1 and all(re.fullmatch("once[0-9]", t) for t in texts)
    for i in range(5):
        assert llm.generate("hello", guided(regex=f"r{i}")).text == f"r{i}"
    assert len(llm._maker.grammars._kept) == 3  # type: ignore[union-attr]
    llm.generate("hello", guided(regex="r4"))
    assert len(compiled) == 6
    llm.generate("hello", guided(regex="r0"))
    assert len(compiled) == 7


def test_close_while_a_grammar_is_compiled(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    monkeypatch.setattr(grammar_module.Grammars, "compile", lambda *a: begun.set() or go.wait(60))
    llm = LLM(checkpoint, cache_dir=cache, kv_cache_config={"max_tokens": 256})
    futures = [llm.generate_async("hello", guided(regex=f"{i}")) for i in range(4)]
    assert begun.wait(60)
    llm.close()
    assert [f.result(60).outputs[0].finish_reason for f in futures] == ["abort"] * 4
    go.set()


# ---- what is refused


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"regex": "[a-"}, r"regex cannot be used: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "objekt"}}, "json cannot be used: Invalid type: objekt"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 1}}, "Unsatisfiable schema"),
        ({"grammar": 'root ::= "a" | b'}, "Rule 'b' not found"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "hello"}, "Expected ::="),
    ],
)
def test_what_is_wrong_with_a_grammar(llm: LLM, kinds: dict[str, Any], message: str) -> None:
    for _ in range(2):  # compiled, and remembered
        with pytest.raises(RequestError, match=f"(?s)guided_decoding: this .*{message}"):
            llm.generate("hello", guided(**kinds))
    outputs = llm.generate(["hello", "hello"], [guided(**kinds), guided(regex="fine")])
    assert outputs[1].text == "fine" and isinstance(outputs[0].error, RequestError)
    until(lambda: idle(llm))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, "with nothing: give exactly one of json, regex, choice, grammar, json_object"),
        ({"regex": "a", "choice": ["b"]}, "with regex and choice: give exactly one"),
        ({"choice": []}, "give a list of at least one text"),
        ({"choice": "yes"}, "give a list of at least one text"),
        ({"choice": ["a", ""]}, "texts of at least one character"),
        ({"regex": 7}, "regex=7: give a text"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": [1]}, "give a schema as a dict"),
        ({"json": {"a": {1, 2}}}, "cannot be written as JSON"),
        ({"json_object": 1}, "json_object=1: give True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, "options of whitespace are for JSON, not for regex"),
        ({"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "}, "exclude each other"),
        ({"structural_tag": "x"}, "unknown GuidedDecodingParams argument 'structural_tag'"),
        ({"regx": "x"}, "did you mean 'regex'"),
        ({"choice": ["a", "\ud800"]}, "^guided_decoding: choice is not valid Unicode"),
        ({"regex": "\ud800"}, "^guided_decoding: regex is not valid Unicode"),
        ({"grammar": 'root ::= "\ud800"'}, "^guided_decoding: grammar is not valid Unicode"),
        ({"json": {"const": "\ud800"}}, "^guided_decoding: json is not valid Unicode"),
        ({"json": '{"const": "\\ud800"}'}, "^guided_decoding: json is not valid Unicode"),
        ({"json_object": True, "whitespace_pattern": "\ud800"}, "^guided_decoding: whitespace_pattern is not valid"),
    ],
)
def test_what_cannot_be_a_grammar(kinds: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GuidedDecodingParams(**kinds)


def test_names_and_forms_of_the_params() -> None:
    same = GuidedDecodingParams(regex="a")
    assert SamplingParams(guided_decoding={"regex": "a"}).guided_decoding == same
    renamed = SamplingParams(structured_outputs=same)
    assert renamed.guided_decoding == same and renamed.structured_outputs is None
    with pytest.raises(ConfigError, match="two names of one thing"):
        SamplingParams(structured_outputs=same, guided_decoding=same)
    with pytest.raises(ConfigError, match="give a GuidedDecodingParams, or a dict"):
        SamplingParams(guided_decoding="a+")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="keyword arguments only"):
        GuidedDecodingParams("a+")

    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    texts = [GuidedDecodingParams(json=j).key for j in ({"type": "object"}, '{"type":"object"}', Model)]
    assert texts[0] == texts[1] == texts[2]


def test_without_what_it_needs(checkpoint: Path, cache: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LLM(checkpoint, cache_dir=cache, skip_tokenizer_init=True, kv_cache_config={"max_tokens": 256}) as bare,
        pytest.raises(RequestError, match="needs a tokenizer, and this LLM was made with skip_tokenizer_init"),
    ):
        bare.generate([5], guided(regex="a"))
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"needs the package llguidance, which is missing: pip install"):
        llm.generate("hello", guided(regex="missing"))


def test_smollm2_gives_sensible_json(tmp_path: Path) -> None:
    """A real model, with its vocabulary of 49,152 tokens: JSON that fits, and says what is asked."""
    schema = {
        "type": "object",
        "properties": {"country": {"type": "string", "maxLength": 20}, "capital": {"type": "string", "maxLength": 20}},
        "required": ["country", "capital"],
        "additionalProperties": False,
    }
    capitals = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid"}
    examples = [{"country": "Japan", "capital": "Tokyo"}, {"country": "Egypt", "capital": "Cairo"}]
    before = "\n".join(["Countries as JSON:", *map(json.dumps, examples)])
    prompts = [f"{before}\n{country}:\n" for country in capitals]
    free = SamplingParams(temperature=0, max_tokens=20)
    with LLM(gguf_file(), cache_dir=tmp_path, kv_cache_config={"max_tokens": 2048}, max_seq_len=512) as llm:
        kinds: dict[str, Any] = {"json": schema, "whitespace_pattern": " ?"}
        params = [guided(60, temperature=0, **kinds)] * 4 + [guided(60, seed=1, n=8, temperature=2.0, **kinds), free]
        *outputs, wild, beside = llm.generate([*prompts, prompts[0], "Once upon a time"], params)
        alone = llm.generate("Once upon a time", free)
    assert {a["country"]: a["capital"] for a in (json.loads(o.text) for o in outputs)} == capitals
    for one in wild.outputs:  # so hot that anything comes, and it fits
        if one.finish_reason == "stop":
            jsonschema.validate(json.loads(one.text), schema)
    assert sum(one.finish_reason == "stop" for one in wild.outputs) >= 4
    assert beside.text == alone.text


# ---- beams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_every_beam_fits(llm: LLM, kind: str, width: int) -> None:
    kinds, check = KINDS[kind]
    prompts = prompts_of([1 + i % 9 for i in range(12)], seed=21)
    params = guided(60, use_beam_search=True, beam_width=width, n=width, **kinds)
    free = SamplingParams(temperature=0, max_tokens=20)
    outputs = llm.generate([*prompts, prompts[0]], [params] * len(prompts) + [free])
    ended = [one for o in outputs[:-1] for one in o.outputs if one.finish_reason == "stop"]
    assert len(ended) >= len(prompts) // 2
    for one in ended:
        assert check(one.text), one.text
    for output in outputs[:-1]:
        assert len({one.text for one in output.outputs}) == len(output.outputs)
    assert outputs[-1].text == llm.generate(prompts[0], free).text
    until(lambda: idle(llm))


def test_beams_find_the_most_probable_text(llm: LLM, truth: Truth) -> None:
    """A search as wide as the grammar has texts finds the best of all of them."""
    texts = ["ab", "ba", "aab", "bb"]
    for prompt in prompts_of([4, 9, 14], seed=22):
        params = guided(use_beam_search=True, beam_width=8, n=4, length_penalty=0.0, choice=texts)
        found = [(o.text, o.score) for o in llm.generate(prompt, params).outputs]
        assert sorted(t for t, _ in found) == sorted(texts)
        for one, (_, score) in zip(llm.generate(prompt, params).outputs, found, strict=True):
            exact = truth.logprobs(prompt + one.token_ids)[len(prompt) - 1 : -1]
            total = sum(row[t].item() for row, t in zip(exact, one.token_ids, strict=True))
            assert score == pytest.approx(total, abs=1e-3)
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
