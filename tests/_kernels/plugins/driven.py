"""Plugins in a network that is none (tests/tensorrt_stub): what TensorRT would embed and launch.

Not collected by itself: ``test_tensorrt.py`` runs it where ``import tensorrt`` finds the bindings.
"""

from __future__ import annotations

import random
import re
import struct
from typing import Any

import numpy as np
import pytest
import tensorrt as trt

from llmapi._device import HEAD_SIZES
from llmapi._kernels.plugins import PLUGINS, add_add_rms_norm, add_paged_attention, add_rotary_kv_write
from llmapi._kernels.plugins import plugin as plugin_module
from llmapi.errors import BuildError
from tests.tensorrt_stub.network import Layer, Network, network, tensor

DTYPES = ("float32", "float16", "bfloat16")
SIZES = [
    {"T": 1, "B": 1, "M": 1},
    {"T": 7, "B": 3, "M": 9},
    {"T": 256, "B": 256, "M": 40},
    {"T": 2048, "B": 5, "M": 128},
]


def bits(value: float) -> int:
    return struct.unpack("=i", struct.pack("=f", value))[0]  # type: ignore[no-any-return]


def check(layer: Layer, name: str, inputs: int, outputs: int) -> None:
    """What holds for every plugin: the parameters, and the limits of a launch."""
    assert layer.name == name
    assert len(layer.inputs) == inputs and len(layer.outputs) == outputs
    assert layer.parameters() == ["u64"] * inputs + ["u32"] * len(layer.extras) + ["u64"] * outputs
    assert 32 <= layer.block() <= 1024 and layer.block() % 32 == 0
    static = [int(n) for n in re.findall(r"\.shared [^;]*\[(\d+)\];", layer.ptx)]
    assert layer.shared() + sum(static) <= 48 << 10
    limit = re.search(r"\.maxntid (\d+)", layer.ptx)
    assert limit is None or layer.block() <= int(limit[1])


def extras(layer: Layer, sizes: dict[str, int]) -> list[int]:
    return [e.value(sizes) for e in layer.extras]


def step(net: Network, dtype: str, heads: int, head_dim: int) -> list[Any]:
    """Inputs of an attention over a step whose sizes are not known."""
    return [
        tensor(dtype, "T", heads, head_dim),
        tensor("int64", 65),
        tensor("int32", "B", "M"),
        tensor("int32", "B"),
        tensor("int32", "B+1"),
    ]


def with_more(sizes: dict[str, int]) -> dict[str, int]:
    return {**sizes, "B+1": sizes["B"] + 1}


# ---- rotary and write


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(64, False), (64, True), (32, False)])
def test_rotary_kv_write(dtype: str, rotary_dim: int, interleaved: bool) -> None:
    with network(T=16) as net:
        q = add_rotary_kv_write(
            net, tensor(dtype, "T", 15 * 64), tensor("float32", "T", rotary_dim), tensor("int32", "T"),
            tensor("int64", 9), layer=3, heads=9, kv_heads=3, head_dim=64, interleaved=interleaved, arch="sm_89",
            name="layers.3.attn.write",
        )  # fmt: skip
    (layer,) = net.layers
    check(layer, "layers.3.attn.write", 4, 1)
    assert q is layer.outputs[0] and q.dtype == getattr(trt, dtype)
    for sizes in SIZES:
        assert q.size(sizes) == (sizes["T"], 9, 64) and layer.grid(sizes) == (sizes["T"], 1, 1)
        assert extras(layer, sizes) == [3]
    assert q.shape == (-1, 9, 64)
    assert layer.block() == 256 and layer.shared() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write_without_rotation(dtype: str) -> None:
    with network(T=16) as net:
        q = add_rotary_kv_write(
            net, tensor(dtype, "T", 3 * 20), None, tensor("int32", "T"), tensor("int64", 9), layer=0,
            heads=1, kv_heads=1, head_dim=20, interleaved=False, arch="sm_120", name="w",
        )  # fmt: skip
    check(net.layers[0], "w", 3, 1)
    assert q.size({"T": 5}) == (5, 1, 20) and net.layers[0].block() == 32
    assert ".target sm_120" in net.layers[0].ptx


