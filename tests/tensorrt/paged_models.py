"""Tiny models as networks with plugins, recorded by the stand-in and run by the evaluator over a paged cache."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from llmapi._build.export import export_graph
from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._build.tensorrt.buckets import buckets_of, choose, table_width
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.path import AttentionPath
from llmapi._build.tensorrt.plan import make_network
from llmapi._build.tensorrt.plugin_path import PATH
from llmapi._kernels.plugins import pool_addresses
from llmapi._runtime.padded_step import PaddedStep, empty_step
from llmapi._tensorrt import BLOCK_SIZE
from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import constants
from tests.models.test_parity import write_model
from tests.tensorrt.evaluator import Evaluator
from tests.tensorrt.fake_network import fake_tensorrt
from tests.tensorrt.plugin_rules import PluginRules
from tests.tiny import tiny_config, tiny_model

MAX_SEQ_LEN = 200
BATCH = 4
BLOCKS = 24
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "mistral": {"head_dim": 64, "sliding_window": 70},
    "qwen2": {"head_dim": 64},
    "gpt2": {"n_embd": 128, "n_head": 2},
}
"""What makes the tiny models' heads 64 wide: the plugins take none smaller."""


@dataclass
class Sequence:
    """Tokens, and the blocks that hold their keys and values, in no order."""

    ids: list[int]
    blocks: list[int] = field(default_factory=list)


class PagedNetwork:
    """A tiny model, its network, and a paged cache that the network knows by addresses.

    Args:
        model: in transformers.
        spec, config, graph: what was lowered.
        weights: of the network by name.
        trt: the stand-in.
        net: the network.
    """

    def __init__(
        self, model: Any, spec: TransformerSpec, config: EngineConfig, graph: Graph, weights: dict[str, torch.Tensor],
        trt: Any, net: Any,
    ) -> None:  # fmt: skip
        self.model, self.spec, self.config, self.graph, self.weights = model, spec, config, graph, weights
        self.net, self.definition = net, net.definition
        rules = PluginRules(lambda address: self._at[address], spec, strict=False)  # faults are to show in numbers
        self.evaluator = Evaluator(trt, net.definition, {"PLUGIN": rules})
        self.buckets = buckets_of(config)
        shape = (BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
        dtype = getattr(torch, config.dtype)
        # What was never written is not looked at: were it, the results would not be numbers.
        self.caches = [tuple(torch.full(shape, torch.nan, dtype=dtype) for _ in "kv") for _ in range(spec.num_layers)]
        self._at = {cache.data_ptr(): cache for pair in self.caches for cache in pair}
        self._free = list(range(BLOCKS))
        random.Random(11).shuffle(self._free)
        self.used: list[int] = []

    def step(self, parts: list[tuple[Sequence, int, int]], wanted: list[int] | None = None) -> torch.Tensor:
        """One step in the smallest bucket that it fits in; logits of the wanted rows.

        Args:
            parts: sequences, and which of their tokens are new: from, to.
            wanted: rows; None for all.
        """
        batch = empty_step()
        for sequence, first, stop in parts:
            while len(sequence.blocks) * BLOCK_SIZE < stop:
                sequence.blocks.append(self._free.pop())
            batch.input_ids += sequence.ids[first:stop]
            batch.positions += range(first, stop)
            batch.slot_mapping += [
                sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, stop)
            ]
            batch.block_tables.append(sequence.blocks)
            batch.seq_lens.append(stop)
            batch.query_start.append(len(batch.input_ids))
        batch.logits_indices += range(len(batch.input_ids)) if wanted is None else wanted
        index = choose(self.buckets, len(batch.input_ids), len(parts), len(batch.logits_indices))
        self.used.append(index)
        padded = PaddedStep.of(self.buckets[index], table_width(self.config.max_seq_len))
        memory = torch.full((padded.size,), 12345, dtype=torch.int32)
        padded.fill(memory.numpy(), batch)
        pools = pool_addresses(self.caches)  # type: ignore[arg-type]
        step = padded.views(memory)
        return self.evaluator.run({**self.weights, **step, "pools": pools})["logits"][: len(batch.logits_indices)]


def options(**more: Any) -> EngineOptions:
    """Limits of the tiny engines."""
    limits = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": BATCH, "max_num_tokens": 256, "dtype": "float32"}
    return EngineOptions(backend="tensorrt", **{**limits, **more})


def lowered_with_plugins(
    family: str, folder: Any, path: AttentionPath = PATH, dtype: str = "float32", **overrides: Any
) -> PagedNetwork:
    """A tiny model as a network with plugins, for SM89.

    Args:
        family: llama, mistral, qwen2 or gpt2.
        folder: for its weights.
        path: how attention is done.
        dtype: of the network.
        overrides: fields of its configuration to change.
    """
    model = tiny_model(tiny_config(family, **{**SIZES[family], **overrides}))
    file = folder / "weights.safetensors"
    spec = write_model(model, file, dtype)
    config, graph = resolve(options(dtype=dtype), spec), export_graph(spec)
    with fake_tensorrt() as trt, pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmapi._build.tensorrt.plugin_path.arch_at_hand", lambda: "sm_89")
        package = Package("tensorrt", trt.__version__, trt)
        *_, net = make_network(package, graph, spec, config, constants(spec), path)
    tensors = TensorFile(file)
    weights = {i.name: tensors.read(i.parts) for i in graph.inputs if i.kind == "weight"}
    return PagedNetwork(model, spec, config, graph, weights, trt, net)
