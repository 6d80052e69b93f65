"""Stop texts: found wherever tokens cut them, never shown in part, independent of the cutting."""

import random

import pytest

from llmapi._runtime.stop import StopChecker


def expected(text: str, stops: list[str], include: bool, allowed_from: int = 0) -> tuple[str, str | None]:
    """By definition: the first end position at which some stop text is complete; the longest of those."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stops if end > allowed_from and text[:end].endswith(s)]
        if ended:
            stop = max(ended, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool, min_tokens: int = 0) -> tuple[str, str | None, str]:
    checker = StopChecker(stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    shown = ""
    for n, piece in enumerate(pieces, 1):
        shown += checker.push(piece, n)
        assert shown == checker.text
        if checker.matched is not None:
            break
    shown += checker.finish("", len(pieces))
    return checker.text, checker.matched, shown


@pytest.mark.parametrize("include", [False, True])
def test_random_cuts(include: bool) -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(4000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(0, 14)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(2, 6))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.randrange(0, len(text) + 1) for _ in range(rng.randrange(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        final, matched, shown = run(pieces, stops, include)
        assert (final, matched) == expected(text, stops, include), (pieces, stops)
        assert shown == final  # nothing shown was taken back
        hits += matched is not None
    assert 500 < hits < 3900


def test_random_min_tokens() -> None:
    rng = random.Random(1)
    late = 0
    for _ in range(4000):
        pieces = ["".join(rng.choice("ab") for _ in range(rng.randrange(0, 4))) for _ in range(6)]
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 4))) for _ in range(2)]
        minimum = rng.randrange(0, 6)
        allowed_from = len("".join(pieces[: max(0, minimum - 1)]))
        final, matched, shown = run(pieces, stops, False, minimum)
        want, stop = expected("".join(pieces), stops, True, allowed_from)
        assert matched == stop
        assert final == shown == (want.removesuffix(stop) if stop else want)
        late += stop is not None and expected("".join(pieces), stops, True)[0] != want
    assert late > 100


def test_never_shows_a_part() -> None:
    checker = StopChecker(["</answer>", "\n\nUser:"])
    pieces = ["4", "2<", "/ans", "wer", " key\n", "\nUs", "er", ":", " more"]
    shown = [checker.push(text, i) for i, text in enumerate(pieces, 1)]
    assert shown == ["4", "2", "", "", "</answer key", "", "", "", ""]
    assert checker.matched == "\n\nUser:"
    assert checker.text == "42</answer key"


def test_first_complete_wins_whatever_the_order() -> None:
    for stops in (["abcd", "bc"], ["bc", "abcd"]):
        assert run(["xabcd"], stops, False)[:2] == ("xa", "bc")
        assert run(list("xabcd"), stops, False)[:2] == ("xa", "bc")
    for stops in (["abc", "bc"], ["bc", "abc"]):
        assert run(["xabc"], stops, False)[:2] == ("x", "abc")


def test_held_text_is_shown_at_the_end() -> None:
    checker = StopChecker(["STOP"])
    assert checker.push("go STO", 1) == "go "
    assert checker.text == "go "
    assert checker.finish() == "STO"
    assert checker.text == "go STO" and checker.matched is None


def test_flushed_text_may_complete_a_stop() -> None:
    checker = StopChecker(["�"])
    assert checker.push("a", 1) == "a"
    assert checker.finish("�", 2) == ""
    assert (checker.text, checker.matched) == ("a", "�")


def test_include_holds_nothing_back() -> None:
    checker = StopChecker(["END"], include_stop_str_in_output=True)
    assert [checker.push(t, i) for i, t in enumerate(["xE", "N", "Dy"])] == ["xE", "N", "D"]
    assert checker.text == "xEND"


def test_min_tokens_lets_an_earlier_one_pass() -> None:
    checker = StopChecker(["."], min_tokens=3)
    assert [checker.push(t, i) for i, t in enumerate(["A.", " B.", " C.", "D"], 1)] == ["A.", " B.", " C", ""]
    assert checker.matched == "."


def test_no_stop_texts_pass_everything() -> None:
    checker = StopChecker()
    assert checker.push("a", 1) + checker.push("", 2) + checker.push("b", 3) + checker.finish("c", 3) == "abc"
    assert checker.text == "abc"


def test_fork_goes_on_alone() -> None:
    checker = StopChecker(["##"])
    checker.push("a#", 1)
    other = checker.fork()
    assert other.push("b", 2) == "#b" and other.text == "a#b"
    assert checker.push("#", 2) == "" and checker.matched == "##" and checker.text == "a"
    assert other.matched is None
