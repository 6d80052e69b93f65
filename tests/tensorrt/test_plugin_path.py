"""The plugin path: recorded networks against transformers, over scattered blocks, and what the plan is built with.

No TensorRT is behind them: the stand-in says what the lowering asked for, and the plugins are computed by the
references of their operators. Their kernels are tested in tests/_kernels/plugins/.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM
from llmapi._build.artifact_keys import plan_key
from llmapi._build.export import export_graph
from llmapi._build.graph import STEP_INPUTS
from llmapi._build.tensorrt import plugin_path
from llmapi._build.tensorrt.buckets import Bucket, buckets, buckets_in, buckets_of, choose
from llmapi._build.tensorrt.package import Package
from llmapi._build.tensorrt.path import NATIVE, AttentionPath, attention_path
from llmapi._build.tensorrt.plan import build_plan, make_network
from llmapi._build.tensorrt.plugin_path import PATH
from llmapi._kernels import plugins, relative_error
from llmapi._kernels.tensorrt_network import Network
from llmapi._runtime.explain import explain
from llmapi._runtime.tensorrt_plan import read_plan
from llmapi._tensorrt import BLOCK_SIZE
from llmapi.config import resolve
from llmapi.errors import BuildError, CapacityError
from llmapi.models.transformer import constants
from tests._runtime.test_engine_cpu import SPEC
from tests.tensorrt.fake_network import fake_tensorrt
from tests.tensorrt.models import package
from tests.tensorrt.paged_models import PagedNetwork, Sequence, lowered_with_plugins, options
from tests.tiny import VOCAB, tiny_checkpoint

torch.set_num_threads(1)

PROMPTS = (70, 3, 126, 1)
DECODED = 5


def error_of(net: PagedNetwork, prompts: tuple[int, ...] = PROMPTS) -> float:
    """The largest relative error: ragged prompts in one step, a chunk beside decoding, then decode steps together."""
    rng = random.Random(5)
    texts = [rng.choices(range(VOCAB), k=n + DECODED) for n in prompts]
    sequences = [Sequence(ids) for ids in texts]
    with torch.no_grad():
        expected = [net.model(torch.tensor([ids])).logits[0] for ids in texts]
    last = len(prompts) - 1
    first = net.step([(s, 0, n) for s, n in zip(sequences[:last], prompts, strict=False)])
    worst = relative_error(first, torch.cat([e[:n] for e, n in zip(expected[:last], prompts, strict=False)]))

    def later(parts: list[tuple[int, int, int]]) -> float:
        """A step of which only each sequence's last row is wanted."""
        ends = torch.tensor([stop - begin for _, begin, stop in parts]).cumsum(0) - 1
        found = net.step([(sequences[i], begin, stop) for i, begin, stop in parts], ends.tolist())
        return relative_error(found, torch.stack([expected[i][stop - 1] for i, _, stop in parts]))

    joined = [(0, prompts[0], prompts[0] + 1), (last, 0, prompts[last]), (1, prompts[1], prompts[1] + 2)]
    errors = [worst, later(joined)]
    at = list(prompts)
    at[0], at[1] = at[0] + 1, at[1] + 2
    while all(n < len(t) for n, t in zip(at, texts, strict=True)):
        errors.append(later([(i, n, n + 1) for i, n in enumerate(at)]))
        at = [n + 1 for n in at]
    assert len(errors) == 2 + DECODED - 2
    return float("inf") if any(e != e for e in errors) else max(errors)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    net = lowered_with_plugins(family, tmp_path)
    assert error_of(net) < 1e-4
    assert {(net.buckets[i].tokens, net.buckets[i].rows) for i in net.used} == {(256, 256), (4, 4)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_near_float32(family: str, dtype: str, tmp_path: Path) -> None:
    """The worst step is no further from float32 than transformers in the same type, but for half as much again."""
    net = lowered_with_plugins(family, tmp_path, dtype=dtype)
    ours = error_of(net)
    ids = torch.tensor([random.Random(3).choices(range(VOCAB), k=100)])
    with torch.no_grad():
        exact = net.model(ids).logits[0]
        theirs = relative_error(net.model.to(getattr(torch, dtype))(ids).logits[0], exact)
    assert ours < 1.5 * theirs + 1e-3, theirs


def test_the_network_takes_the_graphs_own_step(tmp_path: Path) -> None:
    """No cache is among its tensors, weights are inputs, and attention takes what the write gives."""
    net = lowered_with_plugins("llama", tmp_path)
    inputs = {t.name: t for t in map(net.definition.get_input, range(net.definition.num_inputs))}
    weights = {i.name for i in net.graph.inputs if i.kind == "weight"}
    assert set(inputs) == {*STEP_INPUTS, "pools"} | weights
    assert {n: inputs[n].shape for n in STEP_INPUTS} == {
        "input_ids": (-1,), "positions": (-1,), "slot_mapping": (-1,), "block_tables": (-1, 4), "seq_lens": (-1,),
        "query_start": (-1,), "logits_indices": (-1,),
    }  # fmt: skip
    assert inputs["pools"].shape == (7,) and inputs["pools"].dtype.name == "INT64"
    outputs = [net.definition.get_output(i).name for i in range(net.definition.num_outputs)]
    assert outputs == ["logits", "hidden_states"] and net.evaluator.constant_values() < 200
    layers = [net.definition.get_layer(i) for i in range(net.definition.num_layers)]
    assert len({layer.name for layer in layers}) == len(layers)
    by_name = {layer.name: layer for layer in layers if layer.kind == "PLUGIN"}
    assert len(by_name) == 3 + 3 + 6  # writes, attentions, residual adds with their norms
    for i in range(3):
        write, attention = by_name[f"layers.{i}.attn/kv_write"], by_name[f"layers.{i}.attn/attention"]
        assert attention.inputs[0] is write.outputs[0]
        assert write.attributes["layer"] == attention.attributes["layer"] == i
        assert attention.attributes["block_size"] == BLOCK_SIZE


# ---- what must be noticed


def shifted(net: Network, x: Any) -> Any:
    return net.binary("SUM", x, net.constant(torch.ones(1, dtype=torch.int32)))


def wrong_slot(net: Network, qkv: Any, cos_sin: Any, slots: Any, *rest: Any) -> Any:
    return plugin_path.rotary_kv_write(net, qkv, cos_sin, shifted(net, slots), *rest)


def wrong_layer(net: Network, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return plugin_path.paged_attention(net, q, replace(k, layer=0), replace(v, layer=0), *rest)


def other_pairs(net: Network, qkv: Any, cos_sin: Any, slots: Any, k: Any, v: Any, interleaved: bool) -> Any:
    return plugin_path.rotary_kv_write(net, qkv, cos_sin, slots, k, v, not interleaved)


def swapped_positions(net: Network, positions: Any, inv_freq: Any, scale: float) -> Any:
    """Slots are taken for positions."""
    by_name = {t.name: t for t in map(net.definition.get_input, range(net.definition.num_inputs))}
    return plugin_path.rotary_cos_sin(net, by_name["slot_mapping"], inv_freq, scale)


def swapped_halves(net: Network, positions: Any, inv_freq: Any, scale: float) -> Any:
    column = net.binary("PROD", net.reshape(net.wide(positions), (-1, 1)), net.vector(inv_freq, 2))
    return net.concat([net.unary("SIN", column), net.unary("COS", column)])


def unscaled(net: Network, q: Any, k: Any, v: Any, tables: Any, lengths: Any, starts: Any, scale: float,
             *rest: Any) -> Any:  # fmt: skip
    return plugin_path.paged_attention(net, q, k, v, tables, lengths, starts, 1.0, *rest)


def wider_window(net: Network, q: Any, k: Any, v: Any, tables: Any, lengths: Any, starts: Any, scale: float,
                 window: int, *rest: Any) -> Any:  # fmt: skip
    return plugin_path.paged_attention(net, q, k, v, tables, lengths, starts, scale, window + 1, *rest)


def swapped_sums(net: Network, *rest: Any) -> Any:
    normed, total = plugin_path.add_rms_norm(net, *rest)
    return total, normed


ANGLES, WRITE = "llmapi.rotary_cos_sin.default", "llmapi.rotary_kv_write.default"
ATTEND, NORM = "llmapi.paged_attention.default", "llmapi.add_rms_norm.default"
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("mistral", {}),
    "wrong slot": ("mistral", {WRITE: wrong_slot}),
    "wrong slot, gpt2": ("gpt2", {WRITE: wrong_slot}),
    "wrong layer": ("mistral", {ATTEND: wrong_layer}),
    "other rotary pairs": ("mistral", {WRITE: other_pairs}),
    "slots for positions": ("mistral", {ANGLES: swapped_positions}),
    "sines for cosines": ("mistral", {ANGLES: swapped_halves}),
    "missing scale": ("mistral", {ATTEND: unscaled}),
    "window off by one": ("mistral", {ATTEND: wider_window}),
    "norm for sum": ("mistral", {NORM: swapped_sums}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, tmp_path: Path) -> None:
    family, table = FAULTS[fault]
    net = lowered_with_plugins(family, tmp_path, replace(PATH, table={**PATH.table, **table}))
    for pair in net.caches:
        for cache in pair:
            cache.zero_()  # a wrong place shows as wrong numbers, not as none
    error = error_of(net)
    assert (error < 1e-4) == (fault == "none"), error


@pytest.mark.parametrize("name", ["positions", "slot_mapping", "block_tables", "seq_lens"])
def test_a_wrong_step_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network, given a step whose integers are in another order: none of its inputs is left unread."""
    net = lowered_with_plugins("llama", tmp_path)
    run = net.evaluator.run

    def turned(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = inputs[name]
        real = int(inputs["query_start"][-1]) if name in ("positions", "slot_mapping") else 3
        order = torch.cat((torch.arange(real).flip(0), torch.arange(real, len(given))))
        return run({**inputs, name: given[order]})

    monkeypatch.setattr(net.evaluator, "run", turned)
    for pair in net.caches:
        for cache in pair:
            cache.zero_()
    assert not error_of(net, (20, 22, 24, 1)) < 1e-4


def test_keys_and_values_of_two_layers_are_refused(tmp_path: Path) -> None:
    def crossed(net: Network, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return plugin_path.paged_attention(net, q, v, k, *rest)

    with pytest.raises(BuildError, match=r"at layers\.0\.attn .*keys from v_cache\.0 and values from k_cache\.0"):
        lowered_with_plugins("llama", tmp_path, replace(PATH, table={**PATH.table, ATTEND: crossed}))


# ---- profiles, key, choice


def test_profiles_are_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_path, "arch_at_hand", lambda: "sm_89")
    spec = replace(SPEC, head_dim=64)
    config = resolve(options(max_num_tokens=20), spec)
    with fake_tensorrt() as trt:
        plan, info = build_plan(
            Package("tensorrt", trt.__version__, trt), export_graph(spec), spec, config, constants(spec), path=PATH
        )
    assert json.loads(bytes(plan)) == {"network": 0, "cleared": ["TF32"], "profiles": info.profiles}
    assert info.attention == "plugin" and list(info.outputs) == ["logits", "hidden_states"]
    assert (info.targets, info.block_size) == (["sm89"], BLOCK_SIZE)
    assert buckets_in(info.profiles) == (buckets_of(config), 4)
    assert type(info).parse(info.text) == info
    assert [(p["input_ids"][0], p["seq_lens"][0], p["logits_indices"][0]) for p in info.profiles] == [
        ([1], [1], [1]), ([2], [2], [2]), ([4], [4], [4]), ([8], [4], [4]), ([16], [4], [4]), ([20], [4], [4]),
        ([20], [4], [20]),
    ]  # fmt: skip
    for profile in info.profiles:
        assert set(profile) == set(STEP_INPUTS)  # what else comes in has one shape
        assert all(smallest == common == largest for smallest, common, largest in profile.values())
        assert profile["query_start"][0] == [profile["seq_lens"][0][0] + 1]
        assert profile["block_tables"][0] == [profile["seq_lens"][0][0], 4]
        assert profile["slot_mapping"] == profile["positions"] == profile["input_ids"]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 16), (4, 4), (16, 2048), (12, 100), (256, 300)])
def test_every_step_has_a_bucket(batch: int, tokens: int) -> None:
    of = buckets(batch, tokens)
    assert len(set(of)) == len(of) and len(of) <= tokens.bit_length() + 2
    for count in {1, 2, 3, tokens // 2 or 1, tokens}:
        for sequences in {1, min(count, batch)}:
            for rows in {1, sequences, count}:
                if count > tokens:
                    continue
                found = of[choose(of, count, sequences, rows)]
                assert found.tokens >= count and found.sequences >= sequences and found.rows >= rows
                assert found.tokens < 2 * count or rows > sequences
    with pytest.raises(CapacityError, match=f"a step of {tokens + 1} tokens .*raise max_num_tokens"):
        choose(of, tokens + 1, 1, 1)
    assert of[-1] == Bucket(tokens, min(batch, tokens), tokens)


def test_the_key_knows_the_kernels_and_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_path, "arch_at_hand", lambda: "sm_89")
    config = resolve(options(), SPEC)

    def names(*paths: AttentionPath) -> list[str]:
        first, second = (plan_key(SPEC, config, "g", "tensorrt", "10.15", p.key_parts()) for p in paths)
        return [d.name for d in first.diff(second)]

    assert NATIVE.key_parts() == {} and dict(PATH.key_parts()).items() >= plugins.key_parts().items()
    assert names(PATH, PATH) == []
    assert names(NATIVE, PATH) == ["plugins", "nvrtc", "attention", "gpu"]
    first = plan_key(SPEC, config, "g", "tensorrt", "10.15", PATH.key_parts())
    for module, attribute, value, part in (
        (plugin_path, "arch_at_hand", lambda: "sm_90", "gpu"),
        (plugins, "source_text_digest", lambda source: "other", "plugins"),
        (plugins, "version", lambda: "13.9", "nvrtc"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, attribute, value)
            other = plan_key(SPEC, config, "g", "tensorrt", "10.15", PATH.key_parts())
        assert [d.name for d in first.diff(other)] == [part]


def test_the_package_decides() -> None:
    assert attention_path(Package("tensorrt_rtx", "1.7", None).attention) is NATIVE
    assert attention_path(Package("tensorrt", "10.15", None).attention) is PATH


def test_a_build_takes_plugins_and_keeps_plans_of_gpus_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of ``LLM.build``, and what ``llmapi cache why`` says of the plan."""
    model = tiny_checkpoint(tmp_path / "model", "llama", head_dim=64)
    limits = {"max_seq_len": 96, "max_batch_size": 4, "max_num_tokens": 48}
    arguments: dict[str, Any] = {"backend": "tensorrt", "cache_dir": tmp_path / "cache", **limits}
    monkeypatch.setattr("llmapi._tensorrt.installed", lambda: ["tensorrt"])
    monkeypatch.setattr(plugin_path, "arch_at_hand", lambda: "sm_89")
    with fake_tensorrt():
        first = LLM.build(model, **arguments)
        again = LLM.build(model, **arguments)
        monkeypatch.setattr(plugin_path, "arch_at_hand", lambda: "sm_90")
        why = explain(str(model), **arguments)[-1]
        other = LLM.build(model, **arguments)
    assert {p.name: p.note for p in first.phases}["plan"] == "built" and again.cached and again.keys == first.keys
    assert why.kind == "plan" and not why.found and why.nearest is not None
    assert [str(d) for d in why.nearest[1]] == ["gpu: sm_89 -> sm_90"]
    assert other.keys["plan"] != first.keys["plan"] and other.keys["engine"] == first.keys["engine"]
    _, info = read_plan(tmp_path / "cache" / "v1" / "plan" / first.keys["plan"])
    assert info.attention == "plugin" and info.inputs["pools"] == ["INT64", [7]]
    assert info.inputs["input_ids"] == ["INT32", [-1]] and info.inputs["block_tables"] == ["INT32", [-1, 2]]


def test_rtx_has_no_plugins() -> None:
    spec = replace(SPEC, head_dim=64)
    with pytest.raises(BuildError, match=r"has no add_plugin.*install the full tensorrt, 10\.13 or newer"):
        make_network(package(), export_graph(spec), spec, resolve(options(), spec), constants(spec), PATH)


def test_without_a_gpu_nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmapi._device.cuda_visible", lambda: False)
    with fake_tensorrt() as trt, pytest.raises(BuildError, match="builds on the GPU that runs the plan, and torch"):
        make_network(
            Package("tensorrt", trt.__version__, trt), export_graph(SPEC), SPEC, resolve(options(), SPEC),
            constants(SPEC), PATH,
        )  # fmt: skip


def test_heads_that_no_plugin_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_path, "arch_at_hand", lambda: "sm_89")
    assert SPEC.head_dim == 16
    with fake_tensorrt() as trt, pytest.raises(BuildError, match="head sizes"):
        make_network(
            Package("tensorrt", trt.__version__, trt), export_graph(SPEC), SPEC, resolve(options(), SPEC),
            constants(SPEC), PATH,
        )  # fmt: skip
