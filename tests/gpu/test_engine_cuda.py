"""The engine on a GPU against transformers in float32: prefill, chunks, decode, mixed batches, graphs, block copies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._build.export import export_graph
from llmapi._build.tensor_file import TensorFile
from llmapi._kernels import relative_error
from llmapi._kernels.gpu import Gpu
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine_cuda import CudaEngine
from llmapi._runtime.weights_cuda import read_weights
from llmapi.config import EngineOptions, KvCacheConfig, resolve
from llmapi.models.transformer import constants
from tests.models.test_parity import CASES, run, write_model
from tests.tiny import VOCAB, tiny_config, tiny_model

pytestmark = pytest.mark.gpu
BLOCK = 16
WIDE = {"hidden_size": 256}  # heads of 64
LARGE: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": 256}}
Make = Callable[..., tuple[CudaEngine, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """From a family and overrides to a loaded engine and the transformers model it must equal."""
    engines = []

    def build(family: str, overrides: dict[str, Any], dtype: str = "float32") -> tuple[CudaEngine, Any]:
        model = tiny_model(tiny_config(family, **{**LARGE.get(family, WIDE), **overrides}))
        path = tmp_path / "model.safetensors"
        spec = write_model(model, path, dtype)
        kv = KvCacheConfig(max_tokens=64 * BLOCK, block_size=BLOCK)
        options = EngineOptions(backend="cuda", dtype=dtype, max_seq_len=256, max_batch_size=16, kv_cache=kv)
        graph, device = export_graph(spec), torch.device("cuda", 0)
        engine = CudaEngine(
            graph,
            lambda: read_weights(graph, TensorFile(path), device, lambda done: None),
            constants(spec),
            spec,
            resolve(options, spec),
            gpu=Gpu(device),
            utilization=0.5,
        )
        engines.append(engine)
        return engine, model

    yield build
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, make: Make) -> None:
    """Prefill at once, in chunks, and 20 decode steps: each within 1e-4 in float32."""
    family, overrides = CASES[case]
    if "head_dim" in overrides:
        overrides = {**overrides, "head_dim": 80}
    engine, model = make(family, overrides)
    ids = random.Random(3).choices(range(VOCAB), k=60)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert relative_error(run(engine, [(ids, 0, 60, [7, 2, 9, 4])]).cpu(), expected) < 1e-4
    steps = [(0, 13), (13, 33), (33, 40), *((p, p + 1) for p in range(40, 60))]
    for table in ([10, 30, 20, 40], [50, 51, 52, 53]):
        parts = torch.cat([run(engine, [(ids, a, b, table)]).cpu() for a, b in steps])
        assert relative_error(parts, expected) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama-gqa", "llama-mha", "mistral-window", "qwen2-mqa", "gpt2"])
def test_sixteen_bits_are_near_float32(case: str, dtype: str, make: Make) -> None:
    """No farther from float32 than transformers is in the same type, in prefill, chunks and decode."""
    family, overrides = CASES[case]
    engine, model = make(family, overrides, dtype)
    ids = random.Random(3).choices(range(VOCAB), k=60)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        model = model.to("cuda", getattr(torch, dtype))
        theirs = relative_error(model(torch.tensor([ids], device="cuda")).logits[0].cpu(), expected)
    steps = [(0, 13), (13, 33), (33, 40), *((p, p + 1) for p in range(40, 60))]
    for spans in ([(0, 60)], steps):
        parts = torch.cat([run(engine, [(ids, a, b, [10, 30, 20, 40])]).cpu() for a, b in spans])
        assert relative_error(parts, expected) < 1.5 * theirs + 1e-3, (theirs, len(spans))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ragged_batch_mixes_prefill_and_decode(dtype: str, make: Make) -> None:
    engine, model = make("llama", {}, dtype)
    rng = random.Random(5)
    texts = [rng.choices(range(VOCAB), k=n) for n in (40, 17, 33, 5)]
    tables = [[i * 4 + j for j in range(4)] for i in range(4)]
    run(engine, [(texts[0], 0, 39, tables[0]), (texts[1], 0, 10, tables[1])])
    spans = [(39, 40), (10, 17), (0, 33), (0, 5)]
    mixed = run(engine, [(t, a, b, table) for t, (a, b), table in zip(texts, spans, tables, strict=True)]).cpu()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([t])).logits[0, a:b] for t, (a, b) in zip(texts, spans, strict=True)])
    assert relative_error(mixed, expected) < (1e-4 if dtype == "float32" else 3e-2)


def test_decoding_in_any_number_fits_its_graph(make: Make) -> None:
    """Batches of 1 to 16 sequences of different lengths: each row as if it were alone."""
    engine, model = make("llama", {})
    rng = random.Random(6)
    for count in (1, 3, 4, 7, 11, 16):
        texts = [rng.choices(range(VOCAB), k=rng.randint(2, 48)) for _ in range(count)]
        tables = [[i * 3 + j for j in range(3)] for i in range(count)]
        for text, table in zip(texts, tables, strict=True):
            run(engine, [(text, 0, len(text) - 1, table)])
        rows = run(engine, [(t, len(t) - 1, len(t), table) for t, table in zip(texts, tables, strict=True)]).cpu()
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([t])).logits[0, -1] for t in texts])
        assert relative_error(rows, expected) < 1e-4, count


def test_copied_blocks_hold_what_their_source_held(make: Make) -> None:
    engine, _ = make("llama", {})
    ids = random.Random(3).choices(range(VOCAB), k=21)
    run(engine, [(ids, 0, 20, [0, 1])])
    expected = run(engine, [(ids, 20, 21, [0, 1])]).clone()
    batch = StepBatch([ids[20]], [20], [5 * BLOCK + 4], [[0, 5]], [21], [0, 1], [0], [1], [(1, 5)])
    assert torch.equal(engine.step(batch), expected)


def test_references_are_filled_in(make: Make) -> None:
    """An input id ``~row`` stands for what the step before sampled in that row."""
    engine, _ = make("llama", {})
    ids = random.Random(3).choices(range(VOCAB), k=21)
    run(engine, [(ids, 0, 20, [0, 1])])
    expected = run(engine, [(ids, 20, 21, [0, 1])]).clone()
    sampled = torch.tensor([7, ids[20]], dtype=torch.int32, device="cuda")
    batch = StepBatch([~1], [20], [BLOCK + 4], [[0, 1]], [21], [0, 1], [0], [1], [])
    assert torch.equal(engine.step(batch, sampled), expected)


def test_closing_gives_the_memory_back(make: Make) -> None:
    engine, _ = make("llama", {})  # libraries take what they keep
    run(engine, [([1, 2, 3], 0, 3, [0])])
    engine.close()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine, _ = make("llama", {}, "bfloat16")
    run(engine, [([1, 2, 3], 0, 3, [0])])
    engine.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before
