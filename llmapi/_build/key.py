"""Keys: what an artifact was made from, as named parts under one digest.

A key is an ordered list of named texts. The digest is SHA-256 over the parts, each framed by its length, so that no two
different lists of parts can give the same bytes. The parts themselves are kept, so a miss explains itself.

>>> old = Key.of(model="llama", limits={"max_batch_size": 8, "max_seq_len": 2048})
>>> new = Key.of(model="llama", limits={"max_seq_len": 2048, "max_batch_size": 16})
>>> str(old.diff(new)[0])
'limits.max_batch_size: 8 -> 16'
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import hashlib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmapi.errors import CacheError

KEY_SCHEMA = 1
"""Raise it whenever the meaning of a part, or of an artifact made under the same parts, changes."""

_MAGIC = b"llmapi-key\x00"
_PACKAGE = Path(__file__).resolve().parent.parent


def canonical(value: object) -> str:
    """One text for one JSON-like value: keys sorted, no spaces, so equal values give equal text.

    Args:
        value: None, bool, int, finite float, str, enum member, list or tuple, dict with str keys, or a dataclass of
            these. A tuple counts as a list; ``1`` and ``1.0`` differ.

    Raises:
        CacheError: the value has no canonical text (a set, an object, a NaN): it cannot be part of a key.

    >>> canonical({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: object, where: str) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value, where)
    if value is None or isinstance(value, bool):
        return value
    # Subclasses of int, float and str may print differently: reduce them to the plain type.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CacheError(f"{where} is {value}: a key takes finite numbers only; leave it out or give it as text")
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if type(name) is not str:
                raise CacheError(f"{where} has the dict key {name!r}: keys inside a cache key must be str")
        return {name: _plain(v, f"{where}.{name}") for name, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    raise CacheError(
        f"{where} is a {type(value).__name__}, which has no canonical text; "
        "give None, bool, int, float, str, list, dict or a dataclass of these, or bypass the cache"
    )


@dataclass(frozen=True, slots=True)
class Part:
    """One named text of a key."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class PartDiff:
    """One part in which two keys differ; ``None`` where a key has no such part. ``str()`` reads ``name: 8 -> 16``."""

    name: str
    before: str | None
    after: str | None

    def lines(self) -> list[str]:
        """The difference, one line for each leaf of a JSON value, long texts cut to what tells them apart."""
        before, after = _leaves(self.name, self.before), _leaves(self.name, self.after)
        names = dict.fromkeys([*before, *after])
        lines = [f"{n}: {_pair(before.get(n), after.get(n))}" for n in names if before.get(n) != after.get(n)]
        return lines or [f"{self.name}: {_pair(self.before, self.after)}"]  # "8" and 8 read alike as leaves

    def __str__(self) -> str:
        return "; ".join(self.lines())


def _leaves(name: str, text: str | None) -> dict[str, str]:
    """Flatten a JSON object to dotted names; any other text is one leaf."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {name: text}
    return dict(_walk(name, value))


def _walk(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _walk(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, str) else canonical(value)


def _pair(before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return f"{_short(before, 0)} -> {_short(after, 0)}"
    same, end = 0, min(len(before), len(after))
    while same < end:  # the length of what they share at the start, by halving: texts may be long
        middle = (same + end + 1) // 2
        if before.startswith(after[:middle]):
            same = middle
        else:
            end = middle - 1
    start = max(0, same - 12) if max(len(before), len(after)) > 60 and same > 24 else 0
    return f"{_short(before, start)} -> {_short(after, start)}"


def _short(text: str | None, start: int) -> str:
    if text is None:
        return "(absent)"
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:12]
    cut = text[start : start + 60]
    cut = ("..." if start else "") + cut + ("..." if start + 60 < len(text) else "")
    return cut.replace("\n", "\\n") or "(empty)"


@dataclass(frozen=True)
class Key:
    """An ordered list of parts with distinct names.

    Attributes:
        parts: the parts, in the order in which they are hashed.

    Raises:
        CacheError: a name is empty or occurs twice, or a value is not text.
    """

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable[Part]) -> None:
        object.__setattr__(self, "parts", tuple(parts))
        seen = set()
        for part in self.parts:
            if not isinstance(part.name, str) or not part.name or not isinstance(part.value, str):
                raise CacheError(f"part {part!r}: a key part needs a name and a text; see canonical() for other values")
            if part.name in seen:
                raise CacheError(f"part {part.name!r} occurs twice in a key; names must be distinct")
            seen.add(part.name)
            try:
                (part.name + part.value).encode("utf-8")
            except UnicodeEncodeError as error:
                raise CacheError(f"part {part.name!r} is not valid Unicode ({error}); it cannot be in a key") from None

    @classmethod
    def of(cls, **values: object) -> Key:
        """A key of JSON-like values, each through :func:`canonical`, in the order given."""
        return cls(Part(name, canonical(value)) for name, value in values.items())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the framed parts: 64 hex digits."""
        h = hashlib.sha256(_MAGIC + len(self.parts).to_bytes(8, "big"))
        for part in self.parts:
            for text in (part.name, part.value):
                data = text.encode("utf-8")
                h.update(len(data).to_bytes(8, "big"))
                h.update(data)
        return h.hexdigest()

    def diff(self, other: Key) -> list[PartDiff]:
        """The parts in which ``other`` differs from this key, in this key's order, then the parts only it has."""
        mine = {p.name: p.value for p in self.parts}
        theirs = {p.name: p.value for p in other.parts}
        names = dict.fromkeys([*mine, *theirs])
        return [PartDiff(n, mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)]

    def to_json(self) -> list[list[str]]:
        """The parts as ``[[name, value], ...]``."""
        return [[p.name, p.value] for p in self.parts]

    @classmethod
    def from_json(cls, data: object) -> Key:
        """The key that :meth:`to_json` wrote; CacheError where ``data`` has another shape."""
        if not isinstance(data, list) or not all(
            isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in data
        ):
            raise CacheError("a key must be a list of [name, text] pairs")
        return cls(Part(name, value) for name, value in data)


def source_digest(*files: Path) -> str:
    """SHA-256 over the names and contents of source files; a folder counts with every ``*.py``, ``*.cpp``, ``*.cu``,
    ``*.cuh`` and ``*.h`` below it. Names are taken relative to the package, so a moved installation keeps its digest.

    >>> len(source_digest(Path(__file__)))
    64
    """
    found = []
    for file in files:
        inside = [file]
        if file.is_dir():
            inside = sorted(f for f in file.rglob("*") if f.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"})
        if not inside:
            raise CacheError(f"{file} holds no source file; give files, or a folder with *.py, *.cpp, *.cu, *.cuh or *.h")
        found += inside
    parts: dict[str, str] = {}
    for path in found:
        full = path.resolve()
        name = full.relative_to(_PACKAGE).as_posix() if full.is_relative_to(_PACKAGE) else full.name
        digest = hashlib.sha256(full.read_bytes()).hexdigest()
        if parts.setdefault(name, digest) != digest:
            raise CacheError(f"two source files outside the package are both named {name!r}; give them apart")
    return Key(Part(name, digest) for name, digest in sorted(parts.items())).digest


def toolchain_parts() -> list[Part]:
    """The parts every artifact shares: the schema of keys and the torch build. Does not import torch.

    Left out on purpose: Python and the operating system (no artifact that these parts shape holds bytecode or native code
    of ours for the host, and the compiled CPU kernels have a key of their own; the graph text, which they could only
    change by way of torch.export, is a part of its own), llmapi's own version (the sources that shape an artifact are
    parts, so a release that changes none of them keeps its cache), and NVRTC, CUDA's driver and TensorRT (the backends
    that use them add them).
    """
    return [schema_part(), Part("torch", canonical(_torch_build()))]


def schema_part() -> Part:
    """The part that every key begins with: the version of the keys' own meaning."""
    return Part("key_schema", str(KEY_SCHEMA))


def _torch_build() -> dict[str, Any]:
    """Version, git commit and CUDA of the installed torch, read from its ``version.py`` without running it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {"version": "absent"}
    found: dict[str, Any] = {"version": importlib.metadata.version("torch")}
    version = Path(spec.origin).parent / "version.py"
    if version.is_file():
        for node in ast.parse(version.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                target = node.targets[0].id
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                target = node.target.id
            else:
                continue
            if target in {"cuda", "git_version", "hip", "xpu"} and isinstance(node.value, ast.Constant):
                found[target] = node.value.value
    return found
