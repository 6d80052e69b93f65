"""Rotary embedding (Su et al. 2021, arXiv:2104.09864) and the write of keys and values into the paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmapi._kernels import attention_tensorrt, rotary_cuda
from llmapi._kernels.native import NativeKernels
from llmapi._kernels.op import Op, Sample
from llmapi._kernels.plan import CpuPlan


def rotary_cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor, scale: float) -> torch.Tensor:
    """Cosines and sines of every token's angles: computed once a step, used by every layer.

    Args:
        positions: ``[T]`` int32 or int64.
        inv_freq: ``[R / 2]`` float32, radians per position.
        scale: what both are multiplied by (yarn's attention factor).

    Returns:
        ``[T, R]`` float32: cosines in the first half, sines in the second.
    """
    angles = positions.float()[:, None] * inv_freq[None, :]
    return torch.cat((angles.cos(), angles.sin()), -1) * scale


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the leading ``R`` channels of each head.

    Args:
        x: ``[T, H, D]``.
        cos_sin: ``[T, R]`` from :func:`rotary_cos_sin`.
        interleaved: pairs are neighbours instead of ``R / 2`` apart.
    """
    width = cos_sin.shape[-1]
    cos, sin = cos_sin[:, None, :].chunk(2, -1)
    head, tail = x[..., :width].float(), x[..., width:]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), tail), -1)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to their slots, return the queries.

    Args:
        qkv: ``[T, (H + 2 K) D]``: all query heads, then key heads, then value heads.
        cos_sin: ``[T, R]`` float32 from :func:`rotary_cos_sin`; None for no rotation.
        slot_mapping: ``[T]``; slot ``s`` is row ``s % block_size`` of block ``s // block_size``; negative: not written.
        k_cache, v_cache: ``[blocks, block_size, K, D]``, written.
        interleaved: pairing of the rotation.

    Returns:
        ``[T, H, D]`` queries.
    """
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * kv_heads
    q, k, v = torch.split(heads, [num_heads, kv_heads, kv_heads], 1)
    if cos_sin is not None:
        q, k = rotate(q, cos_sin, interleaved), rotate(k, cos_sin, interleaved)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    k_cache.view(-1, kv_heads, head_dim)[slots] = k[kept].to(k_cache.dtype)
    v_cache.view(-1, kv_heads, head_dim)[slots] = v[kept].to(v_cache.dtype)
    return torch.clone(q, memory_format=torch.contiguous_format)


def _write_cpu(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
    *,
    plan: CpuPlan,
) -> torch.Tensor:
    """Queries and keys turned together; rows written with one ``index_copy_`` each."""
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * kv_heads
    turned = heads[:, : num_heads + kv_heads]
    if cos_sin is not None:
        if interleaved or cos_sin.shape[-1] != head_dim or qkv.dtype != torch.float32:
            turned = rotate(turned, cos_sin, interleaved)
        else:
            cos, signed_sin = plan.rotary_factors(cos_sin)
            turned = (turned * cos).addcmul_(turned.roll(head_dim // 2, -1), signed_sin)
    k_cache.view(-1, kv_heads, head_dim).index_copy_(0, plan.slots, turned[:, num_heads:])
    v_cache.view(-1, kv_heads, head_dim).index_copy_(0, plan.slots, heads[:, num_heads + kv_heads :])
    return turned[:, :num_heads]


def _write_native(
    kernels: NativeKernels,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
    *,
    plan: CpuPlan,
) -> torch.Tensor:
    tokens, (kv_heads, head_dim) = qkv.shape[0], k_cache.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    qkv, q = qkv.contiguous(), qkv.new_empty(tokens, heads, head_dim)
    angles, rotary = (None, 0) if cos_sin is None else (cos_sin.data_ptr(), cos_sin.shape[1])
    kernels.rotary_kv_write(
        qkv.data_ptr(), angles, slot_mapping.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), q.data_ptr(),
        tokens, heads, kv_heads, head_dim, rotary, interleaved, torch.get_num_threads(),
    )  # fmt: skip
    return q


def _write_shape(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    kv_heads, head_dim = k_cache.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)


def _cos_sin_samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for count, pairs in ((1, 32), (65, 16), (9, 64)):
        positions = torch.randint(0, 131072, (count,), generator=generator, dtype=torch.int32)
        inv_freq = torch.rand(pairs, generator=generator)
        yield Sample(f"{count}x{pairs}", (positions, inv_freq, 1.0))
        yield Sample(f"{count}x{pairs} scaled", (positions, inv_freq, 1.25))


def _write_samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    shapes = ((1, 9, 3, 64, 64), (13, 4, 4, 80, 80), (7, 8, 1, 32, 16), (5, 2, 2, 64, 0))
    for count, heads, kv_heads, head_dim, rotary_dim in shapes:
        for interleaved in (False, True):
            blocks, block_size = 6, 16
            qkv = torch.randn(count, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
            slots = torch.randperm(blocks * block_size, generator=generator)[:count].to(torch.int32)
            caches = [
                torch.randn(blocks, block_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2)
            ]
            angles = torch.rand(count, rotary_dim // 2, generator=generator) * 6.28
            cos_sin = torch.cat((angles.cos(), angles.sin()), -1) if rotary_dim else None
            label = f"T{count} H{heads}/{kv_heads} D{head_dim} R{rotary_dim}" + " interleaved" * interleaved
            yield Sample(label, (qkv, cos_sin, slots, *caches, interleaved))


ROTARY_COS_SIN = Op(
    name="rotary_cos_sin",
    schema="(Tensor positions, Tensor inv_freq, float scale) -> Tensor",
    shape=lambda positions, inv_freq, scale: inv_freq.new_empty(positions.shape[0], 2 * inv_freq.shape[0]),
    reference=rotary_cos_sin,
    cuda=rotary_cuda.rotary_cos_sin,
    tensorrt=attention_tensorrt.rotary_cos_sin,
    samples=_cos_sin_samples,
    tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6},
    reason="float32 whatever the model's dtype; angles are one float32 product, as the models were trained with",
)
ROTARY_KV_WRITE = Op(
    name="rotary_kv_write",
    schema=(
        "(Tensor qkv, Tensor? cos_sin, Tensor slot_mapping, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "bool interleaved) -> Tensor"
    ),
    shape=_write_shape,
    reference=rotary_kv_write,
    cuda=rotary_cuda.rotary_kv_write,
    tensorrt=attention_tensorrt.rotary_kv_write,
    cpu=_write_cpu,
    native=_write_native,
    reads_plan=True,
    mutates=(3, 4),
    samples=_write_samples,
    tolerance={torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3},
    reason="two products and a sum in float32; one rounding to the output dtype",
)
