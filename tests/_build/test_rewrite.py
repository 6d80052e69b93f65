"""Rewrites leave the outputs as they were, and do what they promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx

from llmapi._build.export import to_graph, trace
from llmapi._build.graph import Graph
from llmapi._build.rewrite import REWRITES, fuse_add_norm, merge_sibling_linears, rewrite
from llmapi._kernels import relative_error
from llmapi.models.family import spec_of
from llmapi.models.transformer import constants
from tests.tiny import tiny_config

torch.set_num_threads(1)
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
}


def traced(case: str) -> tuple[Any, fx.GraphModule]:
    architecture, overrides = FAMILIES[case]
    config = tiny_config(case.split("-")[0], num_hidden_layers=2, **overrides).to_dict()
    spec = spec_of({**config, "architectures": [architecture]})
    return spec, trace(spec)


def evaluate(spec: Any, module: fx.GraphModule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a module on seeded values of its inputs; logits and the caches it wrote."""
    blocks, size, tokens = 4, 8, 11
    step = {
        "input_ids": torch.arange(tokens, dtype=torch.int32) * 7 % spec.vocab_size,
        "positions": torch.arange(tokens, dtype=torch.int32),
        "slot_mapping": torch.arange(8, 8 + tokens, dtype=torch.int32),
        "block_tables": torch.tensor([[1, 2]], dtype=torch.int32),
        "seq_lens": torch.tensor([tokens], dtype=torch.int32),
        "query_start": torch.tensor([0, tokens], dtype=torch.int32),
        "logits_indices": torch.tensor([3, tokens - 1], dtype=torch.int32),
    }

    def part(name: str, rows: int, tail: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(rows, *tail, generator=generator) * 0.2

    values, caches = [], []
    rows_of = {
        p: (spec.q_size if ".q." in p else spec.kv_size if ".k." in p or ".v." in p else spec.intermediate_size)
        for node in module.graph.find_nodes(op="placeholder")
        for p in node.meta["input"].parts
        if len(node.meta["input"].parts) > 1
    }
    for node in module.graph.find_nodes(op="placeholder"):
        meta = node.meta["input"]
        if meta.kind == "weight":
            pieces = [part(p, rows_of.get(p, meta.shape[0]), meta.shape[1:]) for p in meta.parts]
            value = torch.cat(pieces)
            assert tuple(value.shape) == meta.shape
        elif meta.kind == "constant":
            value = constants(spec)[meta.name]
        elif meta.kind == "step":
            value = step[meta.name]
        else:
            value = torch.zeros(blocks, size, spec.num_kv_heads, spec.head_dim)
            caches.append(value)
        values.append(value)
    (logits,) = module(*values)
    return logits, caches


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("step", [*REWRITES, rewrite], ids=lambda f: f.__name__)
def test_outputs_stay_the_same(case: str, step: Any) -> None:
    spec, module = traced(case)
    before, caches_before = evaluate(spec, module)
    after, caches_after = evaluate(spec, step(copy.deepcopy(module)))
    assert relative_error(after, before) < 1e-6
    for a, b in zip(caches_after, caches_before, strict=True):
        assert relative_error(a, b) < 1e-6


def count(graph: Graph, op: str) -> int:
    return sum(node.op == op for node in graph.nodes)


@pytest.mark.parametrize(("case", "before", "after"), [("llama", 15, 9), ("gpt2", 13, 9), ("llama-biases", 15, 9)])
def test_sibling_linears_become_one(case: str, before: int, after: int) -> None:
    _, module = traced(case)
    assert count(to_graph(module), "aten.linear.default") == before
    graph = to_graph(merge_sibling_linears(module))
    assert count(graph, "aten.linear.default") == after
    assert count(graph, "aten.cat.default") == 0
    merged = [i for i in graph.inputs if len(i.parts) == 3]
    assert merged[0].parts == tuple(f"layers.0.attn.{p}.weight" for p in "qkv")
    assert len({part for i in graph.inputs if i.kind == "weight" for part in i.parts}) == sum(
        len(i.parts) for i in graph.inputs if i.kind == "weight"
    ), "a weight is an input twice"


def test_linears_of_different_inputs_are_left_alone() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat((self.a(x), self.b(y)), -1)

    program = torch.export.export(Two(), (torch.ones(2, 4), torch.ones(2, 4)))
    module = program.graph_module
    merge_sibling_linears(module)
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 2


@pytest.mark.parametrize(("case", "fused"), [("llama", 4), ("gpt2", 5)])
def test_residual_adds_move_into_the_norm(case: str, fused: int) -> None:
    """Every add: the rows whose logits are wanted are chosen before the last ones."""
    _, module = traced(case)
    graph = to_graph(fuse_add_norm(module))
    assert count(graph, "llmapi.add_rms_norm.default") + count(graph, "llmapi.add_layer_norm.default") == fused
    assert count(graph, "aten.add.Tensor") == 0


def test_graph_text_is_canonical_and_survives() -> None:
    _, module = traced("llama")
    graph = to_graph(rewrite(module))
    assert Graph.parse(graph.text) == graph
    assert to_graph(rewrite(traced("llama")[1])).digest == graph.digest
    assert to_graph(traced("llama")[1]).digest != graph.digest


def test_a_broken_graph_is_refused() -> None:
    from llmapi.errors import CacheError

    with pytest.raises(CacheError, match="cannot be read"):
        Graph.parse('{"inputs": []')
