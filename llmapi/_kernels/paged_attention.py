"""Attention over the paged KV cache: prefill, chunked prefill and decode are one operator with other lengths.

Paged cache: Kwon et al. 2023, arXiv:2309.06180. Attention sinks as a learned logit per head: gpt-oss. ALiBi: Press et
al. 2021, arXiv:2108.12409. Soft cap: Gemma 2, arXiv:2408.00118.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llmapi._kernels import attention_tensorrt
from llmapi._kernels.native import LANES, MAX_GROUP, MAX_HEAD_DIM, NativeKernels
from llmapi._kernels.op import Op, Sample
from llmapi._kernels.plan import CpuPlan, Span


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Each sequence's new tokens attend to all of its tokens up to themselves.

    Args:
        q: ``[T, H, D]`` queries of all sequences, one sequence after the other.
        k_cache, v_cache: ``[blocks, block_size, K, D]``; query head ``h`` reads key head ``h // (H / K)``.
        block_tables: ``[B, M]`` block ids of each sequence, padded with anything.
        seq_lens: ``[B]`` tokens of each sequence, this step's included.
        query_start: ``[B + 1]`` first row of each sequence in ``q``; its rows are its last tokens.
        scale: factor of the scores.
        window: tokens that a token sees, itself included; 0 for all.
        softcap: ``c`` bounds scores to ``c * tanh(score / c)``; 0 for none.
        alibi_slopes: ``[H]``: ``slope * (key - query)`` is added to the scores.
        sinks: ``[H]``: a logit of each head that takes part in the softmax and carries no value.

    Returns:
        ``[T, H, D]``, computed in float32.
    """
    out = torch.empty_like(q)
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    group = q.shape[1] // kv_heads
    for i in range(seq_lens.shape[0]):
        start, stop, length = int(query_start[i]), int(query_start[i + 1]), int(seq_lens[i])
        if start == stop:
            continue
        table = block_tables[i, : -(-length // block_size)].long()
        k, v = (c[table].reshape(-1, kv_heads, head_dim)[:length].float() for c in (k_cache, v_cache))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), k) * scale
        rows = torch.arange(length - (stop - start), length, device=q.device)[:, None]
        columns = torch.arange(length, device=q.device)[None, :]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.float()[:, None, None] * (columns - rows)
        hidden = columns > rows
        if window:
            hidden = hidden | (columns <= rows - window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def _cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    plan: CpuPlan,
) -> torch.Tensor:
    """torch's CPU flash attention per sequence, over a view of the cache where its blocks lie in a row."""
    if softcap or alibi_slopes is not None or sinks is not None:
        return paged_attention(
            q, k_cache, v_cache, block_tables, seq_lens, query_start, scale, window, softcap, alibi_slopes, sinks
        )
    tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    # Grouped queries as [K, group, ...]: a key head is read once for its whole group.
    grouped = q.view(tokens, kv_heads, heads // kv_heads, head_dim)
    outs = [_attend(grouped, k_cache, v_cache, span, plan, scale, window) for span in plan.spans]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).reshape(tokens, heads, head_dim)


