"""What llmapi's plugins compute, by the references of the operators that they stand for: rules of the evaluator.

They can be stricter than the kernels about a step's integers: what no kernel could notice (a slot that is written
twice, a block that is none) then fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmapi._kernels.norm import add_rms_norm
from llmapi._kernels.paged_attention import paged_attention
from llmapi._kernels.plugins.pools import POOL_GUARD
from llmapi._kernels.rotary import rotary_kv_write
from llmapi._tensorrt import BLOCK_SIZE
from llmapi.models.spec import TransformerSpec

ARCH = 89


class PluginRules:
    """Rules for layers of kind ``PLUGIN``.

    Args:
        cache_at: gives the cache at an address.
        spec: the model, where what the layers say of it is to be compared.
        strict: whether to look at the integers of a step.
    """

    def __init__(
        self, cache_at: Callable[[int], torch.Tensor], spec: TransformerSpec | None = None, *, strict: bool = True
    ) -> None:
        self._cache_at, self._spec, self._strict = cache_at, spec, strict

    def __call__(self, layer: Any, x: list[torch.Tensor]) -> Any:
        """The layer's output, or a tuple of them."""
        return getattr(self, f"_{layer.plugin}")(x, layer.attributes)

    def _caches_of(self, pools: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of a layer; None without the guard."""
        if int(pools[0]) != POOL_GUARD:
            return None
        keys, values = (self._cache_at(int(pools[i + 2 * layer])) for i in (1, 2))
        return keys, values

    def _shape(self, a: dict[str, Any]) -> None:
        assert a["arch"] == ARCH
        if self._spec is not None:
            assert (a["heads"], a["kv_heads"], a["head_dim"]) == (
                self._spec.num_heads, self._spec.num_kv_heads, self._spec.head_dim,
            )  # fmt: skip

    def _rotary_kv_write(self, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        qkv, cos_sin, slots, pools = x
        assert cos_sin.shape[1] == a["rotary_dim"]
        return self._write(qkv, cos_sin, slots, pools, a)

    def _kv_write(self, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        qkv, slots, pools = x
        return self._write(qkv, None, slots, pools, a)

    def _write(self, qkv: torch.Tensor, cos_sin: Any, slots: torch.Tensor, pools: torch.Tensor, a: Any) -> torch.Tensor:
        self._shape(a)
        caches = self._caches_of(pools, a["layer"])
        if caches is None:
            return qkv.new_full((len(qkv), a["heads"], a["head_dim"]), torch.nan)
        if self._strict:
            written = slots[slots >= 0].tolist()
            assert len(set(written)) == len(written), "a slot is written twice"
            assert all(slot < len(caches[0]) * BLOCK_SIZE for slot in written), "a slot lies outside the cache"
        return rotary_kv_write(qkv, cos_sin, slots, *caches, bool(a.get("interleaved", 0)))

    def _paged_attention(self, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        q, pools, tables, lengths, starts = x
        self._shape(a)
        assert a["block_size"] == BLOCK_SIZE
        caches = self._caches_of(pools, a["layer"])
        if caches is None:
            return torch.full_like(q, torch.nan)
        for row, length in enumerate(lengths.tolist() if self._strict else ()):
            new = int(starts[row + 1] - starts[row])
            assert 0 <= new <= length, f"sequence {row} has {new} new tokens of {length}"
            used = tables[row, : -(-length // BLOCK_SIZE)].tolist()
            assert all(0 <= block < len(caches[0]) for block in used), f"sequence {row} is in blocks {used}"
        assert int(starts[0]) == 0 and int(starts[-1]) <= len(q)
        out = paged_attention(
            q, *caches, tables, lengths, starts, a["scale"], a["window"], a["softcap"], None, None
        )  # fmt: skip
        out[int(starts[-1]) :] = 0  # rows of no sequence
        return out

    def _add_rms_norm(self, x: list[torch.Tensor], a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        assert a["width"] == x[2].shape[0] and a["arch"] == ARCH
        normed, total = add_rms_norm(x[0], x[1], x[2], a["eps"])
        return normed, total
