"""Every family's network, evaluated layer by layer, against transformers: prefill, decode and ragged batches."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmapi._build.graph import Graph, Node
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.path import NATIVE, attention_path
from llmapi._build.tensorrt.plan import make_network
from llmapi._kernels import attention_tensorrt, relative_error
from llmapi._kernels.tensorrt_network import Network
from llmapi.errors import BuildError
from llmapi.models.transformer import constants
from tests.models.test_parity import CASES
from tests.tensorrt.models import MAX_SEQ_LEN, lowered, package
from tests.tiny import VOCAB

torch.set_num_threads(1)


def truth(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Prefill in chunks of uneven length, padded and not, then 20 decode steps: each within 1e-4."""
    family, overrides = CASES[case]
    net = lowered(family, overrides, tmp_path)
    ids = random.Random(3).choices(range(VOCAB), k=60)
    expected = truth(net.model, ids)
    parts = [
        net.step([(ids, 0, 13)], first=2),
        net.step([(ids, 13, 33)], first=2, pad=12),
        net.step([(ids, 33, 40)], first=2, pad=9),
        *(net.step([(ids, i, i + 1)], first=2) for i in range(40, 60)),
    ]
    start = 0
    for part in parts:
        assert relative_error(part, expected[start : start + len(part)]) < 1e-4, f"from token {start}"
        start += len(part)
    assert start == 60


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_ragged_batches_over_slots(family: str, tmp_path: Path) -> None:
    """Sequences of four lengths, prefilled together and alone, decoded together."""
    net = lowered(family, {}, tmp_path)
    rng = random.Random(5)
    texts = [rng.choices(range(VOCAB), k=n + 20) for n in (21, 3, 13, 1)]
    starts = [len(t) - 20 for t in texts]
    together = net.step([(t, 0, n) for t, n in zip(texts[:3], starts, strict=False)])
    alone = net.step([(texts[3], 0, 1)], first=3)
    expected = [truth(net.model, t) for t in texts]
    prompts = torch.cat([e[:n] for e, n in zip(expected, starts, strict=True)])
    assert relative_error(torch.cat((together, alone)), prompts) < 1e-4
    for i in range(20):
        rows = [(t, n + i, n + i + 1) for t, n in zip(texts, starts, strict=True)]
        wanted = torch.stack([e[n + i] for e, n in zip(expected, starts, strict=True)])
        assert relative_error(net.step(rows), wanted) < 1e-4, f"decode step {i}"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_near_float32(family: str, dtype: str, tmp_path: Path) -> None:
    """No further from float32 than transformers in the same type, but for half as much again."""
    net = lowered(family, {}, tmp_path, dtype)
    ids = random.Random(3).choices(range(VOCAB), k=50)
    expected = truth(net.model, ids)
    ours = torch.cat((net.step([(ids, 0, 30)]), *(net.step([(ids, i, i + 1)]) for i in range(30, 50))))
    assert ours.dtype == getattr(torch, dtype)
    theirs = relative_error(truth(net.model.to(getattr(torch, dtype)), ids), expected)
    assert relative_error(ours, expected) < 1.5 * theirs + 1e-3, theirs


def test_layers_are_named_after_their_modules(tmp_path: Path) -> None:
    net = lowered("llama", {}, tmp_path)
    definition = net.owner[2].definition
    names = [definition.get_layer(i).name for i in range(definition.num_layers)]
    assert len(set(names)) == len(names)
    modules = {"model", *(node.path for node in net.graph.nodes)}
    assert {name.partition("/")[0] for name in names} <= modules
    assert "layers.1.attn/kv_write" in names and "layers.2.mlp.down/matmul" in names
    assert {i.name for i in net.graph.inputs if i.kind == "weight"} <= {
        definition.get_input(i).name for i in range(definition.num_inputs)
    }
    assert net.evaluator.constant_values() < 2 * MAX_SEQ_LEN + 100, "weights are inputs"


# ---- what must be noticed


def shifted_write(net: Network, qkv: Any, cos_sin: Any, index: Any, *rest: Any) -> Any:
    one = net.constant(torch.ones(1, dtype=torch.int32))
    return attention_tensorrt.rotary_kv_write(net, qkv, cos_sin, net.binary("SUM", index, one), *rest)


def unscaled(net: Network, q: Any, k: Any, v: Any, pos: Any, lens: Any, start: Any, scale: float, *rest: Any) -> Any:
    return attention_tensorrt.paged_attention(net, q, k, v, pos, lens, start, 1.0, *rest)


def wider_window(net: Network, q: Any, k: Any, v: Any, pos: Any, lens: Any, start: Any, scale: float, window: int,
                 *rest: Any) -> Any:  # fmt: skip
    return attention_tensorrt.paged_attention(net, q, k, v, pos, lens, start, scale, window + 1, *rest)


