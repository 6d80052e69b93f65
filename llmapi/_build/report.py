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
        name: import, fetch, tokenizer, digest, convert, export, build, plan, kernels, tune or load.
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
        hub_calls: calls of the hub's client that may have used the network; 0 where the model is complete on this disk.
        hashed_bytes: bytes of the model's files that were read to know their digests; 0 where they are remembered.
        checked_bytes: bytes of the cache's entries that were hashed to check them: small files, and larger ones that
            were written to since they were built.
        conversions: tensors converted.
        exports: calls of ``torch.export``.
        cache: the cache's own account, a line for each hit and miss with the reason.
    """

    model: str
    phases: list[Phase] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    hub_calls: int = 0
    hashed_bytes: int = 0
    checked_bytes: int = 0
    conversions: int = 0
    exports: int = 0
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

    @property
    def counters(self) -> dict[str, int]:
        """What a warm start does none of, or little: the counts, by name."""
        names = ("hub_calls", "hashed_bytes", "checked_bytes", "conversions", "exports")
        return {name: getattr(self, name) for name in names}

    @property
    def line(self) -> str:
        """The start in one line: a hit with what was found, or a miss with every reason."""
        misses = [line.removeprefix("miss: ") for line in self.cache if line.startswith("miss: ")]
        if misses:
            return f"{self.model}: cache miss: {'; '.join(misses)}"
        found = ", ".join(f"{kind} {digest[:12]}" for kind, digest in self.keys.items())
        return f"{self.model}: cache hit: {found or 'nothing was needed'}"

    def __str__(self) -> str:
        rows = [f"{'phase':<10} {'seconds':>8} {'MB':>8}  note"]
        for p in self.phases:
            rows.append(f"{p.name:<10} {p.seconds:>8.2f} {_megabytes(p):>8}  {p.note}".rstrip())
        rows.append(f"{'total':<10} {self.seconds:>8.2f}")
        rows.append(", ".join(f"{name} {count}" for name, count in self.counters.items()))
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(p.name)}</td><td>{p.seconds:.2f}</td><td>{_megabytes(p)}</td>"
            f"<td>{html.escape(p.note)}</td></tr>"
            for p in self.phases
        )
        counts = ", ".join(f"{name} {count}" for name, count in self.counters.items())
        cells += f"<tr><td colspan='4'>{counts}</td></tr>"
        head = "<tr><th>phase</th><th>seconds</th><th>MB</th><th>note</th></tr>"
        return f"<table><caption>{html.escape(self.model)}: {self.seconds:.2f} s</caption>{head}{cells}</table>"


def _megabytes(phase: Phase) -> str:
    return f"{phase.nbytes / 1e6:.1f}" if phase.nbytes else ""
