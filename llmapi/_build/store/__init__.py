"""The build cache on disk: :class:`Store` and what it hands out."""

from __future__ import annotations

from llmapi._build.store.store import CacheReport, Entry, EntryInfo, Manifest, Problem, PruneReport, Staging, Store

__all__ = ["CacheReport", "Entry", "EntryInfo", "Manifest", "Problem", "PruneReport", "Staging", "Store"]
