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
from llmapi._build.tensorrt.buckets import BLOCK_SIZE, buckets_of, choose, table_width
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.path import AttentionPath
from llmapi._build.tensorrt.plan import make_network
from llmapi._build.tensorrt.plugin_path import PATH
from llmapi._kernels.norm import add_rms_norm
from llmapi._kernels.paged_attention import paged_attention
from llmapi._kernels.plugins import pool_addresses
from llmapi._kernels.plugins.pools import POOL_GUARD
from llmapi._kernels.rotary import rotary_kv_write
from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import constants
from tests.models.test_parity import write_model
from tests.tensorrt.evaluator import Evaluator
from tests.tensorrt.fake_network import fake_tensorrt
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
        self.evaluator = Evaluator(trt, net.definition, {"PLUGIN": self._plugin})
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
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, first, stop in parts:
            while len(sequence.blocks) * BLOCK_SIZE < stop:
                sequence.blocks.append(self._free.pop())
            ids += sequence.ids[first:stop]
            positions += range(first, stop)
            slots += [sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, stop)]
            starts.append(len(ids))
        rows = list(range(len(ids))) if wanted is None else wanted
        index = choose(self.buckets, len(ids), len(parts), len(rows))
        self.used.append(index)
        bucket = self.buckets[index]
        width = table_width(self.config.max_seq_len)
        odd = BLOCKS + 7  # no block: padding that is read shows
        tables = [s.blocks + [odd] * (width - len(s.blocks)) for s, _, _ in parts]
        step = {
            "input_ids": padded(ids, bucket.tokens, 0),
            "positions": padded(positions, bucket.tokens, 0),
            "slot_mapping": padded(slots, bucket.tokens, -1),
            "block_tables": torch.stack([padded(t, width, odd) for t in padded_list(tables, bucket.sequences)]),
            "seq_lens": padded([stop for _, _, stop in parts], bucket.sequences, 0),
            "query_start": padded(starts, bucket.sequences + 1, len(ids)),
            "logits_indices": padded(rows, bucket.rows, 0),
        }
        pools = pool_addresses(self.caches)  # type: ignore[arg-type]
        return self.evaluator.run({**self.weights, **step, "pools": pools})["logits"][: len(rows)]

    # ---- plugins, by the references of the operators that they stand for

    def _plugin(self, layer: Any, x: list[torch.Tensor]) -> Any:
        return getattr(self, f"_{layer.plugin}")(x, layer.attributes)

    def _caches_of(self, pools: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert int(pools[0]) == POOL_GUARD
        return self._at[int(pools[1 + 2 * layer])], self._at[int(pools[2 + 2 * layer])]

    def _shape(self, a: dict[str, Any]) -> None:
        given = (a["heads"], a["kv_heads"], a["head_dim"], a["arch"])
        assert given == (self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim, 89)

    def _rotary_kv_write(self, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        qkv, cos_sin, slots, pools = x
        self._shape(a)
        assert cos_sin.shape[1] == a["rotary_dim"]
        return rotary_kv_write(qkv, cos_sin, slots, *self._caches_of(pools, a["layer"]), bool(a["interleaved"]))

    def _kv_write(self, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        qkv, slots, pools = x
        self._shape(a)
        return rotary_kv_write(qkv, None, slots, *self._caches_of(pools, a["layer"]), False)

    def _paged_attention(self, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        q, pools, tables, lengths, starts = x
        self._shape(a)
        assert a["block_size"] == BLOCK_SIZE
        keys, values = self._caches_of(pools, a["layer"])
        out = paged_attention(
            q, keys, values, tables, lengths, starts, a["scale"], a["window"], a["softcap"], None, None
        )
        out[int(starts[-1]) :] = 0  # rows of no sequence
        return out

    def _add_rms_norm(self, x: list[torch.Tensor], a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        assert a["width"] == x[2].shape[0] and a["arch"] == 89
        normed, total = add_rms_norm(x[0], x[1], x[2], a["eps"])
        return normed, total


def padded(values: list[int], size: int, fill: int) -> torch.Tensor:
    """As int32, made as long as a bucket has it."""
    return torch.tensor(values + [fill] * (size - len(values)), dtype=torch.int32)


def padded_list(tables: list[list[int]], size: int) -> list[list[int]]:
    """Tables of a bucket's sequences; those of no sequence are empty."""
    return tables + [[]] * (size - len(tables))


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
