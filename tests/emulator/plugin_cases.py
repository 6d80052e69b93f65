"""Kernels of TensorRT plugins on an emulated GPU, with the parameters that TensorRT gives them, against references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmapi._kernels import OPS, relative_error
from llmapi._kernels.paged_attention import PAGED_ATTENTION, paged_attention
from llmapi._kernels.plugins import PLUGINS, pool_addresses
from tests.emulator.cases import SEED
from tests.emulator.gpu import EmulatedGpu
from tests.gpu.test_context_attention import VARIANTS, Step

LAYER = 1  # of the caches that are used; those before and after hold NaN


def run(
    gpu: EmulatedGpu,
    name: str,
    tensors: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    before: float = float("nan"),
) -> tuple[torch.Tensor, ...]:
    """Outputs of a plugin.

    Args:
        gpu: where.
        name: of the plugin.
        tensors: its inputs.
        attributes: its attributes, but for ``arch``.
        before: what outputs hold before the kernel runs.
    """
    plugin = PLUGINS[name]
    dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors]
    model = plugin.model_dtype(dtypes, [t.dim() for t in tensors])
    assert all(t.is_contiguous() for t in tensors)
    shapes = [tuple(t.shape) for t in tensors]
    launch = plugin.launch(model, shapes, attributes)
    types = [tensors[0].dtype if kind == "model" else getattr(torch, kind) for kind in plugin.output_types]
    found = zip(plugin.outputs(shapes, attributes), types, strict=True)
    outputs = [torch.full(shape, before, dtype=dtype) for shape, dtype in found]
    signature = "p" * len(tensors) + "i" * len(launch.extras) + "p" * len(outputs)
    kernel = gpu.kernel(launch.unit, launch.entry, signature, shared=launch.shared)
    kernel(launch.grid, launch.block, *tensors, *launch.extras, *outputs, shared=launch.shared)
    return tuple(outputs)


def pools_of(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Addresses of three layers, the middle one these; and the others' caches."""
    others = [torch.full_like(k, float("nan")) for _ in range(4)]
    return pool_addresses([(others[0], others[1]), (k, v), (others[2], others[3])]), others


