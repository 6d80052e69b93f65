"""Every operator's record against its reference, and every reference against an independent truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llmapi._kernels import OPS, Op, Sample, relative_error
from llmapi._kernels.native import NativeKernels
from llmapi._kernels.plan import CpuPlan

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16]


def samples(op: Op, dtype: torch.dtype) -> list[Sample]:
    return list(op.samples(torch.Generator().manual_seed(7), dtype))


def plan_for(op: Op, args: tuple[Any, ...]) -> CpuPlan:
    """The step that a sample's arguments describe."""
    if op.name == "rotary_kv_write":
        return CpuPlan(args[2].long(), [])
    _, k_cache, _, tables, lengths, starts = args[:6]
    return CpuPlan.of([], tables.tolist(), lengths.tolist(), starts.tolist(), k_cache.shape[1])


def run(op: Op, function: Any, args: tuple[Any, ...], **extra: Any) -> list[torch.Tensor]:
    """Outputs, then the mutated arguments."""
    own = copy.deepcopy(args)
    out = function(*own, **extra)
    return [*(out if isinstance(out, tuple) else (out,)), *(own[i] for i in op.mutates)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_cpu_implementation_matches_reference(op: Op, dtype: torch.dtype) -> None:
    for sample in samples(op, dtype):
        expected = run(op, op.reference, sample.args)
        if op.cpu is None:
            continue
        extra = {"plan": plan_for(op, sample.args)} if op.reads_plan else {}
        actual = run(op, op.cpu, sample.args, **extra)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and a.shape == e.shape, sample.label
            assert relative_error(a, e) <= op.tolerance[dtype], sample.label


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are full of NaN, so that what a kernel leaves out is seen."""
    torch.set_num_threads(request.param)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.native], ids=lambda op: op.name)
def test_compiled_implementation_matches_reference(op: Op, kernels: NativeKernels, poisoned: None) -> None:
    assert op.native is not None
    for sample in samples(op, torch.float32):
        expected = run(op, op.reference, sample.args)
        extra = {"plan": plan_for(op, sample.args)} if op.reads_plan else {}
        actual = run(op, partial(op.native, kernels), sample.args, **extra)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and a.shape == e.shape, sample.label
            assert relative_error(a, e) <= op.tolerance[torch.float32], sample.label


@pytest.mark.parametrize(("block_size", "dim", "heads", "kv_heads"), [(16, 64, 9, 3), (7, 48, 8, 1), (1, 16, 2, 2)])
@pytest.mark.parametrize("window", [0, 5, 100])
def test_compiled_attention_over_many_chunks(
    block_size: int, dim: int, heads: int, kv_heads: int, window: int, kernels: NativeKernels, poisoned: None
) -> None:
    """Prompts of several tiles, chunks that end anywhere, windows that skip whole chunks; unwritten slots are NaN."""
    generator = torch.Generator().manual_seed(11)
    op = OPS["llmapi.paged_attention.default"]
    assert op.native is not None
    for ragged in ([(200, 200), (1, 129), (70, 333), (1, 64), (33, 65)], [(1, n) for n in (1, 63, 64, 65, 128, 300)]):
        needed = [-(-length // block_size) for _, length in ragged]
        blocks = torch.randperm(sum(needed), generator=generator)
        tables = torch.full((len(ragged), max(needed)), 10**6, dtype=torch.int32)
        caches = [torch.full((sum(needed), block_size, kv_heads, dim), torch.nan) for _ in range(2)]
        for row, ((_, length), ids) in enumerate(zip(ragged, torch.split(blocks, needed), strict=True)):
            tables[row, : len(ids)] = ids
            slots = (ids[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
            for cache in caches:
                cache.view(-1, kv_heads, dim)[slots] = torch.randn(length, kv_heads, dim, generator=generator)
        lengths = torch.tensor([length for _, length in ragged], dtype=torch.int32)
        starts = torch.tensor([0, *(count for count, _ in ragged)]).cumsum(0).int()
        q = torch.randn(int(starts[-1]), heads, dim, generator=generator)
        args = (q, *caches, tables, lengths, starts, dim**-0.5, window, 0.0, None, None)
        actual = op.native(kernels, *args, plan=plan_for(op, args))
        assert relative_error(actual, op.reference(*args)) <= op.tolerance[torch.float32]


def test_compiled_attention_leaves_odd_heads_to_torch(kernels: NativeKernels) -> None:
    """Heads whose size is no multiple of the vector's."""
    op = OPS["llmapi.paged_attention.default"]
    assert op.native is not None
    q, caches = torch.randn(2, 2, 20), [torch.randn(3, 4, 1, 20) for _ in range(2)]
    ints = (torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32))
    args = (q, *caches, *ints, torch.tensor([0, 2], dtype=torch.int32), 0.2, 0, 0.0, None, None)
    actual = op.native(kernels, *args, plan=plan_for(op, args))
    assert relative_error(actual, op.reference(*args)) <= op.tolerance[torch.float32]


