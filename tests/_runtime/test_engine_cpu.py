"""The CPU engine's own business: sizing the KV memory, closing, binding. Its numbers are in tests/models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmapi._build.export import export_graph
from llmapi._build.graph import Graph, Node
from llmapi._build.tensor_file import TensorFile, write_tensors
from llmapi._build.weights import dummy, tensor_specs
from llmapi._kernels.native import NativeKernels
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine import num_kv_blocks
from llmapi._runtime.engine_cpu import CpuEngine, available_memory
from llmapi._runtime.linear_cpu import NativeLinear, PackedLinear, can_pack, make_linear
from llmapi.config import EngineConfig, EngineOptions, KvCacheConfig, resolve
from llmapi.errors import BuildError, ConfigError, EngineClosedError
from llmapi.models.family import spec_of
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import constants
from tests.tiny import tiny_config

SPEC = spec_of({**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]})
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # k and v, layers, key heads, channels, float32


def config(**kv: object) -> EngineConfig:
    return resolve(EngineOptions(max_seq_len=100, max_batch_size=4, kv_cache=KvCacheConfig.of(kv)), SPEC)


def blocks(free: int = 1 << 30, fraction: float = 0.5, **kv: object) -> int:
    return num_kv_blocks(config(**kv), SPEC, lambda: free, fraction)


def engine(tmp_path: Path, graph: Graph | None = None) -> CpuEngine:
    specs = tensor_specs(SPEC, "float32")
    with (tmp_path / "w.safetensors").open("wb") as out:
        write_tensors(out, specs, dummy(0))
    weights = TensorFile(tmp_path / "w.safetensors")
    return CpuEngine(graph or export_graph(SPEC), weights, constants(SPEC), SPEC, config(max_tokens=256))


def one_token() -> StepBatch:
    return StepBatch([3], [0], [0], [[0]], [1], [0, 1], [0], [1], [])


def test_kv_memory_follows_the_arithmetic() -> None:
    assert SPEC.kv_bytes_per_token(4) == TOKEN_BYTES
    assert blocks(max_tokens=170) == 10
    assert blocks(memory_bytes=5 * 16 * TOKEN_BYTES + 1) == 5
    assert blocks(free=100 * 16 * TOKEN_BYTES, fraction=0.1) == 10
    assert blocks(free=100 * 16 * TOKEN_BYTES, memory_fraction=0.2) == 20
    assert blocks(free=1 << 40) == 4 * 7, "more than every sequence can use is of no use"
    assert blocks(max_tokens=512, block_size=64) == 8


@pytest.mark.parametrize("kv", [{"max_tokens": 15}, {"memory_bytes": 1000}, {"memory_fraction": 1e-9}])
def test_memory_for_no_block_is_refused_with_the_arithmetic(kv: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        blocks(**kv)
    assert f"{16 * TOKEN_BYTES:,} bytes" in str(caught.value)


def test_the_system_says_how_much_memory_is_free() -> None:
    assert 1 << 20 < available_memory() < 1 << 50


def test_logits_are_float32_and_steps_repeat_to_the_bit(tmp_path: Path) -> None:
    loaded = engine(tmp_path)
    first, second = loaded.step(one_token()), loaded.step(one_token())
    assert first.dtype == torch.float32 and first.shape == (1, SPEC.vocab_size)
    assert torch.equal(first, second)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    loaded = engine(tmp_path)
    loaded.close()
    loaded.close()
    with pytest.raises(EngineClosedError, match="make a new LLM"):
        loaded.step(one_token())


def test_an_operator_that_torch_does_not_have_is_named(tmp_path: Path) -> None:
    graph = export_graph(SPEC)
    alien = Node("alien", "aten.no_such_operator.default", (), {}, "")
    with pytest.raises(BuildError, match=r"aten\.no_such_operator\.default"):
        engine(tmp_path, replace(graph, nodes=(*graph.nodes, alien)))


def test_spec_arithmetic_is_that_of_the_model() -> None:
    assert isinstance(SPEC, TransformerSpec) and (SPEC.q_size, SPEC.kv_size) == (64, 32)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears_are_linears(bias: bool) -> None:
    """Against float64; and a row's result does not depend on the other rows."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(40, 64)
    offset = torch.randn(96) if bias else None
    linear = PackedLinear(weight, offset)
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    whole = linear(x)
    for rows in (1, 2, 3, 17, 40):
        assert torch.allclose(linear(x[:rows]).double(), expected[:rows], atol=1e-5)
        if rows > 2:
            assert torch.equal(linear(x[:rows]), whole[:rows])


def test_bfloat16_linears_need_no_support_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    linear = make_linear(weight, None, None, pack=True)
    assert not isinstance(linear, PackedLinear)
    assert torch.allclose(linear(x).double(), x.double() @ weight.double().t(), atol=0.2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "width"), [(1, 1), (7, 33), (16, 31), (64, 96), (33, 130), (576, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_linears_are_linears(size: int, width: int, bias: bool, threads: int, kernels: NativeKernels) -> None:
    """Against float64, into memory full of NaN; and a row's result does not depend on the other rows."""
    torch.manual_seed(0)
    weight, x = torch.randn(width, size), torch.randn(450, size)
    offset = torch.randn(width) if bias else None
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)  # new tensors are NaN
    try:
        linear = NativeLinear(weight, offset, kernels)
        whole = linear(x)
        assert torch.allclose(whole.double(), expected, atol=1e-4)
        for rows in (0, 1, 2, 11, 12, 13, 24, 25, 191, 192, 193, 449):
            assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[200:201]), whole[200:201])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)


def test_compiled_kernels_are_for_float32(tmp_path: Path, kernels: NativeKernels) -> None:
    specs = tensor_specs(SPEC, "bfloat16")
    with (tmp_path / "w.safetensors").open("wb") as out:
        write_tensors(out, specs, dummy(0))
    options = EngineOptions(dtype="bfloat16", max_seq_len=100, kv_cache=KvCacheConfig.of({"max_tokens": 256}))
    weights = TensorFile(tmp_path / "w.safetensors")
    loaded = CpuEngine(export_graph(SPEC), weights, constants(SPEC), SPEC, resolve(options, SPEC), kernels)
    assert loaded.kernels is None and loaded.step(one_token()).isfinite().all()


def test_weights_are_repacked_only_where_a_second_copy_fits() -> None:
    assert can_pack(10, 20) and not can_pack(11, 20)


def test_an_engine_without_packing_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = StepBatch([3, 5, 7], [0, 1, 2], [0, 1, 2], [[0]], [3], [0, 3], [0, 1, 2], [3], [])
    packed = engine(tmp_path).step(batch)
    monkeypatch.setattr("llmapi._runtime.engine_cpu.can_pack", lambda *sizes: False)
    assert torch.allclose(engine(tmp_path).step(batch), packed, atol=1e-5)
