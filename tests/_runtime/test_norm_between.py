"""RMSNorms that linear layers take over: the whole engine with a plain product in the place of Hopper's kernel.

The emulator cannot run that kernel. Here another object stands for it, that does in torch what the kernel's docstrings
say; so the engine's part is held against transformers: which norms are taken over, what is passed on, and when not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmapi._build.export import export_graph
from llmapi._build.tensor_file import TensorFile
from llmapi._kernels import relative_error, skinny_linear_cuda
from llmapi._kernels.skinny_linear_cuda import SkinnyLinear, Unscaled
from llmapi._kernels.skinny_linear_layout import BUCKETS, SCALES, WRITES
from llmapi._runtime import linear_cuda
from llmapi._runtime.engine_cuda import CudaEngine
from llmapi._runtime.graph_uses import GraphUses
from llmapi._runtime.linear_cuda import LinearChoices
from llmapi.config import EngineOptions, KvCacheConfig, resolve
from llmapi.models.activations import ACTIVATIONS
from llmapi.models.transformer import constants
from tests._runtime.test_engine_emulated import WholeGpu
from tests.emulator.tensor_map import EmulatedTensorMap
from tests.models.test_parity import CASES, run, write_model
from tests.tiny import VOCAB, tiny_config, tiny_model

VARIANT = 11
WIDE: dict[str, Any] = {"hidden_size": 256}  # heads of 64


class PlainProduct:
    """What :class:`SkinnyLinear` promises, in torch and float32. ``refuses`` are parts of a norm that it cannot do."""

    def __init__(self, most_rows: int = 128) -> None:
        self.most_rows = most_rows
        self.refuses: set[tuple[int, int]] = set()  # outputs of a layer, part of the norm
        self.calls: list[tuple[str, int, int]] = []  # what, rows, outputs

    def supports(self, rows: int, n: int, k: int) -> bool:
        return rows <= self.most_rows

    def norms(self, rows: int, n: int, k: int, variant: int, norm: int) -> bool:
        assert variant == VARIANT
        return (n, norm) not in self.refuses

    def unit(self, rows: int, n: int, k: int, gate: str | None, variant: int, norm: int = 0) -> tuple[Any, ...]:
        return (rows, n, k, gate, variant, norm)

    def __call__(
        self, out: torch.Tensor, x: Any, weight: torch.Tensor, bias: Any = None, *, gate: Any = None, variant: int
    ) -> None:
        assert variant == VARIANT
        if isinstance(x, Unscaled):
            scale = torch.rsqrt(x.squares.sum(0)[: len(x.rows)] / weight.shape[1] + x.eps)
            y = F.linear(x.rows, weight) * scale[:, None]
        else:
            y = F.linear(x, weight)
        y = y if bias is None else y + bias
        if gate:
            first, second = y.chunk(2, -1)
            y = ACTIVATIONS[gate](first) * second
        self.calls.append(("scaled" if isinstance(x, Unscaled) else "plain", len(y), len(weight)))
        out.copy_(y)

    def before_norm(
        self, out: torch.Tensor, x: Any, weight: Any, bias: Any, residual: Any, gain: Any, eps: float, variant: int
    ) -> Unscaled:
        assert variant == VARIANT
        out.copy_(F.linear(x, weight, bias) + residual)
        squares = torch.stack([part.square().sum(-1) for part in out.split(100, -1)])
        self.calls.append(("before", len(out), len(weight)))
        return Unscaled(out * gain, squares, eps)


def make_engine(model: Any, path: Path, kernels: Path, dtype: str) -> CudaEngine:
    """On an emulated GPU; in 16 bits one after Hopper, with bulk copies, whose attention is not Hopper's own."""
    spec = write_model(model, path, dtype)
    kv = KvCacheConfig(max_tokens=64 * 16, block_size=16)
    options = EngineOptions(backend="cpu", dtype=dtype, max_seq_len=256, max_batch_size=16, kv_cache=kv)
    graph = export_graph(spec)
    wide: dict[str, Any] = {} if dtype == "float32" else {"capability": (10, 0), "shared_memory": 227 << 10}
    gpu: Any = WholeGpu(kernels, **wide)
    file = TensorFile(path)
    weights = {i.name: file.read(i.parts) for i in graph.inputs if i.kind == "weight"}
    return CudaEngine(graph, lambda: weights, constants(spec), spec, resolve(options, spec), gpu=gpu, utilization=0.9)


