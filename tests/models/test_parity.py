"""Every family against transformers in float32: prefill, chunked prefill and decode through the whole build."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._build.export import export_graph
from llmapi._build.tensor_file import TensorFile
from llmapi._build.weights import converted, tensor_specs, write_weights
from llmapi._kernels import relative_error
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.engine_cpu import CpuEngine
from llmapi.config import EngineOptions, KvCacheConfig, resolve
from llmapi.models.family import family_of, spec_of
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import constants
from tests.tiny import VOCAB, tiny_config, tiny_model

torch.set_num_threads(1)
BLOCK = 16
HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{f}-{h}": (f, {"num_key_value_heads": n}) for f in ("llama", "mistral", "qwen2") for h, n in HEADS.items()},
    "llama-rope3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 48}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu", "n_inner": 96}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
}


class Memory:
    """A checkpoint that lies in memory."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.tensors = state

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def span(self, name: str) -> None:
        return None  # in no file


def state_of(model: Any) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def write_model(model: Any, path: Path, dtype: str) -> TransformerSpec:
    """Convert a model of transformers to a weights file; what it is."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    spec = spec_of(config)
    specs = tensor_specs(spec, dtype)
    with path.open("wb") as out:
        values = converted(Memory(state_of(model)), family_of(config), spec, specs)  # type: ignore[arg-type]
        write_weights(out, specs, values, lambda done: None)
    return spec


# Both ways of the CPU backend: compiled kernels, and torch's operators where there is no compiler.
WAYS = ["compiled", "torch"]
Make = Callable[..., tuple[CpuEngine, Any]]


@pytest.fixture(params=WAYS)
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """From a family and overrides to a loaded engine and the transformers model it must equal."""

    kernels = request.getfixturevalue("kernels") if request.param == "compiled" else None

    def build(family: str, overrides: dict[str, Any], dtype: str = "float32") -> tuple[CpuEngine, Any]:
        model = tiny_model(tiny_config(family, **overrides))
        path = tmp_path / "model.safetensors"
        spec = write_model(model, path, dtype)
        options = EngineOptions(dtype=dtype, max_seq_len=256, kv_cache=KvCacheConfig(max_tokens=64 * BLOCK))
        engine = CpuEngine(export_graph(spec), TensorFile(path), constants(spec), spec, resolve(options, spec), kernels)
        return engine, model

    return build


def run(engine: CpuEngine, parts: list[tuple[list[int], int, int, list[int]]]) -> torch.Tensor:
    """One step over ``(ids, start, stop, block table)`` of each sequence; logits of every token."""
    batch = StepBatch([], [], [], [], [], [0], [], [], [])
    for ids, start, stop, table in parts:
        batch.input_ids += ids[start:stop]
        batch.positions += range(start, stop)
        batch.slot_mapping += [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]
        batch.block_tables.append(table[: -(-stop // BLOCK)])
        batch.seq_lens.append(stop)
        batch.query_start.append(len(batch.input_ids))
    batch.logits_indices = list(range(len(batch.input_ids)))
    return engine.step(batch)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, make: Make) -> None:
    """Prefill at once, prefill in chunks, and 20 decode steps: each within 1e-4."""
    family, overrides = CASES[case]
    engine, model = make(family, overrides)
    ids = random.Random(3).choices(range(VOCAB), k=60)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    whole = run(engine, [(ids, 0, 60, [7, 2, 9, 4])])
    assert relative_error(whole, expected) < 1e-4
    steps = [(0, 13), (13, 33), (33, 40), *((p, p + 1) for p in range(40, 60))]
    for table in ([10, 30, 20, 40], [50, 51, 52, 53]):  # scattered, and in a row
        parts = torch.cat([run(engine, [(ids, a, b, table)]) for a, b in steps])
        assert relative_error(parts, expected) < 1e-4


def test_a_ragged_batch_mixes_prefill_and_decode(make: Make) -> None:
    engine, model = make("llama", {})
    rng = random.Random(5)
    texts = [rng.choices(range(VOCAB), k=n) for n in (40, 17, 33, 5)]
    tables = [[i * 4 + j for j in range(4)] for i in range(4)]
    run(engine, [(texts[0], 0, 39, tables[0]), (texts[1], 0, 10, tables[1])])
    spans = [(39, 40), (10, 17), (0, 33), (0, 5)]
    mixed = run(engine, [(t, a, b, table) for t, (a, b), table in zip(texts, spans, tables, strict=True)])
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([t])).logits[0, a:b] for t, (a, b) in zip(texts, spans, strict=True)])
    assert relative_error(mixed, expected) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_is_near_float32(family: str, make: Make) -> None:
    engine, model = make(family, {}, "bfloat16")
    ids = random.Random(3).choices(range(VOCAB), k=30)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        theirs = relative_error(model.bfloat16()(torch.tensor([ids])).logits[0], expected)
    ours = relative_error(run(engine, [(ids, 0, 30, [1, 2])]), expected)
    assert ours < 1.5 * theirs + 1e-3, (ours, theirs)


def test_copied_blocks_hold_what_their_source_held(make: Make) -> None:
    engine, _ = make("llama", {})
    ids = random.Random(3).choices(range(VOCAB), k=21)
    run(engine, [(ids, 0, 20, [0, 1])])
    expected = run(engine, [(ids, 20, 21, [0, 1])])
    batch = StepBatch([ids[20]], [20], [5 * BLOCK + 4], [[0, 5]], [21], [0, 1], [0], [1], [(1, 5)])
    assert torch.equal(engine.step(batch), expected)