# ---- attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (6, 6), (40, 1)])
def test_paged_attention(dtype: str, head_dim: int, heads: int, kv_heads: int) -> None:
    with network(T=64, B=64, M=33, **{"B+1": 65}) as net:
        out = add_paged_attention(
            net, *step(net, dtype, heads, head_dim), layer=31, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            block_size=16, scale=head_dim**-0.5, window=4096, softcap=30.0, arch="sm_80", name="attn",
        )  # fmt: skip
    (layer,) = net.layers
    check(layer, "attn", 5, 1)
    assert out.dtype == getattr(trt, dtype)
    draw = random.Random(heads * head_dim)
    rows = _tile_rows(layer)
    for sizes in map(with_more, SIZES):
        tokens, batch = sizes["T"], sizes["B"]
        assert out.size(sizes) == (tokens, heads, head_dim)
        assert extras(layer, sizes) == [31, bits(head_dim**-0.5), 4096, bits(30.0), tokens, batch, sizes["M"]]
        x, y, z = layer.grid(sizes)
        assert y == heads and z == 1
        for _ in range(50):  # every way to divide the tokens must find a block for each tile
            cuts = sorted(draw.randint(0, tokens) for _ in range(batch - 1))
            counts = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
            assert sum(-(-count // rows) for count in counts) <= x
        assert x <= tokens // rows + batch
    assert layer.grid(with_more({"T": 200, "B": 200, "M": 1}))[0] == 200


def _tile_rows(layer: Layer) -> int:
    """Query rows of a tile, read off the threads and the registers: 16 a warp and tile in 16 bits, 4 in float32."""
    attributes, warps = layer.attributes, layer.block() // 32
    if layer.inputs[0].dtype == trt.float32:
        return 4 * warps
    return 16 * warps * (2 if attributes["head_dim"] <= 80 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alibi", "sinks"), [(True, False), (False, True), (True, True)])
def test_paged_attention_with_biases(dtype: str, alibi: bool, sinks: bool) -> None:
    slopes, logits = tensor("float32", 8), tensor("float32", 8)
    with network(T=64, B=64, M=33, **{"B+1": 65}) as net:
        add_paged_attention(
            net, *step(net, dtype, 8, 64), layer=0, heads=8, kv_heads=2, head_dim=64, block_size=8, scale=1.0,
            alibi_slopes=slopes if alibi else None, sinks=logits if sinks else None, arch="sm_90a", name="attn",
        )  # fmt: skip
    (layer,) = net.layers
    check(layer, "attn", 7, 1)
    expected = {(True, False): [slopes, slopes], (False, True): [logits, logits], (True, True): [slopes, logits]}
    assert [id(t) for t in layer.inputs[5:]] == [id(t) for t in expected[alibi, sinks]]
    assert (layer.attributes["alibi"], layer.attributes["sinks"]) == (int(alibi), int(sinks))
    assert ".target sm_90" in layer.ptx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [False, True])
def test_paged_attention_in_parts(dtype: str, sinks: bool) -> None:
    """A plugin that leaves parts, and one that joins them; in steps of many tokens there is one part."""
    logits = tensor("float32", 8)
    with network(T=4, B=4, M=33, **{"B+1": 5}) as net:
        out = add_paged_attention(
            net, *step(net, dtype, 8, 128), layer=2, heads=8, kv_heads=2, head_dim=128, block_size=16, scale=1.0,
            sinks=logits if sinks else None, parts=16, arch="sm_80", name="attn",
        )  # fmt: skip
    parts, join = net.layers
    check(parts, "attn.parts", 7 if sinks else 5, 3)
    check(join, "attn", 4 if sinks else 3, 1)
    assert [id(t) for t in join.inputs] == [id(t) for t in (*parts.outputs, *([logits] if sinks else []))]
    assert [t.dtype for t in parts.outputs] == [getattr(trt, dtype), trt.float32, trt.float32]
    for tokens, count in ((1, 16), (2, 8), (3, 6), (16, 1), (17, 1), (2048, 1)):
        sizes = with_more({"T": tokens, "B": tokens, "M": 33})
        shapes = [(tokens, 8, 128), (count, tokens, 8, 128), (count, tokens, 8, 2)]
        assert [t.size(sizes) for t in parts.outputs] == shapes and out.size(sizes) == shapes[0]
        assert parts.grid(sizes) == (tokens, 8, count) and join.grid(sizes) == (tokens, 8, 1)
        assert extras(join, sizes) == [count]
        assert extras(parts, sizes) == [2, bits(1.0), 0, bits(0.0), tokens, tokens, 33]


def test_layers_share_their_ptx() -> None:
    """What differs between layers of a model is passed as extras."""
    with network(T=64, B=64, M=33, **{"B+1": 65}) as net:
        for layer in range(3):
            add_paged_attention(
                net, *step(net, "float16", 8, 64), layer=layer, heads=8, kv_heads=2, head_dim=64, block_size=16,
                scale=0.1 * layer + 0.1, window=layer, arch="sm_75", name=f"layers.{layer}.attn",
            )  # fmt: skip
    assert len({layer.ptx for layer in net.layers}) == 1 and len({layer.name for layer in net.layers}) == 3
    assert [extras(layer, with_more(SIZES[1]))[0] for layer in net.layers] == [0, 1, 2]
    assert ".target sm_75" in net.layers[0].ptx


# ---- norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 576, 4096, 16384])
def test_add_rms_norm(dtype: str, width: int) -> None:
    with network(T=64) as net:
        x, residual, weight = tensor(dtype, "T", width), tensor(dtype, "T", width), tensor(dtype, width)
        out, total = add_add_rms_norm(net, x, residual, weight, eps=1e-5, arch="sm_80", name="norm")
    (layer,) = net.layers
    check(layer, "norm", 3, 2)
    for sizes in SIZES:
        assert out.size(sizes) == total.size(sizes) == (sizes["T"], width)
        assert layer.grid(sizes) == (sizes["T"], 1, 1) and extras(layer, sizes) == [width, bits(1e-5)]


# ---- what is refused


def rotary(dtypes: tuple[str, str, str, str], arch: str = "sm_80", **changes: Any) -> Layer:
    dims: list[tuple[int | str, ...]] = [("T", 15 * 64), ("T", 64), ("T",), (9,)]
    shape = {"layer": 0, "heads": 9, "kv_heads": 3, "head_dim": 64, "interleaved": False, **changes}
    with network(T=16) as net:
        tensors = [tensor(d, *s) for d, s in zip(dtypes, dims, strict=True)]
        add_rotary_kv_write(net, *tensors, arch=arch, name="here", **shape)
    return net.layers[0]


GOOD = ("float16", "float32", "int32", "int64")


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, "int32", "qkv of the plugin llmapi::rotary_kv_write is int32, must be float32 or float16 or bfloat16"),
        (0, "fp8", "qkv of the plugin llmapi::rotary_kv_write is DataType.FP8"),
        (1, "float16", "cos_sin of the plugin llmapi::rotary_kv_write is float16, must be float32: cast it"),
        (2, "int64", "slot_mapping of the plugin llmapi::rotary_kv_write is int64, must be int32"),
        (3, "int32", "pools of the plugin llmapi::rotary_kv_write is int32, must be int64"),
    ],
)
def test_another_type_is_refused(at: int, wrong: str, message: str) -> None:
    rotary(GOOD)
    with pytest.raises(BuildError, match=re.escape(message)):
        rotary((*GOOD[:at], wrong, *GOOD[at + 1 :]))  # type: ignore[arg-type]


