"""Explain: what a start would find in the cache, without fetching weights or building anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmapi import _env
from llmapi._build.artifact_keys import (
    engine_key,
    graph_recipe_key,
    plan_key,
    tokenizer_key,
    tokenizer_origin,
    weights_key,
)
from llmapi._build.graph import Graph
from llmapi._build.names import GRAPH_FILE
from llmapi._build.pipeline import Recipe
from llmapi._build.saved import SavedEngine, load_saved
from llmapi._build.store import Store
from llmapi._digests import DigestMemory
from llmapi._runtime import explain_kernels
from llmapi._runtime.finding import Finding, look
from llmapi._runtime.options import ModelOptions, full_path, split_arguments
from llmapi._runtime.start import find_recipe, saved_config, saved_folder
from llmapi._source import Snapshot, listing, needed, no_model, source_files


def explain(model: str, **arguments: Any) -> list[Finding]:
    """What a start would find, one finding for each artifact, in the order in which it would ask.

    A model on the hub whose configuration is not on this machine is asked for that, but not for its weights.

    Args:
        model: as for :class:`llmapi.LLM`.
        arguments: of :class:`llmapi.LLM`.

    Raises:
        LLMAPIError: the model cannot be found, or cannot be built with these arguments.
    """
    options, engine = split_arguments(model, arguments)
    root = _env.cache_dir() if options.cache_dir is None else full_path("cache_dir", options.cache_dir)
    store = Store(root)
    folder = saved_folder(options.model)
    if folder is not None:
        saved = load_saved(folder)
        held = Finding("weights", None, found=True, note="part of the saved engine")
        recipe = Recipe(None, None, saved.spec, saved_config(saved, options, engine))
        return [held, _engine(store, recipe, saved), *_backend(store, recipe, saved)]
    digests = DigestMemory(root / "digests")
    snapshot, _, recipe = find_recipe(replace(options, load_format="dummy"), engine, digests)
    if options.load_format != "dummy":
        if snapshot.kind == "folder":
            snapshot, _, recipe = find_recipe(options, engine, digests)
        files = _with_weights(snapshot, options) if snapshot.kind == "hub" else snapshot
        recipe = replace(recipe, snapshot=files, dummy_seed=None)
    findings = [_weights(store, recipe), _engine(store, recipe), *_backend(store, recipe)]
    if _keeps_tokenizer(snapshot, options):
        findings.insert(0, look(store, "tokenizer", tokenizer_key(tokenizer_origin(snapshot))))
    return findings


def _keeps_tokenizer(snapshot: Snapshot, options: ModelOptions) -> bool:
    """Whether a start would look for what is kept of the model's own tokenizer."""
    if options.skip_tokenizer_init or options.tokenizer is not None:
        return False
    plain = options.tokenizer_mode == "auto" and not options.trust_remote_code
    return snapshot.kind == "gguf" or (plain and bool(snapshot.tokenizer_files))


def _with_weights(snapshot: Snapshot, options: ModelOptions) -> Snapshot | None:
    """The snapshot of a hub model with its weights; None where they are not all on this machine."""
    here = listing(snapshot.path)
    wanted = needed(here, snapshot.path, dummy=False, trust_remote_code=options.trust_remote_code)
    if no_model(options.model, here, dummy=False) is not None or not set(wanted) <= set(here):
        return None
    return replace(snapshot, files=source_files(snapshot.path, wanted))


def _weights(store: Store, recipe: Recipe) -> Finding:
    if recipe.config.backend == "cuda" and recipe.dummy_seed is not None:
        return Finding("weights", None, None, note="random weights are made on the GPU at each start")
    if recipe.snapshot is None:
        return Finding("weights", None, note="the model's weights are not on this machine; a start downloads them")
    return look(store, "weights", weights_key(recipe.spec, recipe.config, recipe.origin()))


def _engine(store: Store, recipe: Recipe, saved: SavedEngine | None = None) -> Finding:
    how = graph_recipe_key(recipe.spec)
    if saved is not None and saved.graph_recipe == how.digest:
        key = engine_key(recipe.spec, recipe.config, saved.graph_digest)
        if key.digest == saved.engine_digest:
            return Finding("engine", key, found=True, note="part of the saved engine")
        return look(store, "engine", key)
    graph = look(store, "graph", how).entry
    if graph is not None:
        digest = graph.manifest.files[GRAPH_FILE].sha256
        return look(store, "engine", engine_key(recipe.spec, recipe.config, digest))
    near = store.nearest("engine", engine_key(recipe.spec, recipe.config, "not exported yet"))
    note = "a start has to export the graph first: the architecture, llmapi's sources or torch are new to this cache"
    return Finding("engine", None, nearest=near, note=note)


def _backend(store: Store, recipe: Recipe, saved: SavedEngine | None = None) -> list[Finding]:
    """What a start would find of what its backend needs beside weights and engine."""
    backend = recipe.config.backend
    if backend == "tensorrt":
        return _plan(store, recipe, saved)
    if backend == "cuda":
        import torch

        from llmapi._kernels.gpu import Gpu

        gpu = Gpu(torch.device("cuda", torch.cuda.current_device()))
        try:
            return explain_kernels.of_gpu(store, recipe.config, _graph(store, recipe, saved), gpu)
        finally:
            gpu.close()
    return [explain_kernels.of_cpu(store)] if recipe.config.dtype == "float32" else []


def _graph(store: Store, recipe: Recipe, saved: SavedEngine | None) -> Graph | None:
    """The graph of a step; None where it is not exported yet."""
    key = graph_recipe_key(recipe.spec)
    if saved is not None and saved.graph_recipe == key.digest:
        return Graph.parse((saved.engine / GRAPH_FILE).read_text(encoding="utf-8"))
    if look(store, "graph", key).entry is None:
        return None
    entry = store.get("graph", key)
    if entry is None:  # damaged, or gone meanwhile
        return None
    with entry:
        return Graph.parse(entry.file(GRAPH_FILE).read_text(encoding="utf-8"))


def _plan(store: Store, recipe: Recipe, saved: SavedEngine | None) -> list[Finding]:
    """What a start would find of TensorRT's plan."""
    from llmapi._build.tensorrt.package import load_package
    from llmapi._build.tensorrt.path import attention_path

    package = load_package()
    parts = attention_path(package.attention).key_parts()
    how = graph_recipe_key(recipe.spec)
    graph = look(store, "graph", how).entry
    if saved is not None and saved.graph_recipe == how.digest:
        digest = saved.graph_digest
    elif graph is not None:
        digest = graph.manifest.files[GRAPH_FILE].sha256
    else:
        unknown = plan_key(recipe.spec, recipe.config, "not exported yet", package.name, package.version, parts)
        near = store.nearest("plan", unknown)
        return [Finding("plan", None, nearest=near, note="a start has to export the graph first")]
    return [look(store, "plan", plan_key(recipe.spec, recipe.config, digest, package.name, package.version, parts))]