def with_margins(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy with a block before and one behind it, which hold 7; and the whole."""
    whole = torch.full((cache.shape[0] + 2, *cache.shape[1:]), 7.0, dtype=cache.dtype)
    whole[1:-1] = cache
    return whole[1:-1], whole


STEPS: dict[str, list[tuple[int, int]]] = {
    "mixed": [(1, 40), (1, 1), (63, 63), (64, 64), (1, 130), (33, 97), (2, 2), (1, 17)],
    "decode": [(1, n) for n in (300, 1, 15, 16, 17, 33, 64, 129)],
    "prompts": [(130, 130), (16, 81), (300, 333)],
}
"""(new tokens, all tokens) of each sequence."""


def attention(
    gpu: EmulatedGpu,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    steps: Sequence[str] = tuple(STEPS),
    variants: Sequence[str] = tuple(VARIANTS),
    parts: int = 1,
) -> None:
    """All variants over ragged steps with rows and sequences of no meaning at the end."""
    for name in steps:
        lengths = STEPS[name]
        step = Step(lengths, 0, heads, kv_heads, head_dim, block_size, dtype, SEED, idle_rows=4, device="cpu")
        for variant in variants:
            _check(gpu, step, f"{name} {variant}", step.options(**VARIANTS[variant]), parts)


def many_sequences(gpu: EmulatedGpu) -> None:
    """More sequences than lanes of a warp, some with no rows among them; more than lanes squared."""
    some = [(i % 3, 3 + i * 5 % 40) for i in range(70)] + [(70, 75), (0, 9), (1, 4)]
    many = [(i % 2, 1 + i % 3) for i in range(1100)]
    for lengths in (some, many):
        step = Step(lengths, 0, 2, 1, 64, 16, torch.bfloat16, SEED, device="cpu")
        _check(gpu, step, f"{len(lengths)} sequences", step.options())


def write_then_attend(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    """Both plugins of a layer, the second fed by the first, as in a network."""
    step = Step([(1, 40), (37, 50), (20, 20), (1, 1)], 0, 6, 2, 64, 16, dtype, SEED, padding=0, device="cpu")
    tokens, starts = step.rows, step.starts.tolist()
    generator = torch.Generator().manual_seed(SEED)
    qkv = torch.randn(tokens, 10 * 64, generator=generator).to(dtype)
    angles = torch.rand(tokens, 32, generator=generator) * 6.28
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    slots = torch.empty(tokens, dtype=torch.int32)
    for i, (new, length) in enumerate(step.lengths):
        for row in range(new):
            at = length - new + row
            slots[starts[i] + row] = int(step.tables[i, at // 16]) * 16 + at % 16
    k, v = step.k.clone(), step.v.clone()
    q = OPS["llmapi.rotary_kv_write.default"].reference(qkv, cos_sin, slots, k, v, False)
    expected = paged_attention(q, k, v, step.tables, step.totals, step.starts, 0.125, 30, 0.0, None, None)
    pools, _ = pools_of(step.k, step.v)
    shape = {"layer": LAYER, "heads": 6, "kv_heads": 2, "head_dim": 64}
    (q,) = run(gpu, "rotary_kv_write", [qkv, cos_sin, slots, pools], {**shape, "rotary_dim": 64, "interleaved": 0})
    attributes = {**shape, "block_size": 16, "scale": 0.125, "window": 30, "softcap": 0.0}
    (out,) = run(gpu, "paged_attention", [q, pools, step.tables, step.totals, step.starts], attributes)
    error = relative_error(out, expected)
    assert error <= PAGED_ATTENTION.tolerance[dtype], error


def _check(gpu: EmulatedGpu, step: Step, label: str, options: list[Any], parts: int = 1) -> None:
    scale, window, softcap, slopes, sinks = options
    q = step.q.contiguous()
    pools, _ = pools_of(step.k, step.v)
    kv_heads, head_dim = step.kv_heads, step.head_dim
    attributes: dict[str, Any] = {"layer": LAYER, "heads": step.heads, "kv_heads": kv_heads, "head_dim": head_dim}
    attributes |= {"block_size": step.block_size, "scale": scale, "window": window, "softcap": softcap}
    tensors = [q, pools, step.tables, step.totals, step.starts]
    plugin = "paged_attention"
    if parts > 1:
        plugin += "_parts"
        attributes |= {"parts": parts}
    vectors = [v for v in (slopes, sinks) if v is not None]
    if vectors:
        plugin += "_biased"
        tensors += [vectors[0], vectors[-1]]
        attributes |= {"alibi": int(slopes is not None), "sinks": int(sinks is not None)}
    if parts == 1:
        (out,) = run(gpu, plugin, tensors, attributes)
        _compare(step, q, out, label, options)
        return
    more = [] if sinks is None else [sinks]
    join = "join_parts_sinks" if more else "join_parts"
    for before in (float("nan"), 3.0):  # NaN in place of a sum would pass for the mark of a row that is not in parts
        left = run(gpu, plugin, tensors, attributes, before)
        (out,) = run(gpu, join, [*left, *more], {"heads": step.heads, "head_dim": head_dim})
        _compare(step, q, out, f"{label} {before}", options)


def _compare(step: Step, q: torch.Tensor, out: torch.Tensor, label: str, options: list[Any]) -> None:
    live, starts = len(step.lengths), step.starts.tolist()
    expected = paged_attention(q, step.k, step.v, step.tables, step.totals[:live], step.starts[: live + 1], *options)
    for i in range(live):
        rows = slice(starts[i], starts[i + 1])
        error = relative_error(out[rows], expected[rows])
        assert error <= PAGED_ATTENTION.tolerance[step.dtype], f"{label} {step.lengths[i]}: {error}"
    assert (out[step.rows :] == 0).all(), label


def impossible_lengths(gpu: EmulatedGpu) -> None:
    """Sequences that have fewer tokens than new ones give zeros, and nothing is read for them."""
    step = Step([(1, 5), (1, 9), (20, 30), (20, 33)], 0, 4, 2, 64, 16, torch.bfloat16, SEED, device="cpu")
    step.totals[0], step.totals[2] = 0, 19
    before = step.starts.tolist()
    pools, _ = pools_of(step.k, step.v)
    attributes = {"layer": LAYER, "heads": 4, "kv_heads": 2, "head_dim": 64, "block_size": 16}
    attributes |= {"scale": 0.125, "window": 0, "softcap": 0.0}
    tensors = [step.q.contiguous(), pools, step.tables, step.totals, step.starts]
    (out,) = run(gpu, "paged_attention", tensors, attributes)
    for i in (0, 2):
        assert (out[before[i] : before[i + 1]] == 0).all()
    for i in (1, 3):
        rows = slice(before[i], before[i + 1])
        assert out[rows].isfinite().all() and (out[rows] != 0).any(-1).all()


def write(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    """Every sample of the operator, caches between margins; a token whose slot is negative is not written."""
    op = OPS["llmapi.rotary_kv_write.default"]
    for sample in op.samples(torch.Generator().manual_seed(SEED), dtype):
        qkv, cos_sin, slots, k, v, interleaved = sample.args
        if len(slots) > 3:
            slots[2] = -1
        _check_write(gpu, sample.label, qkv, cos_sin, slots, k, v, interleaved)


def _check_write(
    gpu: EmulatedGpu,
    label: str,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    interleaved: bool,
) -> None:
    op = OPS["llmapi.rotary_kv_write.default"]
    (keys, all_keys), (values, all_values) = with_margins(k), with_margins(v)
    pools, others = pools_of(keys, values)
    kv_heads, head_dim = k.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    attributes: dict[str, Any] = {"layer": LAYER, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    name, tensors = "kv_write", [qkv, slots, pools]
    if cos_sin is not None:
        name, tensors = "rotary_kv_write", [qkv, cos_sin, slots, pools]
        attributes |= {"rotary_dim": cos_sin.shape[1], "interleaved": int(interleaved)}
    (q,) = run(gpu, name, tensors, attributes)
    expected = op.reference(qkv, cos_sin, slots, k, v, interleaved)
    for what, actual, wanted in (("q", q, expected), ("keys", keys, k), ("values", values, v)):
        error = relative_error(actual, wanted)
        assert error <= op.tolerance[qkv.dtype], f"{label} {what}: {error}"
    assert all((whole[[0, -1]] == 7).all() for whole in (all_keys, all_values)), label
    assert all(other.isnan().all() for other in others), label


def no_guard(gpu: EmulatedGpu) -> None:
    """Where the guard is not, no address is followed, no other input believed, and all outputs are NaN."""
    wrong = torch.full((7,), 64, dtype=torch.int64)
    shape = {"layer": LAYER, "heads": 4, "kv_heads": 2, "head_dim": 64}
    nonsense = torch.full((70,), 1 << 30, dtype=torch.int32)
    (q,) = run(gpu, "kv_write", [torch.randn(3, 512), nonsense[:3], wrong], shape, before=0.0)
    assert q.isnan().all() and q.shape == (3, 4, 64)
    attributes = {**shape, "block_size": 16, "scale": 1.0, "window": 0, "softcap": 0.0}
    tensors = [torch.randn(70, 4, 64), wrong, nonsense[:6].view(2, 3), nonsense[:2], nonsense[:3]]
    (out,) = run(gpu, "paged_attention", tensors, attributes, before=0.0)
    assert out.isnan().all()
    left = run(gpu, "paged_attention_parts", tensors, {**attributes, "parts": 200}, before=0.0)
    (out,) = run(gpu, "join_parts", left, {"heads": 4, "head_dim": 64})
    assert out.isnan().all()


def add_rms_norm(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    """Every sample of the operator."""
    op = OPS["llmapi.add_rms_norm.default"]
    for sample in op.samples(torch.Generator().manual_seed(SEED), dtype):
        x, residual, weight, eps = sample.args
        got = run(gpu, "add_rms_norm", [x, residual, weight], {"width": x.shape[1], "eps": eps})
        for actual, expected in zip(got, op.reference(*sample.args), strict=True):
            error = relative_error(actual, expected)
            assert error <= op.tolerance[dtype], f"{sample.label}: {error}"
