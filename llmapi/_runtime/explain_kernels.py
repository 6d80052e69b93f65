"""Explain kernels: what a start would find of machine code, and of the choices that were measured with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmapi import _env
from llmapi._build import cpu_kernels
from llmapi._build.compiled import renewed_key, tuning_key
from llmapi._build.key import Key, Part
from llmapi._build.store import Manifest, Store
from llmapi._runtime.finding import Finding, look
from llmapi.config import EngineConfig

if TYPE_CHECKING:
    from llmapi._build.graph import Graph
    from llmapi._kernels.gpu import Gpu


def of_cpu(store: Store) -> Finding:
    """What a start on the CPU would find of the compiled kernels.

    Args:
        store: the cache.
    """
    instead = "PyTorch's operators do the work"
    if not _env.cpu_kernels():
        return Finding(cpu_kernels.KIND, None, None, note=f"LLMAPI_CPU_KERNELS is 0: {instead}")
    try:
        _, version = cpu_kernels.find_compiler()
    except cpu_kernels.NoKernels as error:
        return Finding(cpu_kernels.KIND, None, None, note=f"{error}: {instead}")
    return look(store, cpu_kernels.KIND, cpu_kernels.kernels_key(version))


def of_gpu(store: Store, config: EngineConfig, graph: Graph | None, gpu: Gpu) -> list[Finding]:
    """What a start on a GPU would find of machine code and of measured choices.

    Args:
        store: the cache.
        config: types and limits.
        graph: the step; None where it has to be exported first.
        gpu: the device.
    """
    return [_kernels(store, gpu.arch), *_tuning(store, config, graph, gpu)]


def _kernels(store: Store, arch: str) -> Finding:
    """Which kernels a model needs is decided when it is loaded, so this tells of all that this GPU ever ran.

    A kernel whose sources changed was compiled anew if it was used since, and then its old entry does not matter.
    """
    entries = [e for e in store.entries() if e.kind == "kernel" and Part("target", arch) in e.manifest.key.parts]
    here = {entry.digest for entry in entries}
    wanted: dict[str, tuple[Key, Manifest]] = {}  # the entry used last stands for its unit
    for entry in entries:
        key = renewed_key(entry.manifest)
        if key is not None:
            wanted[key.digest] = (key, entry.manifest)
    stale = [found for digest, found in wanted.items() if digest not in here]
    if not wanted:
        return Finding("kernel", None, note=f"none is compiled for {arch} yet; each is when it is first needed")
    if not stale:
        note = f"{len(wanted)} compiled for {arch}, of any model; others are compiled when they are first needed"
        return Finding("kernel", None, found=True, note=note)
    key, manifest = stale[-1]
    note = f"{len(stale)} of {len(wanted)} for {arch}, of any model, are compiled again when they are needed"
    return Finding("kernel", None, nearest=(manifest, manifest.key.diff(key)), note=note)


def _tuning(store: Store, config: EngineConfig, graph: Graph | None, gpu: Gpu) -> Iterator[Finding]:
    """Nothing for types whose linear layers are all torch's."""
    import torch

    from llmapi._runtime.graph_uses import GraphUses
    from llmapi._runtime.linear_cuda import LinearChoices, tuned_rows

    choices = LinearChoices(gpu, getattr(torch, config.dtype))
    if choices.kernel is None:
        return
    if graph is None:
        yield Finding("tuning", None, note="a start has to export the graph first")
        return
    shapes = {i.name: i.shape for i in graph.inputs if i.kind == "weight"}
    linears = [(gate, int(shapes[name][0]), int(shapes[name][1])) for name, gate in GraphUses(graph).linears()]
    cases = choices.cases(linears, tuned_rows(config))
    yield look(store, "tuning", tuning_key(gpu.name, gpu.arch, config.dtype, cases))
