"""BuildReport: what a start did, phase by phase; a table in a terminal and in a notebook."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Phase:
    """One phase of a start.

    Attributes:
        name: fetch, tokenizer, convert, export, build, kernels or load.
        seconds: how long it took.
        nbytes: bytes read or written, where that is what it does.
        note: what happened, e.g. ``cache hit``.
    """

    name: str
    seconds: float = 0.0
    nbytes: int = 0
    note: str = ""


@dataclass(slots=True)
class BuildReport:
    """What starting an LLM did.

    Attributes:
        model: as the user named it.
        phases: in order.
        keys: digest of each artifact that was used, by kind.
        hashed_bytes: bytes of the model's files that were read to know their digests; 0 where they are remembered.
        cache: the cache's own account, a line for each hit and miss with the reason.
    """

    model: str
    phases: list[Phase] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    hashed_bytes: int = 0
    cache: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase and add it to the report."""
        phase = Phase(name)
        start = time.perf_counter()
        try:
            yield phase
        finally:
            phase.seconds = time.perf_counter() - start
            self.phases.append(phase)

    @property
    def seconds(self) -> float:
        """Seconds of all phases together."""
        return sum(p.seconds for p in self.phases)

    @property
    def cached(self) -> bool:
        """Whether nothing had to be converted or built."""
        return not any(p.note == "built" for p in self.phases)

    def __str__(self) -> str:
        rows = [f"{'phase':<10} {'seconds':>8} {'MB':>8}  note"]
        for p in self.phases:
            rows.append(f"{p.name:<10} {p.seconds:>8.2f} {_megabytes(p):>8}  {p.note}".rstrip())
        rows.append(f"{'total':<10} {self.seconds:>8.2f}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(p.name)}</td><td>{p.seconds:.2f}</td><td>{_megabytes(p)}</td>"
            f"<td>{html.escape(p.note)}</td></tr>"
            for p in self.phases
        )
        head = "<tr><th>phase</th><th>seconds</th><th>MB</th><th>note</th></tr>"
        return f"<table><caption>{html.escape(self.model)}: {self.seconds:.2f} s</caption>{head}{cells}</table>"


def _megabytes(phase: Phase) -> str:
    return f"{phase.nbytes / 1e6:.1f}" if phase.nbytes else ""