class Engines:
    """Makes emulated engines whose linear layers are a :class:`PlainProduct`'s."""

    def __init__(self, folder: Path, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.product = PlainProduct()
        self._folder, self._kernels, self._made = folder, kernel_folder, list[CudaEngine]()
        known = LinearChoices.__init__

        def init(choices: LinearChoices, gpu: Any, dtype: torch.dtype) -> None:
            known(choices, gpu, dtype)
            choices.kernel = self.product  # type: ignore[assignment]

        def variant(choices: LinearChoices, rows: int, n: int, k: int, gate: str | None) -> int | None:
            return VARIANT if self.product.supports(rows, n, k) else None

        monkeypatch.setattr(linear_cuda.LinearChoices, "__init__", init)
        monkeypatch.setattr(linear_cuda.LinearChoices, "variant", variant)

    def __call__(self, case: str) -> tuple[CudaEngine, Any, GraphUses]:
        family, overrides = CASES[case]
        wide = {"n_embd": 256} if family == "gpt2" else WIDE
        model = tiny_model(tiny_config(family, **{**wide, **overrides}))
        engine = make_engine(model, self._folder / "model.safetensors", self._kernels, "float32")
        self._made.append(engine)
        self.product.calls.clear()
        return engine, model, GraphUses(engine._binder._graph)

    def close(self) -> None:
        for engine in self._made:
            engine.close()


@pytest.fixture
def engines(tmp_path: Path, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    made = Engines(tmp_path, kernel_folder, monkeypatch)
    yield made
    made.close()


IDS = random.Random(3).choices(range(VOCAB), k=30)
STEPS = [(0, 13), (13, 27), (27, 28), (28, 29), (29, 30)]


def parts_of(engine: CudaEngine) -> torch.Tensor:
    return torch.cat([run(engine, [(IDS, a, b, [7, 2])]).clone() for a, b in STEPS])


def truth(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize("case", ["llama-biases", "qwen2-mqa", "mistral-window"])
def test_every_norm_between_layers_is_taken_over(case: str, engines: Engines) -> None:
    engine, model, _ = engines(case)
    assert relative_error(parts_of(engine), truth(model)) < 1e-4
    layers = model.config.num_hidden_layers
    # The first norm follows no layer, and the last goes to the vocabulary's projection: 2 a layer less one.
    done = [what for what, rows, _ in engines.product.calls if rows == 1]
    assert done.count("before") == done.count("scaled") > 0
    assert done.count("before") % (2 * layers - 1) == 0
    assert not any(what == "scaled" and n == VOCAB for what, _, n in engines.product.calls)


def test_the_kernels_themselves_in_sixteen_bits(
    tmp_path: Path, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the emulator, as a GPU after Hopper runs them: no farther from float32 than transformers in the same type."""
    monkeypatch.setattr(skinny_linear_cuda, "TensorMap", EmulatedTensorMap)

    def variant(choices: LinearChoices, rows: int, n: int, k: int, gate: str | None) -> int | None:
        if not 0 < rows <= 128 or n % 8:
            return None
        return 21 if n > k else 11  # a tile to every two blocks, and to each

    monkeypatch.setattr(LinearChoices, "variant", variant)
    calls: list[int] = []
    known = SkinnyLinear.before_norm
    monkeypatch.setattr(
        SkinnyLinear, "before_norm", lambda self, *args: (calls.append(len(args[0])), known(self, *args))[1]
    )
    model = tiny_model(tiny_config("llama", **WIDE, num_key_value_heads=2))
    expected = truth(model)
    engine = make_engine(model, tmp_path / "model.safetensors", kernel_folder, "bfloat16")
    try:
        ours = relative_error(parts_of(engine), expected)
    finally:
        engine.close()
        EmulatedTensorMap.made.clear()
    theirs = relative_error(truth(model.to(torch.bfloat16)), expected)
    assert ours < 1.2 * theirs + 1e-3, (ours, theirs)
    assert calls.count(1) and calls.count(1) % (2 * model.config.num_hidden_layers - 1) == 0
    assert max(calls) > 8  # steps with prompts, too


def test_layer_norms_stay_what_they_are(engines: Engines) -> None:
    engine, model, uses = engines("gpt2")
    assert relative_error(parts_of(engine), truth(model)) < 1e-4
    assert {what for what, _, _ in engines.product.calls} == {"plain"}
    assert all(uses.norm_of(node) is None for node in uses.nodes.values())


@pytest.mark.parametrize("norm", [WRITES, SCALES])
def test_where_one_of_both_layers_cannot_the_norm_is_launched(norm: int, engines: Engines) -> None:
    engine, model, _ = engines("llama-gqa")
    inner = 2 * model.config.intermediate_size
    # The layer before the second norm of a block, or the one after it.
    engines.product.refuses = {(256, WRITES)} if norm == WRITES else {(inner, SCALES)}
    assert relative_error(parts_of(engine), truth(model)) < 1e-4
    scaled = {n for what, _, n in engines.product.calls if what == "scaled"}
    before = [what for what, rows, _ in engines.product.calls if rows == 1].count("before")
    if norm == WRITES:
        assert not scaled and not before
    else:
        assert inner not in scaled and scaled and before % (model.config.num_hidden_layers - 1) == 0


def test_many_rows_go_to_cublas_and_its_norms_are_launched(engines: Engines) -> None:
    engines.product.most_rows = 8
    engine, model, _ = engines("llama-gqa")
    assert relative_error(parts_of(engine), truth(model)) < 1e-4
    assert {rows for _, rows, _ in engines.product.calls} == {1}


def test_hidden_states_are_normed(engines: Engines) -> None:
    """What goes to the vocabulary's projection is read by steps that embed texts, too."""
    from llmapi._runtime.batch import StepBatch

    engine, model, uses = engines("llama-gqa")
    count = len(IDS)
    slots = [7 * 16 + i if i < 16 else 2 * 16 + i - 16 for i in range(count)]
    batch = StepBatch(IDS, list(range(count)), slots, [[7, 2]], [count], [0, count], list(range(count)), [count], [])
    hidden, logits = engine.step_hidden(batch, None, list(range(count)))
    with torch.no_grad():
        states = model.model(torch.tensor([IDS])).last_hidden_state[0]
    assert relative_error(hidden, states) < 1e-4
    assert relative_error(logits, truth(model)) < 1e-4
    last = [n for n in uses.nodes.values() if n.op == "llmapi.add_rms_norm.default"][-1]
    assert uses.after_norm(last) is None


def test_units_are_those_of_what_was_chosen(engines: Engines) -> None:
    engine, model, _ = engines("llama-gqa")
    width, inner = model.config.hidden_size, model.config.intermediate_size
    qkv = width + 2 * 2 * 64
    products = [(width, width, None), (width, inner, None), (2 * inner, width, "silu"), (qkv, width, None)]
    products.append((model.config.vocab_size, width, None))
    plain = {(rows, *product, VARIANT, 0) for rows in (1, 8) for product in products}
    asked = set(engine._binder.units((1, 8)))
    assert asked == plain | {
        unit
        for rows in (1, 8)
        for unit in (
            (rows, width, width, None, VARIANT, WRITES),
            (rows, width, inner, None, VARIANT, WRITES),
            (rows, 2 * inner, width, "silu", VARIANT, SCALES),
            (rows, qkv, width, None, VARIANT, SCALES),
        )
    }
    later = engine.later_units()
    assert asked - set(later) == {unit for unit in asked if unit[0] == 1}  # whose code is that of 8 rows
    assert {unit[0] for unit in later} == set(BUCKETS)
    engines.product.refuses = {(2 * inner, SCALES), (qkv, SCALES)}
    assert set(engine._binder.units((1, 8))) == plain


def test_steps_of_decoding_take_every_row_without_a_gather(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model, _ = engines("llama-gqa")
    expected = truth(model)
    run(engine, [(IDS, 0, 29, [7, 2])])
    gathered: list[int] = []
    known = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, *a: (gathered.append(len(x)), known(x, *a))[1])
    assert relative_error(run(engine, [(IDS, 29, 30, [7, 2])]), expected[29:]) < 1e-4
    assert gathered == []
    run(engine, [(IDS, 0, 20, [7, 2])])
    assert gathered
