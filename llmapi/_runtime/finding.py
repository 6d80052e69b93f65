"""Finding: what a start would find of one artifact in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from llmapi._build.key import Key, PartDiff
from llmapi._build.store import EntryInfo, Manifest, Store


@dataclass(frozen=True)
class Finding:
    """What a start would find of one artifact.

    Attributes:
        kind: of the artifact.
        key: of the artifact; None where it cannot be known yet, or is that of several; ``note`` says why.
        found: whether it is there; None where a start would neither look for it nor make it.
        entry: the cache's entry; None for a miss, and for what a saved engine holds itself.
        nearest: for a miss, the entry with the fewest parts that differ, and the differences from it.
        note: what else there is to say.
    """

    kind: str
    key: Key | None
    found: bool | None = False
    entry: EntryInfo | None = None
    nearest: tuple[Manifest, list[PartDiff]] | None = None
    note: str = ""


def look(store: Store, kind: str, key: Key) -> Finding:
    """Look for an artifact.

    Args:
        store: the cache.
        kind, key: of the artifact.
    """
    entry = next((e for e in store.entries() if (e.kind, e.digest) == (kind, key.digest)), None)
    if entry is not None:
        return Finding(kind, key, found=True, entry=entry)
    return Finding(kind, key, nearest=store.nearest(kind, key))
