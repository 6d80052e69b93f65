"""Operators' lowerings alone, on the samples of their records: scores with caps, biases and sinks, partial rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmapi._build.tensorrt.log import make_logger
from llmapi._kernels import OPS, Sample, relative_error
from llmapi._kernels.attention_tensorrt import paged_attention, rotary_cos_sin, rotary_kv_write
from llmapi._kernels.rotary import rotate
from llmapi._kernels.tensorrt_network import Network, data_type
from tests.tensorrt.evaluator import Evaluator
from tests.tensorrt.models import package

FLOAT = torch.float32


def samples(name: str) -> Iterator[Sample]:
    record = OPS[f"llmapi.{name}.default"]
    return record.samples(torch.Generator().manual_seed(0), FLOAT)


def evaluate(make: Callable[[Network], list[Any]], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Make a network of a few layers and run it; ``make`` gives the outputs and takes inputs from ``net.input``."""
    trt = package().trt
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    net = Network(trt, definition, "float32", logger.take)
    outputs = make(net)
    for i, output in enumerate(outputs):
        output.name = f"out{i}"
        definition.mark_output(output)
    found = Evaluator(trt, definition).run(inputs)
    return [found[f"out{i}"] for i in range(len(outputs))]


def declared(net: Network, inputs: dict[str, torch.Tensor], fixed: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Network inputs for tensors; sizes vary but for those that are fixed."""
    types = {torch.float32: "float32", torch.int32: "int32"}
    return {
        name: net.input(name, data_type(net.trt, types[t.dtype]), fixed.get(name, (-1,) * t.ndim))
        for name, t in inputs.items()
    }


SCATTERED = [s for s in samples("paged_attention") if s.label.endswith("scattered")]  # rows have no other order


@pytest.mark.parametrize("sample", SCATTERED, ids=lambda s: s.label)
def test_attention(sample: Sample) -> None:
    q, k_cache, v_cache, tables, lens, starts, scale, window, softcap, slopes, sinks = sample.args
    expected = OPS["llmapi.paged_attention.default"].reference(*sample.args)
    counts = (starts[1:] - starts[:-1]).tolist()
    capacity, longest = int(lens.max()) + 7, max(counts)
    heads, (kv_heads, head_dim) = q.shape[1], k_cache.shape[2:]

    def rows(cache: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(lens), kv_heads, capacity, head_dim), 1e4)
        for i, length in enumerate(lens.tolist()):
            blocks = tables[i, : -(-length // cache.shape[1])].long()
            out[i, :, :length] = cache[blocks].reshape(-1, kv_heads, head_dim)[:length].transpose(0, 1)
        return out

    padded = torch.zeros(len(lens), heads, longest, head_dim)
    for i, count in enumerate(counts):
        padded[i, :, :count] = q[int(starts[i]) : int(starts[i + 1])].transpose(0, 1)
    first = lens - (starts[1:] - starts[:-1])
    inputs = {
        "q": padded, "k": rows(k_cache), "v": rows(v_cache),
        "positions": first[:, None] + torch.arange(longest, dtype=torch.int32), "lengths": lens,
    }  # fmt: skip
    inputs |= {name: t for name, t in (("slopes", slopes), ("sinks", sinks)) if t is not None}
    row = (-1, kv_heads, capacity, head_dim)
    fixed = {"q": (-1, heads, -1, head_dim), "k": row, "v": row, "slopes": (heads,), "sinks": (heads,)}

    def make(net: Network) -> list[Any]:
        t = declared(net, inputs, fixed)
        net.updated.update(k=t["k"], v=t["v"])
        return [paged_attention(net, t["q"], t["k"], t["v"], t["positions"], t["lengths"], None, scale, window, softcap,
                                t.get("slopes"), t.get("sinks"))]  # fmt: skip

    [out] = evaluate(make, inputs)
    assert out.shape == (len(lens), longest, heads * head_dim)
    found = torch.cat([out[i, :count] for i, count in enumerate(counts)]).view_as(expected)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("sample", list(samples("rotary_kv_write")), ids=lambda s: s.label)
def test_rotation_and_write(sample: Sample) -> None:
    qkv, cos_sin, _, k_cache, _, interleaved = sample.args
    kv_heads, head_dim = k_cache.shape[2:]
    split = qkv.view(len(qkv), -1, head_dim)
    heads = split.shape[1] - 2 * kv_heads
    at, capacity = 3, len(qkv) + 5
    inputs = {
        "qkv": qkv[None], "index": torch.tensor([at], dtype=torch.int32),
        "k": torch.zeros(1, kv_heads, capacity, head_dim), "v": torch.zeros(1, kv_heads, capacity, head_dim),
    }  # fmt: skip
    if cos_sin is not None:
        inputs |= {"cos": cos_sin.chunk(2, -1)[0][None].contiguous(), "sin": cos_sin.chunk(2, -1)[1][None].contiguous()}
    row = (-1, kv_heads, capacity, head_dim)
    half = 0 if cos_sin is None else cos_sin.shape[-1] // 2
    fixed = {"qkv": (-1, -1, qkv.shape[1]), "k": row, "v": row, "cos": (-1, -1, half), "sin": (-1, -1, half)}

    def make(net: Network) -> list[Any]:
        t = declared(net, inputs, fixed)
        angles = (t["cos"], t["sin"]) if cos_sin is not None else None
        q = rotary_kv_write(net, t["qkv"], angles, t["index"], t["k"], t["v"], interleaved)
        return [q, net.updated["k"], net.updated["v"]]

    q, k, v = evaluate(make, inputs)
    expected = split if cos_sin is None else rotate(split, cos_sin, interleaved)
    assert relative_error(q[0].transpose(0, 1), expected[:, :heads]) < 1e-6
    assert relative_error(k[0, :, at:-2].transpose(0, 1), expected[:, heads : heads + kv_heads]) < 1e-6
    assert torch.equal(v[0, :, at:-2].transpose(0, 1), split[:, heads + kv_heads :])
    assert k[0, :, :at].abs().sum() == v[0, :, -2:].abs().sum() == 0, "nothing else is written"


@pytest.mark.parametrize("sample", list(samples("rotary_cos_sin")), ids=lambda s: s.label)
def test_angles(sample: Sample) -> None:
    positions, inv_freq, scale = sample.args
    inputs = {"positions": positions[None]}

    def make(net: Network) -> list[Any]:
        t = declared(net, inputs, {})
        return list(rotary_cos_sin(net, t["positions"], net.constant(inv_freq), scale))

    cos, sin = evaluate(make, inputs)
    expected = OPS["llmapi.rotary_cos_sin.default"].reference(*sample.args)
    assert relative_error(torch.cat((cos, sin), -1)[0], expected) < 1e-6


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "add_layer_norm", "gated_activation"])
def test_row_operators(name: str) -> None:
    record = OPS[f"llmapi.{name}.default"]
    assert record.tensorrt is not None
    for sample in samples(name):
        inputs = {f"x{i}": a for i, a in enumerate(sample.args) if isinstance(a, torch.Tensor)}

        def make(net: Network, sample: Sample = sample, inputs: dict[str, torch.Tensor] = inputs) -> list[Any]:
            t = declared(net, inputs, {n: (-1, v.shape[1]) if v.ndim == 2 else v.shape for n, v in inputs.items()})
            return listed(record.tensorrt(net, *(t.get(f"x{i}", a) for i, a in enumerate(sample.args))))  # type: ignore[misc]

        expected = record.reference(*sample.args)
        for found, wanted in zip(evaluate(make, inputs), listed(expected), strict=True):
            assert relative_error(found, wanted) < 2e-6, sample.label
