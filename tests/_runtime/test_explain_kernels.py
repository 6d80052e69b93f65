"""What ``llmapi cache why`` says of machine code and measured choices for a GPU, with an emulated one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM
from llmapi._build import compiled
from llmapi._build.compiled import cached_cubin, tuning_key
from llmapi._build.graph import Graph
from llmapi._build.names import GRAPH_FILE, TUNING_FILE
from llmapi._build.store import Staging, Store
from llmapi._kernels import nvrtc
from llmapi._kernels.nvrtc import Unit
from llmapi._runtime.bind_cuda import Binder
from llmapi._runtime.explain_kernels import of_gpu
from llmapi._runtime.finding import Finding
from llmapi._runtime.linear_cuda import ROWS, bucket_of
from llmapi.config import EngineConfig
from tests.emulator.gpu import EmulatedGpu
from tests.tiny import tiny_checkpoint

NORM, COPY = Unit.of("norm.cu", LLM_DTYPE=2), Unit.of("step.cu")


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, EngineConfig, Any]:
    """A graph, its configuration as for a GPU, and the model's description."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", hidden_size=256)
    with LLM(folder, cache_dir=tmp_path_factory.mktemp("cache"), progress=False) as llm:
        made = llm._prepared
        graph = Graph.parse((made.engine / GRAPH_FILE).read_text(encoding="utf-8"))
        return graph, replace(made.config, backend="cuda", dtype="bfloat16", kv_dtype="bfloat16"), made.spec


@pytest.fixture
def gpu(kernel_folder: Path) -> Any:
    return EmulatedGpu(kernel_folder)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A cache; kernels that are compiled into it are a few bytes, for nothing here runs them."""
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_unit", lambda unit, arch: f"{unit} {arch}".encode())
    return Store(tmp_path)


def found(store: Store, step: Any, gpu: Any, **changes: Any) -> dict[str, Finding]:
    graph, config, _ = step
    return {f.kind: f for f in of_gpu(store, replace(config, **changes), graph, gpu)}


def test_kernels_of_this_gpu_are_counted(store: Store, step: Any, gpu: Any) -> None:
    first = found(store, step, gpu)["kernel"]
    assert first.found is False and first.note.startswith("none is compiled for sm_80 yet")
    for unit in (NORM, COPY):
        cached_cubin(store, unit, "sm_80")
    cached_cubin(store, NORM, "sm_90a")
    now = found(store, step, gpu)["kernel"]
    assert now.found and now.note.startswith("2 compiled for sm_80, ") and now.nearest is None


def test_a_kernel_whose_sources_or_compiler_changed(
    store: Store, step: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in (NORM, COPY):
        cached_cubin(store, unit, "sm_80")
    digest = nvrtc.source_text_digest
    monkeypatch.setattr(nvrtc, "source_text_digest", lambda name: "0" * 64 if name == "norm.cu" else digest(name))
    stale = found(store, step, gpu)["kernel"]
    assert stale.found is False and stale.note.startswith("1 of 2 for sm_80, ") and stale.nearest is not None
    manifest, diff = stale.nearest
    assert manifest.label == "norm.cu LLM_DTYPE=2 for sm_80" and [d.name for d in diff] == ["source"]
    cached_cubin(store, NORM, "sm_80")  # compiled anew: the old entry does not matter any more
    now = found(store, step, gpu)["kernel"]
    assert now.found and now.note.startswith("2 compiled ")
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    stale = found(store, step, gpu)["kernel"]
    assert stale.note.startswith("2 of 2 ") and stale.nearest is not None
    assert [str(d) for d in stale.nearest[1] if d.name == "nvrtc"] == ["nvrtc: 13.0 -> 13.1"]


def test_a_source_that_is_no_longer_part_of_the_package_does_not_count(store: Store, step: Any, gpu: Any) -> None:
    def build(staging: Staging) -> None:
        staging.write("kernel.cubin", b"code")

    store.build("kernel", compiled.kernel_key(NORM, "sm_80"), "gone.cu for sm_80", build).close()
    assert found(store, step, gpu)["kernel"].note.startswith("none is compiled")


@pytest.mark.parametrize("most", [8, 64])
def test_the_table_that_a_load_asks_for_is_the_one_looked_for(store: Store, step: Any, gpu: Any, most: int) -> None:
    """Cases as ``load_cuda`` lists them, from the weights themselves."""
    graph, config, spec = step
    config = replace(config, max_num_tokens=most)
    weights = {i.name: torch.empty(tuple(map(int, i.shape))) for i in graph.inputs if i.kind == "weight"}
    binder = Binder(gpu, graph, weights, spec, config)
    kernel = binder.choices.kernel
    assert kernel is not None
    cases = [
        binder.choices.name(rows, *w[0].shape, gate)
        for gate, w in binder.linear_groups()
        for rows in ROWS
        if rows <= bucket_of(most) and kernel.supports(rows, *w[0].shape)
    ]
    key = tuning_key(gpu.name, gpu.arch, "bfloat16", cases)
    missing = found(store, step, gpu, max_num_tokens=most)["tuning"]
    assert not missing.found and missing.key is not None and missing.key.digest == key.digest
    store.build("tuning", key, "tiny", lambda staging: staging.write(TUNING_FILE, b"{}")).close()
    assert found(store, step, gpu, max_num_tokens=most)["tuning"].found
    other = found(store, step, gpu, max_num_tokens=most, dtype="float16", kv_dtype="float16")["tuning"]
    assert other.nearest is not None and [str(d) for d in other.nearest[1]] == ["dtype: bfloat16 -> float16"]


def test_what_is_not_tuned_is_not_spoken_of(store: Store, step: Any, gpu: Any) -> None:
    assert set(found(store, step, gpu, dtype="float32", kv_dtype="float32")) == {"kernel"}
    unknown = of_gpu(store, step[1], None, gpu)[-1]
    assert (unknown.kind, unknown.found, unknown.note) == ("tuning", False, "a start has to export the graph first")
