"""Tiny models of every family as TensorRT networks, run by the evaluator over rows of a linear cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llmapi._build.export import export_graph
from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._build.tensorrt.package import Package, installed, load_package
from llmapi._build.tensorrt.path import NATIVE, AttentionPath
from llmapi._build.tensorrt.plan import make_network
from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import constants
from tests.models.test_parity import write_model
from tests.tensorrt.evaluator import Evaluator
from tests.tiny import tiny_config, tiny_model

MAX_SEQ_LEN = 64
SLOTS = 4


def package() -> Package:
    """TensorRT-RTX, which works without a GPU."""
    if "tensorrt_rtx" not in installed():
        pytest.skip("tensorrt_rtx is not installed")
    return load_package("tensorrt_rtx")


@dataclass
class Lowered:
    """A tiny model, its network, and the rows of a cache.

    Attributes:
        model: in transformers.
        spec, config, graph: what was lowered.
        weights: of the network, by the name of the input.
        evaluator: of the network.
        owner: keeps TensorRT's objects alive.
    """

    model: Any
    spec: TransformerSpec
    config: EngineConfig
    graph: Graph
    weights: dict[str, torch.Tensor]
    evaluator: Evaluator
    owner: Any

    def __post_init__(self) -> None:
        shape = (SLOTS, self.spec.num_kv_heads, MAX_SEQ_LEN, self.spec.head_dim)
        dtype = getattr(torch, self.config.dtype)
        # What was never written is not looked at: were it, the results would not be numbers.
        self.caches = {
            i.name: torch.full(shape, torch.nan, dtype=dtype)
            for i in self.graph.inputs
            if i.kind in ("k_cache", "v_cache")
        }

    def step(self, rows: list[tuple[list[int], int, int]], *, first: int = 0, pad: int = 0) -> torch.Tensor:
        """One step; logits of every new token, one sequence after the other.

        Args:
            rows: ids of a sequence, and which of them are new: from, to.
            first: row of the cache of the first sequence; the others follow.
            pad: tokens that each row is made longer by.
        """
        longest = max(stop - start for _, start, stop in rows) + pad
        ids = torch.zeros(len(rows), longest, dtype=torch.int32)
        starts = torch.tensor([start for _, start, _ in rows], dtype=torch.int32)
        for row, (tokens, start, stop) in enumerate(rows):
            ids[row, : stop - start] = torch.tensor(tokens[start:stop])
        wanted = [row * longest + i for row, (_, a, b) in enumerate(rows) for i in range(b - a)]
        step = {
            "input_ids": ids,
            "positions": starts[:, None] + torch.arange(longest, dtype=torch.int32),
            "write_index": starts,
            "kv_lengths": starts + longest,
            "logits_indices": torch.tensor(wanted, dtype=torch.int32),
        }
        window = {name: cache[first : first + len(rows)] for name, cache in self.caches.items()}
        return self.evaluator.run({**self.weights, **step, **window})["logits"]


def lowered(
    family: str, overrides: dict[str, Any], folder: Any, dtype: str = "float32", path: AttentionPath = NATIVE
) -> Lowered:
    """A tiny model as a network.

    Args:
        family, overrides: see :func:`tests.tiny.tiny_config`.
        folder: for its weights.
        dtype: of the network.
        path: how attention is done.
    """
    model = tiny_model(tiny_config(family, **overrides))
    file = folder / f"{dtype}.safetensors"
    spec = write_model(model, file, dtype)
    limits = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": SLOTS}
    config = resolve(EngineOptions(backend="tensorrt", dtype=dtype, **limits), spec)
    graph = export_graph(spec)
    found = package()
    builder, logger, net = make_network(found, graph, spec, config, constants(spec), path)
    tensors = TensorFile(file)
    weights = {i.name: tensors.read(i.parts) for i in graph.inputs if i.kind == "weight"}
    evaluator = Evaluator(found.trt, net.definition)
    return Lowered(model, spec, config, graph, weights, evaluator, (builder, logger, net))
