"""Compiling: units are compiled once, ahead of time and side by side, and nobody waits behind what has not begun."""

from __future__ import annotations

import threading

import pytest

from llmapi._kernels.compiling import Compiling
from llmapi._kernels.nvrtc import Unit
from llmapi.errors import BuildError

A, B, C, D = (Unit.of(f"{name}.cu") for name in "abcd")


class Compiler:
    """Waits at each unit until it is let go."""

    def __init__(self, *held: Unit) -> None:
        self.gates = {unit: threading.Event() for unit in held}
        self.begun = {unit: threading.Event() for unit in (A, B, C, D)}
        self.calls: list[Unit] = []

    def __call__(self, unit: Unit) -> bytes:
        self.calls.append(unit)
        self.begun[unit].set()
        if unit in self.gates:
            assert self.gates[unit].wait(20)
        if unit == D:
            raise BuildError("d.cu does not compile")
        return unit.source.encode()


def test_what_was_begun_is_compiled_once() -> None:
    compiler = Compiler()
    compiling = Compiling(compiler)
    futures = compiling.begin([A, B, A])
    again = compiling.begin([B, C])
    assert [f.result(20) for f in [*futures, *again]] == [b"a.cu", b"b.cu", b"b.cu", b"c.cu"]
    assert [compiling.take(unit) for unit in (A, B, C)] == [b"a.cu", b"b.cu", b"c.cu"]
    assert sorted(u.source for u in compiler.calls) == ["a.cu", "b.cu", "c.cu"]


def test_units_are_compiled_side_by_side() -> None:
    compiler = Compiler(A, B)
    compiling = Compiling(compiler)
    first, second = compiling.begin([A, B], threads=2)
    assert compiler.begun[A].wait(20) and compiler.begun[B].wait(20)
    compiler.gates[B].set()
    assert second.result(20) == b"b.cu" and not first.done()
    compiler.gates[A].set()
    assert compiling.take(A) == b"a.cu"


def test_what_nobody_has_begun_is_compiled_by_who_needs_it() -> None:
    compiler = Compiler(A)
    compiling = Compiling(compiler)
    compiling.begin([A, B, C], threads=1)
    assert compiler.begun[A].wait(20)
    assert compiling.take(C) == b"c.cu"  # does not wait behind A and B
    compiler.gates[A].set()
    assert compiling.take(B) == b"b.cu" and compiling.take(A) == b"a.cu"
    assert sorted(u.source for u in compiler.calls) == ["a.cu", "b.cu", "c.cu"]


def test_an_error_comes_to_who_asks() -> None:
    compiling = Compiling(Compiler())
    good, bad = compiling.begin([A, D])
    assert good.result(20) == b"a.cu"
    with pytest.raises(BuildError, match=r"d\.cu does not compile"):
        bad.result(20)
    with pytest.raises(BuildError, match=r"d\.cu does not compile"):
        compiling.take(D)


def test_after_close_nothing_begins() -> None:
    compiler = Compiler(A)
    compiling = Compiling(compiler)
    compiling.begin([A, B], threads=1)
    assert compiler.begun[A].wait(20)
    compiling.close()
    compiler.gates[A].set()
    assert compiling.take(A) == b"a.cu"
    assert not compiler.begun[B].wait(0.05)
