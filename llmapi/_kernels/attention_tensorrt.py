"""Attention as native TensorRT layers: a linear KV cache, ``KVCacheUpdate``, ``RotaryEmbedding`` and ``Attention``.

The cache of a sequence is one row of ``[slots, K, C, D]``: the paged cache with one block of ``C`` tokens a sequence.
In place of the graph's ragged inputs the network has:

======================= ========== ================================================================================
the graph's input       network    what it holds
======================= ========== ================================================================================
``slot_mapping``        ``[B]``    where each sequence's new keys and values begin in its row of the cache
``seq_lens``            ``[B]``    tokens in each row that may be looked at, the ``S`` new ones included
``positions``           ``[B, S]`` position of each token, in the sequence and in the row alike
``block_tables``        none
``query_start``         none
======================= ========== ================================================================================

Which keys a query sees is said by a mask made of ``positions``, not by the layer's causal flag: what the flag means
where lengths differ within the batch and queries are padded is not written down, a mask has one meaning. The lengths
are given besides, so that a kernel need not read the empty rest of the row.

The layer takes no scale, cap, bias or sink. Queries are scaled beforehand; for the others attention is built from
primitive layers, as it is wherever the layer has no kernel of its own (``decomposable``).
"""

from __future__ import annotations

import torch

from llmapi._kernels.tensorrt_network import Network, Tensor

_HIDDEN = -1e30  # added to a hidden score: its weight is zero, and a row with nothing to see stays finite


def rotary_cos_sin(net: Network, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`llmapi._kernels.rotary.rotary_cos_sin` as two tensors ``[B, S, R / 2]`` in float32."""
    column = net.reshape(net.wide(positions), (0, 0, 1))
    angles = net.binary("PROD", column, net.vector(inv_freq, 3))
    factor = net.scalar(scale, 3)
    cos, sin = (net.binary("PROD", net.unary(op, angles), factor) for op in ("COS", "SIN"))
    return cos, sin


def rotary_kv_write(
    net: Network,
    qkv: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    write_index: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool,
) -> Tensor:
    """Rotate queries and keys, write keys and values into the sequences' rows.

    Args:
        net: the network.
        qkv: ``[B, S, (H + 2 K) D]``.
        cos_sin: from :func:`rotary_cos_sin`; None for no rotation.
        write_index: ``[B]``.
        k_cache, v_cache: ``[B, K, C, D]``, network inputs.
        interleaved: pairing of the rotation.

    Returns:
        ``[B, H, S, D]`` queries, in float32, for they are still to be scaled.
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    q, k, v = (
        net.reshape(net.slice(qkv, first * head_dim, count * head_dim), (0, 0, count, head_dim), after=(0, 2, 1, 3))
        for first, count in ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads))
    )
    q, k = net.wide(q), net.wide(k)
    if cos_sin is not None:
        q, k = (_rotate(net, x, cos_sin, interleaved, head_dim) for x in (q, k))
    linear = net.trt.KVCacheMode.LINEAR
    for cache, new in ((k_cache, net.narrow(k)), (v_cache, v)):
        layer = net.definition.add_kv_cache_update(cache, new, write_index, linear)
        net.updated[cache.name] = net.add("kv_write", layer)
    return q


def _rotate(net: Network, x: Tensor, cos_sin: tuple[Tensor, Tensor], interleaved: bool, head_dim: int) -> Tensor:
    """The leading channels of each head, ``[B, H, S, D]`` in float32."""
    cos, sin = cos_sin
    width = 2 * cos.shape[-1]
    partial = width if width < head_dim else 0
    return net.add("rotary", net.definition.add_rotary_embedding(x, cos, sin, interleaved, partial))


