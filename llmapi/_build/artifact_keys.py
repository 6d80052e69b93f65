"""The keys of the artifacts: every part that shapes one, and why the others are left out.

Weights: what the canonical tensors are made from. Graph recipe: what ``torch.export`` and the rewrites see. Engine: the
graph's text and everything that shapes the compiled step; no weight value, so two fine-tunes share one engine.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import llmapi
from llmapi import _device
from llmapi._build.key import Key, Part, canonical, schema_part, source_digest, toolchain_parts
from llmapi._files import CONFIG
from llmapi.config import EngineConfig
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    from llmapi._build.store.manifest import Manifest
    from llmapi._source import Snapshot

_PACKAGE = Path(llmapi.__file__).parent
_TOKENIZER_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "gguf")


def sources(*names: str) -> str:
    """Digest of source files and folders, named relative to the package."""
    return source_digest(*(_PACKAGE / name for name in names))


def _operators() -> list[str]:
    """The operators' Python modules. Not their C++ and CUDA sources: machine code has keys of its own, and what it
    computes is what the operator's reference says.
    """
    return [path.relative_to(_PACKAGE).as_posix() for path in sorted((_PACKAGE / "_kernels").glob("*.py"))]


def weights_key(spec: TransformerSpec, config: EngineConfig, origin: Mapping[str, object]) -> Key:
    """Key of the weights artifact.

    Left out: paths, file names and times (content counts), engine limits (no tensor depends on them), the torch
    version (conversion is a cast between IEEE types, which no version changes). ``quantization`` says "none" and there
    is one rank in a world of one until this release can do more: the parts are there so that the day it can, no entry
    of today is taken for one of then.

    Args:
        spec: the architecture.
        config: for the dtype.
        origin: where the values come from: sorted digests of the weight files, or the dummy seed.
    """
    return Key(
        [
            schema_part(),
            Part("spec", canonical(spec.to_json())),
            Part("origin", canonical(dict(origin))),
            Part("dtype", config.dtype),
            Part("quantization", "none"),
            Part("rank", "0"),
            Part("world", "1"),
            Part(
                "converter",
                sources(
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
    exporter = sources("models", *_operators(), "_build/export.py", "_build/graph.py", "_build/rewrite")
    return Key([*toolchain_parts(), Part("spec", canonical(spec.to_json())), Part("exporter", exporter)])


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
            Part("kernels", sources(*_operators())),
            Part("target", _target(config.backend)),
            Part("rank", "0"),
            Part("world", "1"),
        ]
    )


def _target(backend: str) -> str:
    """What a compiled step runs on. The machine code of kernels is kept apart, under the GPU's architecture, and so are
    TensorRT's plans, so that the step itself is the same for every GPU.
    """
    return backend


def plan_key(
    spec: TransformerSpec,
    config: EngineConfig,
    graph_digest: str,
    package: str,
    version: str,
    path_parts: Mapping[str, str] = MappingProxyType({}),
) -> Key:
    """Key of a TensorRT plan: what TensorRT is given, and which TensorRT it is.

    Left out: torch (the graph's text says all that it contributed), the size of the KV memory (the number of rows is
    bound at run time, up to ``max_batch_size``), and weight values, for weights are inputs of the plan.

    Args:
        spec: the architecture.
        config: limits, dtypes, targets.
        graph_digest: of the graph's text after the rewrites.
        package: ``tensorrt_rtx`` or ``tensorrt``.
        version: of the package.
        path_parts: what the attention's path adds, :attr:`llmapi._build.tensorrt.path.AttentionPath.key_parts`.
    """
    return Key(
        [
            schema_part(),
            Part("graph", graph_digest),
            Part("constants", canonical(spec.to_json()["rope"])),
            *(Part(name, canonical(value)) for name, value in config.shape_parts().items()),
            Part("targets", canonical(list(config.targets))),
            Part("tensorrt", canonical({"package": package, "version": version})),
            Part("lowering", sources("models", *_operators(), "_build/tensorrt", "_targets.py", "_tensorrt.py")),
            *(Part(name, value) for name, value in path_parts.items()),
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
    target = "cuda" if made.get("target") == "cuda" and _device.cuda_problem() is None else "cpu"
    if made.get("target") == "tensorrt":
        target = "tensorrt"  # the step alone; its plan is never moved
    for part in (*toolchain_parts(), Part("target", target)):
        if made.get(part.name) != part.value:
            needs, here = _version(made.get(part.name)), _version(part.value)
            return f"it needs {part.name} {needs}, and here is {here}; build it here from the weights instead"
    return None


def runtime_cache_key(plan_digest: str, gpu: str, driver: int) -> Key:
    """Key of the kernels that TensorRT-RTX makes of a plan on a GPU. TensorRT checks more of it when it reads them.

    Args:
        plan_digest: digest of the plan's key.
        gpu: name of the device.
        driver: version of its driver.
    """
    return Key([schema_part(), Part("plan", plan_digest), Part("gpu", gpu), Part("driver", str(driver))])


def _version(value: str | None) -> str:
    """The text of a part, without the details of a torch build where the version says enough."""
    try:
        return str(json.loads(value or "")["version"])
    except (ValueError, KeyError, TypeError):
        return value or "of no known version"


def tokenizer_key(origin: Mapping[str, str]) -> Key:
    """Key of what is kept of a tokenizer: the files it is read from, and the code that reads them.

    Args:
        origin: see :func:`tokenizer_origin`.
    """
    return Key(
        [
            schema_part(),
            Part("origin", canonical(dict(origin))),
            Part("libraries", canonical({name: _installed(name) for name in _TOKENIZER_LIBRARIES})),
            Part("converter", sources("_tokenizer.py", "_frozen_tokenizer.py")),
        ]
    )


def tokenizer_origin(snapshot: Snapshot) -> dict[str, str]:
    """Digests of the files that a tokenizer is read from, by name: names decide what a file means, except for GGUF's.

    Args:
        snapshot: the model's files.
    """
    if snapshot.kind == "gguf":
        return {"gguf": next(iter(snapshot.digests().values()))}
    config = snapshot.file(CONFIG)  # it may name the tokenizer's class
    return snapshot.digests([*snapshot.tokenizer_files, *([config] if config else [])])


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