def test_compiled_rotation_skips_negative_slots(kernels: NativeKernels) -> None:
    op = OPS["llmapi.rotary_kv_write.default"]
    assert op.native is not None
    caches = [torch.zeros(1, 8, 1, 4) for _ in range(2)]
    slots = torch.tensor([-1, 3], dtype=torch.int32)
    op.native(kernels, torch.ones(2, 12), None, slots, *caches, False, plan=CpuPlan(slots.long(), []))
    assert caches[0].sum() == 4 and caches[0][0, 3].sum() == 4


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_schema_and_shape_rule_hold(op: Op) -> None:
    """torch's own checks: the schema tells of every mutation, and the shape rule agrees with the reference."""
    registered = getattr(torch.ops.llmapi, op.name).default
    for sample in samples(op, torch.float32)[:4]:
        torch.library.opcheck(registered, copy.deepcopy(sample.args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_samples_exercise_every_argument(op: Op) -> None:
    """Each argument takes at least two values over the samples."""
    rows = [sample.args for sample in samples(op, torch.float32)]
    for position in range(len(rows[0])):
        seen = {_key(row[position]) for row in rows}
        assert len(seen) > 1, f"argument {position} of {op.name} never changes"


def _key(value: Any) -> Any:
    return (tuple(value.shape), *value.double().flatten().tolist()) if isinstance(value, torch.Tensor) else value


def test_samples_are_seeded() -> None:
    for op in OPS.values():
        first, second = samples(op, torch.float32), samples(op, torch.float32)
        assert [[_key(v) for v in s.args] for s in first] == [[_key(v) for v in s.args] for s in second]


def test_rms_norm_is_that_of_transformers() -> None:
    for sample in samples(OPS["llmapi.rms_norm.default"], torch.float32):
        x, weight, eps = sample.args
        module = LlamaRMSNorm(x.shape[-1], eps).double()
        module.weight.data.copy_(weight)
        # Llama's module computes in float32 whatever it is given; in float64 the formula is written out.
        wide = x.double()
        expected = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + eps) * weight.double()
        assert relative_error(torch.ops.llmapi.rms_norm(x, weight, eps), expected) < 1e-6
        assert relative_error(module(x), expected) < 1e-6


def test_add_norms_add_first() -> None:
    for name, norm in (("add_rms_norm", None), ("add_layer_norm", F.layer_norm)):
        for sample in samples(OPS[f"llmapi.{name}.default"], torch.float32):
            x, residual, weight, *rest = sample.args
            normed, total = getattr(torch.ops.llmapi, name)(*sample.args)
            assert torch.equal(total, x + residual)
            wide = total.double()
            if norm is None:
                expected = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + rest[0]) * weight.double()
            else:
                expected = norm(wide, (wide.shape[-1],), weight.double(), rest[0].double(), rest[1])
            assert relative_error(normed, expected) < 1e-6


def test_gated_activation_is_the_formula() -> None:
    formulas = {
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": lambda x: x.clamp(min=0),
    }
    for sample in samples(OPS["llmapi.gated_activation.default"], torch.float32):
        x, kind = sample.args
        gate, up = x.double().chunk(2, -1)
        assert relative_error(torch.ops.llmapi.gated_activation(x, kind), formulas[kind](gate) * up) < 1e-6