def paged_attention(
    net: Network,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    query_start: None,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """:func:`llmapi._kernels.paged_attention.paged_attention` over linear rows.

    Args:
        net: the network.
        q: ``[B, H, S, D]`` in float32 from :func:`rotary_kv_write`.
        k_cache, v_cache: the inputs, whose updated values are looked at.
        positions: ``[B, S]``; takes the place of the graph's block tables.
        seq_lens: ``[B]``.
        query_start: nothing.
        scale, window, softcap: as there.
        alibi_slopes, sinks: ``[H]``, or None.

    Returns:
        ``[B, S, H D]``.
    """
    k, v = net.updated[k_cache.name], net.updated[v_cache.name]
    q = net.binary("PROD", q, net.scalar(scale, 4))
    if softcap or alibi_slopes is not None or sinks is not None:
        return _from_primitives(net, q, k, v, positions, window, softcap, alibi_slopes, sinks)
    visible = _visible(net, positions, k.shape[2], window)
    layer = net.definition.add_attention_v2(
        net.narrow(q), k, v, net.trt.AttentionNormalizationOp.SOFTMAX, net.trt.CausalMaskKind.NONE
    )
    out = net.add("attention", layer)
    layer.mask = visible
    layer.key_value_lengths = seq_lens
    layer.decomposable = True  # no kernel for this type or size: primitive layers instead of a refusal
    heads, head_dim = q.shape[1], q.shape[3]
    return net.reshape(out, (0, 0, heads * head_dim), before=(0, 2, 1, 3))


def _visible(net: Network, positions: Tensor, capacity: int, window: int) -> Tensor:
    """``[B, 1, S, C]``: whether a token sees a key. Made once for each window."""

    def make() -> Tensor:
        keys = net.constant(torch.arange(capacity, dtype=torch.int32).view(1, 1, 1, -1), "key_positions")
        queries = net.reshape(positions, (0, 1, -1, 1))
        seen = net.unary("NOT", net.binary("GREATER", keys, queries))
        if window:
            far = net.binary("SUM", keys, net.constant(torch.tensor(window, dtype=torch.int32).view(1, 1, 1, 1)))
            seen = net.binary("AND", seen, net.binary("GREATER", far, queries))
        return seen

    return net.once(f"visible.{window}", make)


def _from_primitives(
    net: Network,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in float32, scores laid out as ``[B, K, G, S, C]`` with ``G`` query heads to a key head."""
    heads, head_dim = q.shape[1], q.shape[3]
    kv_heads, capacity = k.shape[1], k.shape[2]
    group = heads // kv_heads
    split = net.reshape(
        net.reshape(q, (0, 0, heads, head_dim), before=(0, 2, 1, 3)),
        (0, 0, kv_heads, group, head_dim), after=(0, 2, 3, 1, 4),
    )  # fmt: skip
    keys, values = (net.reshape(net.wide(x), (0, kv_heads, 1, capacity, head_dim)) for x in (k, v))
    scores = net.matmul(split, keys, transpose_b=True)
    if softcap:
        cap = net.scalar(softcap, 5)
        scores = net.binary("PROD", net.activation("TANH", net.binary("DIV", scores, cap)), cap)
    if alibi_slopes is not None:
        slopes = net.reshape(net.wide(alibi_slopes), (1, kv_heads, group, 1, 1))
        scores = net.binary("SUM", scores, net.binary("PROD", slopes, _distance(net, positions, capacity)))
    seen = net.reshape(_visible(net, positions, capacity, window), (0, 1, 1, -1, capacity))
    scores = net.select(seen, scores, net.scalar(_HIDDEN, 5))
    if sinks is not None:
        # A logit without a value: one more column, which is cut off after the softmax.
        row = net.reshape(net.wide(sinks), (1, kv_heads, group, 1, 1))
        zeros = net.binary("PROD", net.slice(scores, 0, 1), net.scalar(0.0, 5))
        weights = net.slice(net.softmax(net.concat([scores, net.binary("SUM", zeros, row)])), 0, capacity)
    else:
        weights = net.softmax(scores)
    out = net.narrow(net.matmul(weights, values))
    joined = net.reshape(out, (0, 0, kv_heads, group, head_dim), before=(0, 3, 1, 2, 4))
    return net.reshape(joined, (0, 0, heads * head_dim))


def _distance(net: Network, positions: Tensor, capacity: int) -> Tensor:
    """``[B, 1, 1, S, C]``: key minus query, in tokens, float32."""

    def make() -> Tensor:
        keys = net.constant(torch.arange(capacity, dtype=torch.float32).view(1, 1, 1, 1, -1), "key_positions")
        queries = net.reshape(net.wide(positions), (0, 1, 1, -1, 1))
        return net.binary("SUB", keys, queries)

    return net.once("distance", make)