def test_the_callbacks_refuse_another_type_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin can be put into a network by others."""
    operator = PLUGINS["rotary_kv_write"]
    operator.define()
    attributes: dict[str, Any] = {"layer": 0, "heads": 9, "kv_heads": 3, "head_dim": 64, "rotary_dim": 64}
    attributes |= {"interleaved": 0, "arch": 80}
    with network(T=16) as net:
        tensors = [tensor("float16", "T", 960), tensor("float16", "T", 64), tensor("int32", "T"), tensor("int64", 9)]
        arrays = {key: np.array([value]) for key, value in attributes.items()}
        create = trt.plugin.op.llmapi.rotary_kv_write(*tensors, **arrays)
        with pytest.raises(BuildError, match="cos_sin"):
            net.add_plugin(create, aot=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 8}, "qkv at here is 960 wide; 8 query and 3 key heads of 64 take 896"),
        ({"arch": "sm_70"}, "sm_75 and newer, not for 'sm_70'"),
        ({"arch": "hopper"}, "not for 'hopper'"),
        ({"heads": 22, "kv_heads": 4, "head_dim": 32}, "even R of at most 32"),
    ],
)
def test_another_shape_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=re.escape(message)):
        rotary(GOOD, **changes)


def attention(dtype: str = "float16", **changes: Any) -> None:
    shape: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64, "block_size": 16, "arch": "sm_80", **changes}
    with network(T=64, B=64, M=33, **{"B+1": 65}) as net:
        add_paged_attention(net, *step(net, dtype, 8, 64), layer=0, scale=1.0, name="here", **shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 72}, "head sizes"),
        ({"block_size": 24}, "blocks of"),
        ({"kv_heads": 3}, "a whole number of them"),
        ({"parts": 0}, "divided into 1 to 1024 parts, not 0"),
        ({"heads": 4}, "q at here has the shape (-1, 8, 64), must be [tokens, 4, 64]"),
        (
            {"alibi_slopes": tensor("float16", 8)},
            "alibi_slopes of the plugin llmapi::paged_attention_biased is float16",
        ),
        ({"dtype": "bfloat16", "arch": "sm_75"}, "needs compute capability 8.0, and the plan is for 7.5"),
    ],
)
def test_attention_that_there_is_no_kernel_for_is_refused(changes: dict[str, Any], message: str) -> None:
    attention()
    with pytest.raises(BuildError, match=re.escape(message)):
        attention(**changes)


def test_mixed_types_and_ranks_are_refused() -> None:
    with network(T=64) as net, pytest.raises(BuildError, match="weight of the plugin llmapi::add_rms_norm is float32"):
        x, residual, weight = tensor("float16", "T", 64), tensor("float16", "T", 64), tensor("float32", 64)
        add_add_rms_norm(net, x, residual, weight, eps=1e-5, arch="sm_80", name="norm")
    with network(T=64) as net, pytest.raises(BuildError, match=r"residual of .* has 3 dimensions, must have 2"):
        x, residual, weight = tensor("float16", "T", 64), tensor("float16", "T", 1, 64), tensor("float16", 64)
        add_add_rms_norm(net, x, residual, weight, eps=1e-5, arch="sm_80", name="norm")
    with network(T=64) as net, pytest.raises(BuildError, match="its width must be constant"):
        x, residual, weight = tensor("float16", "T", "W"), tensor("float16", "T", "W"), tensor("float16", "W")
        add_add_rms_norm(net, x, residual, weight, eps=1e-5, arch="sm_80", name="norm")


def test_a_layer_that_tensorrt_refuses() -> None:
    class Refusing(Network):
        def add_plugin(self, create: Any, aot: bool) -> Any:
            return None

    with Refusing(T=64) as net, pytest.raises(BuildError, match=r"TensorRT .* refuses the plugin llmapi::add_rms_norm"):
        x, residual, weight = tensor("float16", "T", 64), tensor("float16", "T", 64), tensor("float16", 64)
        add_add_rms_norm(net, x, residual, weight, eps=1e-5, arch="sm_80", name="norm")


def test_a_tensorrt_without_such_plugins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tensorrt.plugin.aot_impl")
    with pytest.raises(BuildError, match=r"has no plugins that are compiled ahead of time; 10\.13 has them"):
        plugin_module.tensorrt()


def test_a_mistake_in_the_parameters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One extra too many: the kernel would read its output's address from elsewhere."""
    operator = PLUGINS["add_rms_norm"]
    launch = operator.launch

    def wrong(*args: Any) -> Any:
        found = launch(*args)
        return type(found)(found.unit, found.entry, found.grid, found.block, found.shared, (*found.extras, 1))

    monkeypatch.setitem(operator.__dict__, "launch", wrong)
    with network(T=64) as net:
        x, residual, weight = tensor("float16", "T", 64), tensor("float16", "T", 64), tensor("float16", 64)
        add_add_rms_norm(net, x, residual, weight, eps=1e-5, arch="sm_80", name="norm")
    with pytest.raises(AssertionError):
        check(net.layers[0], "norm", 3, 2)
