"""Small remembered facts: one JSON object under a key, such as the digest of the graph that a recipe leads to.

A memo holds its whole key, so a fact is never given for another question, and a digest of itself, so a damaged one is
only a fact forgotten.
"""

from __future__ import annotations

import logging
from typing import Any

from llmapi._build.store import staging as store_staging
from llmapi._build.key import Key
from llmapi._build.store.disk import SCHEMA, Layout
from llmapi._build.store.manifest import seal, unseal
from llmapi.errors import CacheError

log = logging.getLogger(__name__)


def read_memo(layout: Layout, kind: str, key: Key) -> dict[str, Any] | None:
    """The fact, or None where it is not known or damaged."""
    path = layout.memo(kind, key.digest)
    try:
        fields = unseal(path.read_bytes())
    except OSError:
        return None
    except CacheError as error:
        log.warning("%s is forgotten: %s", path, error)
        return None
    if (fields.get("schema"), fields.get("kind"), fields.get("key")) != (SCHEMA, kind, key.to_json()):
        return None
    value = fields.get("value")
    return value if isinstance(value, dict) else None


def write_memo(layout: Layout, kind: str, key: Key, value: dict[str, Any]) -> None:
    """Remember a fact in place of the one before."""
    path = layout.memo(kind, key.digest)
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    store_staging.replace_file(
        layout, path, seal({"schema": SCHEMA, "kind": kind, "key": key.to_json(), "value": value})
    )