def _native(
    kernels: NativeKernels,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    plan: CpuPlan,
) -> torch.Tensor:
    """All sequences in one call."""
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    if head_dim % LANES or head_dim > MAX_HEAD_DIM or heads // kv_heads > MAX_GROUP:
        return _cpu(
            q, k_cache, v_cache, block_tables, seq_lens, query_start,
            scale, window, softcap, alibi_slopes, sinks, plan=plan,
        )  # fmt: skip
    q, block_tables = q.contiguous(), block_tables.contiguous()
    out = torch.empty_like(q)
    kernels.paged_attention(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        block_tables.data_ptr(), seq_lens.data_ptr(), query_start.data_ptr(),
        None if alibi_slopes is None else alibi_slopes.data_ptr(), None if sinks is None else sinks.data_ptr(),
        out.data_ptr(), len(seq_lens), block_tables.shape[1], heads, kv_heads, head_dim, block_size,
        window, scale, softcap, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _attend(
    grouped: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    span: Span,
    plan: CpuPlan,
    scale: float,
    window: int,
) -> torch.Tensor:
    """``[count, K, group, D]`` of one sequence."""
    count, length = span.stop - span.start, span.length
    queries = grouped if count == len(grouped) else grouped[span.start : span.stop]
    first = max(0, length - window) if window and count == 1 else 0  # a single query sees its window and no more
    k, v = (_keys(cache, span, first) for cache in (k_cache, v_cache))
    if count == 1:
        return F.scaled_dot_product_attention(queries, k, v, scale=scale)
    causal = count == length and not (window and length > window)
    mask = None if causal else plan.mask(count, length, window)
    k, v = (x[0].unsqueeze(1).expand(-1, queries.shape[2], -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        queries.permute(1, 2, 0, 3), k, v, attn_mask=mask, is_causal=causal, scale=scale
    )
    return out.permute(2, 0, 1, 3)


def _keys(cache: torch.Tensor, span: Span, first: int) -> torch.Tensor:
    """``[1, K, length - first, D]`` of one sequence from token ``first`` on: a view where its blocks lie in a row."""
    kv_heads, head_dim = cache.shape[2:]
    row = kv_heads * head_dim
    size, stride = (1, kv_heads, span.length - first, head_dim), (0, head_dim, row, 1)
    if span.blocks is None:
        return torch.as_strided(cache, size, stride, (span.first_slot + first) * row)
    return torch.as_strided(cache.index_select(0, span.blocks), size, stride, first * row)


def _samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    mixed = [(1, 1), (5, 5), (1, 37), (16, 48), (3, 20), (1, 16)]  # (new tokens, all tokens) of each sequence
    decode = [(1, 33), (1, 2), (1, 70)]
    for heads, kv_heads, head_dim, ragged in (
        (9, 3, 64, mixed),
        (4, 4, 80, mixed),
        (8, 1, 32, mixed),
        (6, 2, 64, decode),
    ):
        for window, softcap, alibi, sink in (
            (0, 0.0, False, False),
            (7, 0.0, False, False),
            (0, 30.0, False, False),
            (0, 0.0, True, False),
            (5, 0.0, False, True),
        ):
            for tables in ("scattered", "contiguous"):
                label = f"H{heads}/{kv_heads} D{head_dim} w{window} c{softcap} alibi{alibi} sink{sink} {tables}"
                args = _arguments(generator, dtype, ragged, heads, kv_heads, head_dim, tables == "contiguous")
                slopes = torch.rand(heads, generator=generator) if alibi else None
                sinks = torch.randn(heads, generator=generator) if sink else None
                yield Sample(label, (*args, head_dim**-0.5 * 1.3, window, softcap, slopes, sinks))


def _arguments(
    generator: torch.Generator,
    dtype: torch.dtype,
    ragged: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    contiguous: bool,
) -> tuple[torch.Tensor, ...]:
    block_size = 16
    needed = [-(-length // block_size) for _, length in ragged]
    order = torch.arange(sum(needed)) if contiguous else torch.randperm(sum(needed), generator=generator)
    tables = torch.zeros(len(ragged), max(needed), dtype=torch.int32)
    for row, ids in enumerate(torch.split(order, needed)):
        tables[row, : len(ids)] = ids
    counts = torch.tensor([count for count, _ in ragged])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32)
    lengths = torch.tensor([length for _, length in ragged], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), heads, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(sum(needed), block_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, tables, lengths, starts


PAGED_ATTENTION = Op(
    name="paged_attention",
    schema=(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, Tensor query_start, "
        "float scale, int window, float softcap, Tensor? alibi_slopes, Tensor? sinks) -> Tensor"
    ),
    shape=lambda q, *rest: torch.empty_like(q),
    reference=paged_attention,
    tensorrt=attention_tensorrt.paged_attention,
    cpu=_cpu,
    native=_native,
    reads_plan=True,
    samples=_samples,
    tolerance={torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    reason="sums over keys in another order; in 16 bits the probabilities are rounded before the second product",
)
