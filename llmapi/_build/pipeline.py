"""Pipeline: from a snapshot to the two artifacts an engine is loaded from, through the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmapi import _progress
from llmapi._build.artifact_keys import (
    engine_key,
    graph_recipe_key,
    plan_key,
    tokenizer_key,
    tokenizer_origin,
    weights_key,
)
from llmapi._build.checkpoint import open_checkpoint
from llmapi._build.key import Key
from llmapi._build.names import (
    CONSTANTS_FILE,
    GRAPH_FILE,
    PLAN_FILE,
    PLAN_INFO_FILE,
    RUNTIME_CACHE_FILE,
    TUNING_FILE,
    WEIGHTS_FILE,
)
from llmapi._build.report import BuildReport
from llmapi._build.saved import SavedEngine
from llmapi._build.store import Staging, Store
from llmapi._source import Snapshot
from llmapi.config import EngineConfig
from llmapi.models.family import Family
from llmapi.models.spec import TransformerSpec

if TYPE_CHECKING:
    import torch

    from llmapi._kernels.nvrtc import Unit
    from llmapi._kernels.native import NativeKernels

log = logging.getLogger("llmapi")


@dataclass(frozen=True)
class Recipe:
    """What to build.

    Attributes:
        snapshot: the model's files; None for a saved engine, whose weights exist already.
        family, spec: its architecture.
        config: types and limits.
        dummy_seed: seed of random weights instead of real ones; None for real ones.
    """

    snapshot: Snapshot | None
    family: Family | None
    spec: TransformerSpec
    config: EngineConfig
    dummy_seed: int | None = None

    def origin(self) -> dict[str, object]:
        """Where the weights come from, for their key; files whose digests are not remembered are hashed."""
        if self.dummy_seed is not None:
            return {"dummy": self.dummy_seed}
        assert self.snapshot is not None
        return {"files": sorted(self.snapshot.digests(self.snapshot.weight_files).values())}


class Builder:
    """Builds artifacts through a store and keeps account in a report.

    Args:
        store: the cache.
        report: filled in as phases run.
        progress: whether to draw bars.
    """

    def __init__(self, store: Store, report: BuildReport, *, progress: bool) -> None:
        self._store = store
        self.report = report
        self._progress = progress
        self._held = ExitStack()

    def weights(self, recipe: Recipe) -> Path:
        """Folder with the canonical weights of a model, converted if the cache has none.

        Args:
            recipe: with a snapshot.

        Raises:
            CheckpointError: the files are not those of this architecture.
        """
        assert recipe.snapshot is not None and recipe.family is not None
        snapshot, family, spec = recipe.snapshot, recipe.family, recipe.spec
        from llmapi._build.tensor_file import TensorSpec

        if recipe.dummy_seed is None:
            with self.report.phase("digest") as phase, self._bar("fetch", sum(f.size for f in snapshot.weight_files)) as done:
                before = snapshot.memory.hashed_bytes
                origin = recipe.origin()
                done(sum(f.size for f in snapshot.weight_files))
                phase.nbytes = snapshot.memory.hashed_bytes - before
                phase.note = "hashed" if phase.nbytes else "remembered"
        else:
            origin = recipe.origin()

        def build(staging: Staging) -> None:
            from llmapi._build.weights import converted, dummy, tensor_specs, write_weights

            specs: list[TensorSpec] = tensor_specs(spec, recipe.config.dtype)
            total = sum(s.nbytes for s in specs)
            staging.need(total)
            with ExitStack() as stack:
                done = stack.enter_context(self._bar("convert", total))
                if recipe.dummy_seed is None:
                    values = converted(stack.enter_context(open_checkpoint(snapshot)), family, spec, specs)
                else:
                    values = dummy(recipe.dummy_seed)
                with staging.open(WEIGHTS_FILE) as out:
                    write_weights(out, specs, values, done)
            self.report.conversions += len(specs)

        key = weights_key(spec, recipe.config, origin)
        return self._obtain("convert", "weights", key, snapshot.model, build)

    def saved_engine(self, recipe: Recipe, saved: SavedEngine) -> Path:
        """Folder with the compiled step of a saved engine; built anew where other limits or another llmapi ask for it.

        Args:
            recipe: what is wanted; needs no snapshot.
            saved: the saved engine.
        """
        return self.engine(recipe, saved.model, saved)

    def engine(self, recipe: Recipe, label: str, saved: SavedEngine | None = None) -> Path:
        """Folder with the compiled step, exported and built if neither ``saved`` nor the cache has it.

        Args:
            recipe: what to build; needs no snapshot.
            label: the model's name.
            saved: a saved engine that may hold it.
        """
        graph_file, digest = self._graph(recipe.spec, label, saved)

        def build(staging: Staging) -> None:
            from llmapi._build.tensor_file import TensorSpec, write_tensors
            from llmapi.models.transformer import constants

            with self._bar("build", 2) as done:
                with staging.open(GRAPH_FILE) as out:
                    out.write(graph_file.read_bytes())
                done(1)
                tables: dict[str, torch.Tensor] = constants(recipe.spec)
                specs = [TensorSpec(name, "float32", tuple(t.shape)) for name, t in tables.items()]
                with staging.open(CONSTANTS_FILE) as out:
                    write_tensors(out, specs, lambda spec: tables[spec.name])
                done(1)

        key = engine_key(recipe.spec, recipe.config, digest)
        if saved is not None and key.digest == saved.engine_digest:
            with self.report.phase("build") as phase:
                phase.note = "saved engine"
            self.report.keys["engine"] = key.digest
            return saved.engine
        return self._obtain("build", "engine", key, label, build)

    def plan(self, recipe: Recipe, engine: Path, label: str) -> Path:
        """Folder with TensorRT's plan of a compiled step, built if the cache has none. No GPU is needed.

        Args:
            recipe: what to build.
            engine: folder of the compiled step.
            label: the model's name.

        Raises:
            ConfigError: TensorRT is not installed, of another version, or cannot build for the targets.
            BuildError: the model cannot be lowered or built.
        """
        from llmapi._build.tensorrt.package import load_package
        from llmapi._build.tensorrt.path import attention_path

        package = load_package()
        path = attention_path(package.attention)
        text = (engine / GRAPH_FILE).read_text(encoding="utf-8")

        def build(staging: Staging) -> None:
            from llmapi._build.graph import Graph
            from llmapi._build.tensorrt.plan import STEPS, build_plan
            from llmapi.models.transformer import constants

            with self._bar("plan", STEPS) as done:
                plan, info = build_plan(
                    package, Graph.parse(text), recipe.spec, recipe.config, constants(recipe.spec), done, path
                )
                staging.need(plan.nbytes)
                with staging.open(PLAN_FILE) as out:
                    out.write(plan)
                with staging.open(PLAN_INFO_FILE) as out:
                    out.write(info.text.encode())

        digest = hashlib.sha256(text.encode()).hexdigest()
        key = plan_key(recipe.spec, recipe.config, digest, package.name, package.version, path.key_parts())
        return self._obtain("plan", "plan", key, label, build)

    def runtime_cache(self, key: Key) -> bytes | None:
        """What TensorRT-RTX made for this GPU in an earlier process; None where nothing was kept.

        Args:
            key: of the plan and the GPU.
        """
        entry = self._store.get("runtime-cache", key)
        if entry is None:
            return None
        with entry:
            return entry.file(RUNTIME_CACHE_FILE).read_bytes()

    def keep_runtime_cache(self, key: Key, label: str, blob: bytes) -> None:
        """Keep what TensorRT-RTX made for this GPU; an entry that is there stays.

        Args:
            key: of the plan and the GPU.
            label: the model's name.
            blob: what to keep.
        """

        def build(staging: Staging) -> None:
            with staging.open(RUNTIME_CACHE_FILE) as out:
                out.write(blob)

        self._store.build("runtime-cache", key, label, build).close()

    def _graph(self, spec: TransformerSpec, label: str, saved: SavedEngine | None) -> tuple[Path, str]:
        """File and digest of the exported, rewritten graph: a saved engine's, the cache's, or a new one."""
        key = graph_recipe_key(spec)
        if saved is not None and saved.graph_recipe == key.digest:
            return saved.engine / GRAPH_FILE, saved.graph_digest

        def export(staging: Staging) -> None:
            from llmapi._build.export import export_graph

            self.report.exports += 1
            with self._bar("export", 1) as done, staging.open(GRAPH_FILE) as out:
                out.write(export_graph(spec).text.encode())
                done(1)

        folder = self._obtain("export", "graph", key, label, export)
        return folder / GRAPH_FILE, hashlib.sha256((folder / GRAPH_FILE).read_bytes()).hexdigest()

    def tokenizer(self, snapshot: Snapshot, convert: Callable[[Path], None]) -> Path:
        """Folder with what is kept of a model's tokenizer, made if the cache has none.

        Args:
            snapshot: the model's files.
            convert: writes the files to keep into a folder.
        """
        key = tokenizer_key(tokenizer_origin(snapshot))
        return self._obtain("tokenizer", "tokenizer", key, snapshot.model, lambda staging: convert(staging.path))

    def cubin(self, unit: Unit, arch: str) -> bytes:
        """Machine code of a kernel, compiled if the cache has none.

        Args:
            unit: the specialization.
            arch: for what.
        """
        from llmapi._build.compiled import cached_cubin

        return cached_cubin(self._store, unit, arch)

    def tuning(self, key: Key, label: str, measure: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Measured choices, measured if the cache has none.

        Args:
            key: what they depend on.
            label: the model's name.
            measure: makes the table.
        """

        def build(staging: Staging) -> None:
            with staging.open(TUNING_FILE) as out:
                out.write(json.dumps(measure(), indent=1, sort_keys=True).encode())

        folder = self._obtain("tune", "tuning", key, label, build)
        table: dict[str, int] = json.loads((folder / TUNING_FILE).read_text(encoding="utf-8"))
        return table

    def cpu_kernels(self) -> NativeKernels | None:
        """The compiled CPU kernels, loaded; None where there are none, and then torch's operators do the work."""
        from llmapi._build.cpu_kernels import NoKernels, obtain

        with self.report.phase("kernels") as phase:
            before = len(self._store.snapshot().lines)
            try:
                with self._bar("kernels", 1) as done:
                    kernels = obtain(self._store)
                    done(1)
            except NoKernels as error:
                phase.note = "none"
                log.info("no compiled CPU kernels, torch's operators are used: %s", error)
                return None
            lines = self._store.snapshot().lines[before:]
            self.report.cache += lines
            phase.note = "built" if any(line.startswith("built") for line in lines) else "cache hit"
        return kernels

    def close(self) -> None:
        """Let go of the artifacts; the cache may then evict them."""
        self._held.close()

    def _obtain(self, phase_name: str, kind: str, key: Key, label: str, build: Callable[[Staging], None]) -> Path:
        built: list[bool] = []

        def note(staging: Staging) -> None:
            built.append(True)
            build(staging)

        with self.report.phase(phase_name) as phase:
            before = self._store.snapshot()
            entry = self._held.enter_context(self._store.build(kind, key, label, note))
            phase.note, phase.nbytes = ("built", entry.manifest.size) if built else ("cache hit", 0)
        after = self._store.snapshot()
        lines = after.lines[len(before.lines) :]
        self.report.cache += lines
        self.report.checked_bytes += after.hashed_bytes - before.hashed_bytes
        self.report.keys[kind] = key.digest
        log.debug("%s", lines[0] if lines else f"{kind}: {phase.note}")
        return entry.path

    def _bar(self, phase: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return _progress.bar(phase, total, "B" if phase in ("fetch", "convert") else "it", enabled=self._progress)
