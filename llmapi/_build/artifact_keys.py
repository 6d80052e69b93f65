"""The keys of the artifacts: every part that shapes one, and why the others are left out.

Weights: what the canonical tensors are made from. Graph recipe: what ``torch.export`` and the rewrites see. Engine: the
graph's text and everything that shapes the compiled step; no weight value, so two fine-tunes share one engine.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import llmapi
from llmapi._build.key import Key, Part, canonical, source_digest, toolchain_parts
from llmapi.config import EngineConfig
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    from llmapi._build.store.manifest import Manifest

_PACKAGE = Path(llmapi.__file__).parent


def _sources(*names: str) -> str:
    return source_digest(*(_PACKAGE / name for name in names))


def weights_key(spec: TransformerSpec, config: EngineConfig, origin: Mapping[str, object]) -> Key:
    """Key of the weights artifact.

    Left out: paths, file names and times (content counts), engine limits (no tensor depends on them), the torch
    version (conversion is a cast between IEEE types, which no version changes).

    Args:
        spec: the architecture.
        config: for the dtype.
        origin: where the values come from: sorted digests of the weight files, or the dummy seed.
    """
    return Key(
        [
            Part("spec", canonical(spec.to_json())),
            Part("origin", canonical(dict(origin))),
            Part("dtype", config.dtype),
            Part("quantization", "none"),
            Part("rank", "0"),
            Part("world", "1"),
            Part(
                "converter",
                _sources(
                    "models",
                    "_build/weights.py",
                    "_build/tensor_file.py",
                    "_build/file_span.py",
                    "_build/checkpoint.py",
                    "_build/gguf.py",
                    "_build/gguf_tensors.py",
                ),
            ),
        ]
    )


def graph_recipe_key(spec: TransformerSpec) -> Key:
    """Key of the exported, rewritten graph: what ``torch.export`` and the rewrites see. A hit saves the export.

    Args:
        spec: the architecture.
    """
    sources = _sources("models", "_kernels", "_build/export.py", "_build/graph.py", "_build/rewrite")
    return Key([*toolchain_parts(), Part("spec", canonical(spec.to_json())), Part("exporter", sources)])


def engine_key(spec: TransformerSpec, config: EngineConfig, graph_digest: str) -> Key:
    """Key of the engine artifact.

    Left out: ``enable_prefix_caching`` and the size of the KV memory (the scheduler's business; the compiled step takes
    any number of blocks), and the weights.

    Args:
        spec: the architecture; its name of the family does not count, the graph says all.
        config: limits, dtypes, backend.
        graph_digest: of the graph's text after the rewrites.
    """
    return Key(
        [
            *toolchain_parts(),
            Part("graph", graph_digest),
            Part("constants", canonical(spec.to_json()["rope"])),
            *(Part(name, canonical(value)) for name, value in config.shape_parts().items()),
            Part("kernels", _sources("_kernels")),
            Part("target", "cpu"),
        ]
    )


def misfit(manifest: Manifest) -> str | None:
    """Why this machine cannot use an entry made on another, and what it would need; None where it can.

    Only the compiled step depends on a machine. An entry made by another llmapi is harmless: no key will ask for it.

    Args:
        manifest: of the entry.
    """
    if manifest.kind != "engine":
        return None
    made = {part.name: part.value for part in manifest.key.parts}
    for part in (*toolchain_parts(), Part("target", "cpu")):
        if made.get(part.name) != part.value:
            needs, here = _version(made.get(part.name)), _version(part.value)
            return f"it needs {part.name} {needs}, and here is {here}; build it here from the weights instead"
    return None


def _version(value: str | None) -> str:
    """The text of a part, without the details of a torch build where the version says enough."""
    try:
        return str(json.loads(value or "")["version"])
    except (ValueError, KeyError, TypeError):
        return value or "of no known version"


def tokenizer_key(digest: str) -> Key:
    """Key of a tokenizer converted from a ``.gguf`` file.

    Args:
        digest: of the file.
    """
    return Key(
        [
            Part("origin", digest),
            Part("transformers", importlib.metadata.version("transformers")),
            Part("converter", _sources("_tokenizer.py")),
        ]
    )
