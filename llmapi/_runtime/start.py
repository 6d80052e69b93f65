"""Start: the stages between a model's name and a running loop, in order."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmapi import _env, _progress
from llmapi._build.checkpoint import read_config
from llmapi._build.names import CONSTANTS_FILE, GRAPH_FILE, WEIGHTS_FILE
from llmapi._build.pipeline import Builder, Recipe
from llmapi._build.report import BuildReport
from llmapi._build.saved import SavedEngine, is_saved, load_saved
from llmapi._build.store import Store
from llmapi._digests import DigestMemory
from llmapi._runtime.find_tokenizer import find_tokenizer
from llmapi._runtime.fit import check_config_file, check_fits
from llmapi._runtime.options import ModelOptions, full_path
from llmapi._source import Snapshot
from llmapi._source import resolve as resolve_source
from llmapi._tokenizer import Tokenizer
from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.errors import CheckpointError, ConfigError
from llmapi.models.family import family_of, spec_of
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    from llmapi._runtime.engine import Engine

log = logging.getLogger("llmapi")


@dataclass
class Prepared:
    """Everything an engine is loaded from.

    Attributes:
        spec, config: the model and the resolved limits.
        tokenizer: None where it was skipped or, for dummy weights, where there is none.
        label: the model's name.
        dummy_seed: seed of random weights that the engine makes itself; None where it reads ``weights``.
        utilization: share of the GPU's memory that may be used.
        stop_token_ids: ids that end a sequence of this model.
        weights, engine: artifact folders, held by ``builder`` until it is closed.
        plan: likewise of TensorRT's plan; None for other backends.
    """

    spec: TransformerSpec
    config: EngineConfig
    tokenizer: Tokenizer | None
    stop_token_ids: tuple[int, ...]
    weights: Path | None
    engine: Path
    builder: Builder
    report: BuildReport
    label: str
    utilization: float
    dummy_seed: int | None = None
    plan: Path | None = None


def prepare(options: ModelOptions, engine: EngineOptions) -> Prepared:
    """Find the model, and bring its artifacts into the cache.

    Args:
        options: which model.
        engine: how it is to run.
    """
    report = BuildReport(str(options.model))
    with report.phase("import"):
        import torch  # noqa: F401  (the engine and every build need it; a second start finds it imported)
    root = _env.cache_dir() if options.cache_dir is None else full_path("cache_dir", options.cache_dir)
    store = Store(root)
    builder = Builder(store, report, progress=options.progress)
    digests = DigestMemory(root / "digests")
    try:
        folder = saved_folder(options.model)
        if folder is not None:
            prepared = _from_saved(load_saved(folder), options, engine, builder, report, digests)
        else:
            prepared = _from_source(options, engine, builder, report, digests)
    except BaseException:
        builder.close()
        raise
    report.hashed_bytes = digests.hashed_bytes
    log.info("%s", report.line)
    return prepared


def saved_folder(model: str) -> Path | None:
    """The folder of a saved engine, where ``model`` names one."""
    try:
        folder = Path(model).expanduser()
        return folder if is_saved(folder) else None
    except (OSError, ValueError, RuntimeError):  # what is no path here may still be something else
        return None


def _from_source(
    options: ModelOptions, engine: EngineOptions, builder: Builder, report: BuildReport, digests: DigestMemory
) -> Prepared:
    with report.phase("fetch"):
        snapshot, config_json, recipe = find_recipe(options, engine, digests)
        report.hub_calls += snapshot.hub_calls
    spec, config = recipe.spec, recipe.config
    tokenizer = find_tokenizer(options, snapshot, builder, digests)
    makes_weights = config.backend == "cuda" and recipe.dummy_seed is not None  # on the GPU, in no time
    weights = None if makes_weights else builder.weights(recipe)
    compiled = builder.engine(recipe, snapshot.model)
    plan = builder.plan(recipe, compiled, snapshot.model) if config.backend == "tensorrt" else None
    stops = _stop_token_ids(snapshot, config_json, tokenizer)
    return Prepared(
        spec, config, tokenizer, stops, weights, compiled, builder, report, snapshot.model,
        engine.gpu_memory_utilization, recipe.dummy_seed if makes_weights else None, plan,
    )  # fmt: skip


def find_recipe(
    options: ModelOptions, engine: EngineOptions, digests: DigestMemory
) -> tuple[Snapshot, dict[str, Any], Recipe]:
    """Find the model's files, fetching what is not here; the files, the configuration, and what to build of them.

    Args:
        options: which model.
        engine: how it is to run.
        digests: memory for the digests of its files.
    """
    snapshot = resolve_source(
        options.model,
        revision=options.revision,
        token=options.hf_token,
        load_format=options.load_format,
        trust_remote_code=options.trust_remote_code,
        refresh=options.refresh,
        digests=digests,
        progress=options.progress,
        check=lambda path: check_config_file(path, engine),
    )
    config_json = read_config(snapshot)
    spec = spec_of(config_json)
    dummy_seed = (options.seed or 0) if options.load_format == "dummy" else None
    recipe = Recipe(snapshot, family_of(config_json), spec, resolve(engine, spec), dummy_seed)
    if snapshot.config_file is None:  # a .gguf file; others were asked before anything was fetched
        check_fits(spec, recipe.config, engine.gpu_memory_utilization)
    return snapshot, config_json, recipe


def saved_config(saved: SavedEngine, options: ModelOptions, engine: EngineOptions) -> EngineConfig:
    """The configuration of a saved engine, with its own limits where no others were asked for.

    Args:
        saved: the engine.
        options: which model; what a saved engine cannot follow is refused.
        engine: how it is to run.
    """
    for name, default in (("load_format", "auto"), ("revision", None)):
        if getattr(options, name) != default:
            raise ConfigError(
                f"{name}={getattr(options, name)!r}, but {saved.path} is a saved engine, which holds its weights: "
                f"leave {name} out, or make the engine from {saved.model} again"
            )
    config = resolve(saved.defaults(engine), saved.spec)
    if config.dtype != saved.limits["dtype"]:
        raise ConfigError(
            f"dtype={config.dtype!r}, but the engine in {saved.path} was saved as {saved.limits['dtype']!r}: leave "
            f"dtype out, or make the engine from {saved.model} again"
        )
    return config


def _from_saved(
    saved: SavedEngine,
    options: ModelOptions,
    engine: EngineOptions,
    builder: Builder,
    report: BuildReport,
    digests: DigestMemory,
) -> Prepared:
    config = saved_config(saved, options, engine)
    home = saved.path if saved.has_tokenizer else None
    tokenizer = find_tokenizer(options, home, builder, digests)
    recipe = Recipe(None, None, saved.spec, config)
    compiled = builder.saved_engine(recipe, saved)
    plan = builder.plan(recipe, compiled, saved.model) if config.backend == "tensorrt" else None
    return Prepared(
        saved.spec, config, tokenizer, saved.stop_token_ids, saved.weights, compiled, builder, report, saved.model,
        engine.gpu_memory_utilization, None, plan,
    )  # fmt: skip


def _stop_token_ids(snapshot: Snapshot, config: dict[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """End tokens: generation_config.json's, else config.json's; and the tokenizer's."""
    found: Any = None
    if snapshot.generation_config_file is not None:
        try:
            found = json.loads(snapshot.generation_config_file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{snapshot.generation_config_file} is not a JSON object ({error}): mend or remove it"
            ) from error
    if found is None:
        found = config.get("eos_token_id")
    ids = set(found if isinstance(found, list) else [] if found is None else [found])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def load_engine(prepared: Prepared, *, progress: bool) -> Engine:
    """Load what was prepared.

    Args:
        prepared: the artifacts.
        progress: whether to draw a bar.

    Returns:
        the engine of the backend that was asked for.
    """
    from llmapi._build.graph import Graph
    from llmapi._build.tensor_file import TensorFile

    tables = TensorFile(prepared.engine / CONSTANTS_FILE)
    graph = Graph.parse((prepared.engine / GRAPH_FILE).read_text(encoding="utf-8"))
    constants = {name: tables.read([name]) for name in tables.names()}
    native = prepared.config.backend == "cpu" and prepared.config.dtype == "float32"
    kernels = prepared.builder.cpu_kernels() if native else None
    with prepared.report.phase("load") as phase:
        weights = None if prepared.weights is None else TensorFile(prepared.weights / WEIGHTS_FILE)
        engine: Engine
        if prepared.config.backend == "cuda":
            from llmapi._runtime.load_cuda import load_cuda

            engine = load_cuda(prepared, graph, weights, constants, progress=progress)
        elif prepared.config.backend == "tensorrt":
            from llmapi._runtime.load_tensorrt import load_tensorrt

            assert weights is not None
            engine = load_tensorrt(prepared, graph, weights, progress=progress)
        else:
            from llmapi._runtime.engine_cpu import CpuEngine

            assert weights is not None
            with _progress.bar("load", 1, enabled=progress) as done:
                try:
                    engine = CpuEngine(graph, weights, constants, prepared.spec, prepared.config, kernels)
                except RuntimeError as error:
                    if "allocate memory" not in str(error):
                        raise
                    raise ConfigError(
                        f"this machine cannot give the memory that the KV cache ({prepared.config.kv_cache}) and the "
                        "weights take: lower the max_tokens or memory_bytes of kv_cache_config"
                    ) from error
                done(1)
        phase.nbytes = 0 if weights is None else weights.nbytes
        phase.note = f"{engine.num_blocks} KV blocks of {prepared.config.block_size} tokens"
    return engine
