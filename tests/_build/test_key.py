"""Keys: framing, canonical text, differences, and what the shared parts depend on."""

import dataclasses
import enum
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmapi._build import key as key_module
from llmapi._build.key import Key, Part, canonical, source_digest, toolchain_parts
from llmapi.errors import CacheError

text = st.text(st.characters(codec="utf-8"), max_size=6)
part_lists = st.lists(st.tuples(text.filter(bool), text), max_size=4, unique_by=lambda p: p[0])


def make(pairs):
    return Key(Part(n, v) for n, v in pairs)


@settings(max_examples=200, deadline=None)
@given(part_lists, part_lists)
def test_digest_equal_exactly_when_parts_are(a, b):
    assert (make(a).digest == make(b).digest) == (a == b)


def test_part_boundaries_cannot_move():
    keys = [
        make([("ab", "c")]),
        make([("a", "bc")]),
        make([("a", "b"), ("c", "")]),
        make([("a", ""), ("b", "c")]),
        make([("a", "b\x00c")]),
        make([("a", "b"), ("c", "d")]),
        make([("c", "d"), ("a", "b")]),
        make([]),
    ]
    assert len({k.digest for k in keys}) == len(keys)


def test_digest_is_stable_between_releases():
    """Written down: a change of framing would lose every user's cache, so it must be deliberate."""
    key = Key.of(model="llama", limits={"b": 1, "a": [1.5, None, True]})
    assert key.digest == "e0e9e227473734f2796d3e108f2435cf98d95493da68bd7bc29160eadec83c51"


def test_canonical_ignores_what_must_not_matter():
    forward = dict(itertools.chain([("a", 1), ("b", {"x": 1, "y": 2})]))
    backward = {"b": {"y": 2, "x": 1}, "a": 1}
    assert canonical(forward) == canonical(backward)
    assert canonical((1, 2)) == canonical([1, 2])
    assert canonical({"a": "é"}) == '{"a":"é"}'


def test_canonical_keeps_types_apart():
    values = [1, 1.0, True, "1", None, "null", [], {}, [1], "", 0, -0.0]
    assert len({canonical(v) for v in values}) == len(values)


def test_canonical_takes_enums_and_dataclasses():
    class Color(enum.StrEnum):
        RED = "red"

    @dataclasses.dataclass
    class Spec:
        width: int
        color: Color

    assert canonical(Spec(3, Color.RED)) == '{"color":"red","width":3}'


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", math.nan, math.inf, {1: 2}, [1, {"a": object()}], int])
def test_canonical_refuses_what_has_no_text(value):
    with pytest.raises(CacheError):
        canonical(value)


def test_names_are_distinct_and_texts_valid():
    with pytest.raises(CacheError, match="twice"):
        make([("a", "1"), ("a", "2")])
    with pytest.raises(CacheError, match="name"):
        make([("", "1")])
    with pytest.raises(CacheError, match="name"):
        Key([Part("a", 1)])
    with pytest.raises(CacheError, match="Unicode"):
        make([("a", "\udcff")])


def test_diff_reads():
    old = Key.of(a=8, b={"x": 1, "y": {"z": [1]}}, c="same", gone=1)
    new = Key.of(a=16, b={"x": 1, "y": {"z": [2]}}, c="same", more="new")
    assert [str(d) for d in old.diff(new)] == [
        "a: 8 -> 16",
        "b.y.z: [1] -> [2]",
        "gone: 1 -> (absent)",
        "more: (absent) -> new",
    ]
    assert old.diff(old) == []
    assert [d.name for d in new.diff(old)] == ["a", "b", "more", "gone"]


def test_diff_of_long_texts_is_short_and_shows_the_place():
    before, after = "x" * 500 + "one" + "y" * 500, "x" * 500 + "two" + "y" * 500
    line = str(make([("graph", before)]).diff(make([("graph", after)]))[0])
    assert "one" in line and "two" in line and len(line) < 200
    digests = make([("weights", "a" * 64)]).diff(make([("weights", "b" * 64)]))
    assert str(digests[0]) == f"weights: {'a' * 12} -> {'b' * 12}"
    assert str(Key.of(a="8").diff(Key.of(a=8))[0]) != ""


@settings(max_examples=50, deadline=None)
@given(part_lists)
def test_json_round_trip(pairs):
    key = make(pairs)
    assert Key.from_json(key.to_json()) == key


@pytest.mark.parametrize("data", [None, {}, [["a"]], [["a", 1]], [["a", "b", "c"]], "ab", [["a", "1"], ["a", "2"]]])
def test_from_json_refuses_other_shapes(data):
    with pytest.raises(CacheError):
        Key.from_json(data)


def test_source_digest_follows_content_and_name_but_not_place(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "k.cu").write_text("kernel")
    base = source_digest(one / "k.cu")
    assert source_digest(two / "k.cu") == base
    (two / "k.cu").write_text("kernel2")
    assert source_digest(two / "k.cu") != base
    (one / "l.cu").write_text("kernel")
    assert source_digest(one / "l.cu") != base
    assert source_digest(one) == source_digest(one / "l.cu", one / "k.cu") != base
    with pytest.raises(CacheError, match="no source file"):
        (tmp_path / "empty").mkdir()
        source_digest(tmp_path / "empty")


def test_toolchain_parts_name_the_torch_build(monkeypatch):
    torch = pytest.importorskip("torch")
    base = Key(toolchain_parts())
    assert torch.__version__.split("+")[0] in base.parts[1].value and torch.version.git_version in base.parts[1].value
    monkeypatch.setattr(key_module.importlib.metadata, "version", lambda name: "9.9")
    assert "torch.version" in str(base.diff(Key(toolchain_parts()))[0])
    monkeypatch.undo()
    monkeypatch.setattr(key_module, "KEY_SCHEMA", 99)
    assert [d.name for d in base.diff(Key(toolchain_parts()))] == ["key_schema"]


def test_import_is_cheap_and_digests_do_not_depend_on_the_process():
    code = (
        "import sys; from llmapi._build.key import Key, toolchain_parts; from llmapi._build.store import Store; "
        "print(Key([*toolchain_parts()]).digest, Key.of(a={'x': 1, 'y': 2}).digest, 'torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "HOME": f"/nowhere/{seed}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and seen.pop().split()[-1] == "False"