def other_pairs(net: Network, qkv: Any, cos_sin: Any, index: Any, k: Any, v: Any, interleaved: bool) -> Any:
    return attention_tensorrt.rotary_kv_write(net, qkv, cos_sin, index, k, v, not interleaved)


def swapped_caches(net: Network, qkv: Any, cos_sin: Any, index: Any, k: Any, v: Any, interleaved: bool) -> Any:
    return attention_tensorrt.rotary_kv_write(net, qkv, cos_sin, index, v, k, interleaved)


class SwappedAxes(Network):
    """Heads and channels are taken for each other where queries, keys and values are laid out."""

    def reshape(self, x: Any, shape: Any, *, before: Any = (), after: Any = ()) -> Any:
        return super().reshape(x, shape, before=before, after=(0, 3, 1, 2) if after == (0, 2, 1, 3) else after)


class SwappedGate(Network):
    """The halves of gate and up are taken for each other."""

    def slice(self, x: Any, start: int, size: int) -> Any:
        return super().slice(x, size - start if x.shape[-1] == 2 * size else start, size)


class NoRoot(Network):
    """A norm divides by the mean square, not by its root."""

    def unary(self, op: str, x: Any) -> Any:
        return x if op == "SQRT" else super().unary(op, x)


WRITE, ATTEND = "llmapi.rotary_kv_write.default", "llmapi.paged_attention.default"
FAULTS: dict[str, Any] = {
    "cache index off by one": {WRITE: shifted_write},
    "missing scale": {ATTEND: unscaled},
    "window off by one": {ATTEND: wider_window},
    "other rotary pairs": {WRITE: other_pairs},
    "keys for values": {WRITE: swapped_caches},
    "swapped axes": SwappedAxes,
    "swapped gate": SwappedGate,
    "no root": NoRoot,
    "none": {},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads of four channels, so that swapped axes fit and only the numbers tell."""
    made = FAULTS[fault]
    path = NATIVE
    if isinstance(made, dict):
        path = replace(NATIVE, table=made)
    else:
        monkeypatch.setattr("llmapi._build.tensorrt.plan.Network", made)
    sizes = {"sliding_window": 3, "head_dim": 4, "num_key_value_heads": 4}
    net = lowered("mistral", sizes, tmp_path, path=path)
    for cache in net.caches.values():
        cache.zero_()  # a wrong index shows as wrong numbers, not as none
    ids = random.Random(9).choices(range(VOCAB), k=9)
    parts = torch.cat((net.step([(ids, 0, 4)]), net.step([(ids, 4, 8)]), net.step([(ids, 8, 9)])))
    error = relative_error(parts, truth(net.model, ids))
    assert (error < 1e-4) == (fault == "none"), error


# ---- what cannot be lowered


def test_unsupported_nodes_are_named_all_at_once(tmp_path: Path) -> None:
    net = lowered("llama", {}, tmp_path)
    strange = [
        Node("odd", "aten.cumsum.default", (net.graph.nodes[0].args[0], 0), {}, "layers.1.mlp"),
        Node("other", "llmapi.no_such_operator.default", (), {}, ""),
    ]
    graph = Graph(net.graph.inputs, (*net.graph.nodes, *strange), net.graph.output)
    with pytest.raises(BuildError, match="2 nodes have no TensorRT lowering") as caught:
        make_network(package(), graph, net.spec, net.config, constants(net.spec))
    assert "aten.cumsum.default at layers.1.mlp (node odd)" in str(caught.value)
    assert "llmapi.no_such_operator.default at the model (node other)" in str(caught.value)
    assert "backend='cuda' or 'cpu'" in str(caught.value)


def test_a_form_that_is_not_lowered_is_named_with_its_place(tmp_path: Path) -> None:
    net = lowered("llama", {}, tmp_path)
    nodes = tuple(
        replace(n, args=(n.args[0], [2, -1, 32])) if n.op == "aten.view.default" else n for n in net.graph.nodes
    )
    with pytest.raises(BuildError, match=r"aten\.view\.default at layers\.0\.attn .*a view as \[2, -1, 32\]"):
        make_network(
            package(), Graph(net.graph.inputs, nodes, net.graph.output), net.spec, net.config, constants(net.spec)
        )


def test_attention_is_asked_for_by_name() -> None:
    assert attention_path("native") is NATIVE
    with pytest.raises(BuildError, match="'natvie'; did you mean 'native'"):
        attention_path("natvie")


def test_a_tensorrt_without_the_layers_is_named(tmp_path: Path) -> None:
    net = lowered("llama", {}, tmp_path)
    trt = SimpleNamespace(INetworkDefinition=SimpleNamespace(add_rotary_embedding=None))
    with pytest.raises(BuildError, match=r"tensorrt 10\.13\.0 has no add_kv_cache_update, add_attention_v2, which"):
        make_network(Package("tensorrt", "10.13.0", trt), net.graph, net.spec, net.config, constants(net.spec))