def test_rotation_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    tokens, heads, dim = 11, 3, 64
    q, k = torch.randn(1, heads, tokens, dim), torch.randn(1, 1, tokens, dim)
    positions = torch.arange(5, 5 + tokens)
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat([positions[:, None] * inv_freq] * 2, -1)[None]
    expected_q, expected_k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    cos_sin = torch.ops.llmapi.rotary_cos_sin(positions.int(), inv_freq.float(), 1.0)
    v = torch.randn(tokens, dim)
    qkv = torch.cat((q[0].transpose(0, 1).flatten(1), k[0].transpose(0, 1).flatten(1), v), -1)
    k_cache, v_cache = torch.full((2, 16, 1, dim), torch.nan), torch.full((2, 16, 1, dim), torch.nan)
    slots = torch.randperm(32)[:tokens].int()
    out = torch.ops.llmapi.rotary_kv_write(qkv, cos_sin, slots, k_cache, v_cache, False)
    assert relative_error(out.transpose(0, 1), expected_q[0]) < 1e-6
    assert relative_error(k_cache.view(32, dim)[slots.long()], expected_k[0, 0]) < 1e-6
    assert torch.equal(v_cache.view(32, dim)[slots.long()], v)
    assert int(k_cache.isnan().all(-1).sum()) == 32 - tokens, "rows were written that no slot names"


def test_interleaved_rotation_turns_neighbours() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    angle = torch.tensor([[0.5, 0.25]])
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1)
    qkv = torch.cat((x.view(1, 4), torch.zeros(1, 8)), -1)
    caches = [torch.zeros(1, 8, 1, 4) for _ in range(2)]
    out = torch.ops.llmapi.rotary_kv_write(qkv, cos_sin, torch.tensor([0]), *caches, True)
    turned = torch.view_as_complex(x.view(2, 2)) * torch.polar(torch.ones(2), angle[0])
    assert torch.allclose(out.view(2, 2), torch.view_as_real(turned))


def test_negative_slots_are_not_written() -> None:
    caches = [torch.zeros(1, 8, 1, 4) for _ in range(2)]
    torch.ops.llmapi.rotary_kv_write(torch.ones(2, 12), None, torch.tensor([-1, 3]), *caches, False)
    assert caches[0].sum() == 4 and caches[0][0, 3].sum() == 4


@pytest.mark.parametrize("window", [0, 6])
def test_attention_is_dense_attention(window: int) -> None:
    """Against torch's attention in float64 over the whole sequence, for every split into chunks."""
    torch.manual_seed(1)
    length, heads, kv_heads, dim, block = 29, 6, 2, 32, 8
    q, k, v = (torch.randn(length, h, dim) for h in (heads, kv_heads, kv_heads))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window:
        seen &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    wide = [x.double().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen, scale=0.3).transpose(0, 1)
    table = torch.tensor([[3, 0, 5, 1]], dtype=torch.int32)
    slots = torch.stack([table[0, p // block] * block + p % block for p in range(length)]).long()
    k_cache, v_cache = (torch.full((6, block, kv_heads, dim), torch.nan) for _ in range(2))
    for chunk in (1, 7, 29):
        outs = []
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache.view(-1, kv_heads, dim)[slots[start:stop]] = new[start:stop]
            ints = (torch.tensor([stop]), torch.tensor([0, stop - start]))
            outs.append(
                torch.ops.llmapi.paged_attention(
                    q[start:stop], k_cache, v_cache, table, *ints, 0.3, window, 0.0, None, None
                )
            )
        assert relative_error(torch.cat(outs), expected) < 1e-6, chunk


def test_attention_variants_are_their_formulas() -> None:
    """Soft cap, ALiBi and sinks, written out for one query over three keys in float64."""
    q, k, v = torch.randn(1, 1, 16), torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    caches = [torch.zeros(1, 8, 1, 16) for _ in range(2)]
    caches[0][0, :3], caches[1][0, :3] = k, v
    ints = (torch.tensor([[0]]), torch.tensor([3]), torch.tensor([0, 1]))
    scores = (k.double()[:, 0] @ q.double()[0, 0]) * 0.25
    slope, sink = 0.4, 0.7
    for softcap, alibi, sinks in ((2.0, False, False), (0.0, True, False), (0.0, False, True), (2.0, True, True)):
        s = softcap * torch.tanh(scores / softcap) if softcap else scores
        s = s + slope * torch.tensor([-2.0, -1.0, 0.0]) if alibi else s
        weights = s.exp() / (s.exp().sum() + (torch.tensor(sink).double().exp() if sinks else 0))
        out = torch.ops.llmapi.paged_attention(
            q, *caches, *ints, 0.25, 0, softcap,
            torch.tensor([slope]) if alibi else None, torch.tensor([sink]) if sinks else None,
        )  # fmt: skip
        assert relative_error(out[0, 0], weights @ v.double()[:, 0]) < 1e-6, (softcap, alibi, sinks)


def test_relative_error_never_passes_nan() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
