"""Draw: temperature, top_k, top_p, min_p and the random choice, on a batch of logits rows.

Every row gets the token it would get alone: each path is chosen from the row's own values and settings, and only
operations whose result for a row does not depend on the rows beside it are used (softmax, cumulative sums and sums
of short tiles; never a whole-row sum, which torch splits over threads differently for one row than for many).

The choice is by inverse CDF: tokens stand in the order of their ids, and the one whose stretch of the cumulative
probability holds the uniform number is taken. A full sort of the vocabulary is avoided: the ``k`` largest of a row
lie in the ``k`` tiles with the largest maxima, and a nucleus is nearly always among the few hundred largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_TILE = 256  # width of a tile in argmax and in the wide draw
_SPARE = 16  # candidates beyond top_k, to see where a tie at the border ends
_NARROW_K = 1024  # the largest top_k that is worth a partial selection
_NUCLEUS_STEPS = (64, 256)  # candidates tried for top_p before the row is sorted
_COLDEST = 1e-30  # smaller temperatures overflow float32, and are no colder


@dataclass(frozen=True, slots=True)
class Truncation:
    """Settings of one row: temperature (above 0), top_k (0 or less: off), top_p (1: off), min_p (0: off)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and the lowest index that has it; NaN counts as largest.

    Equals ``x.max(1)``, several times faster on a CPU because the index is looked for in one tile only.

    Args:
        x: ``[N, V]`` float.

    Returns:
        ``[N]`` values and ``[N]`` int64 indices.
    """
    n = x.shape[1]
    tiles = n // _TILE
    if tiles < 4:
        value, index = x.max(1)
        return value, index
    whole = tiles * _TILE
    peaks = x[:, :whole].reshape(-1, tiles, _TILE).amax(2)
    if whole < n:
        peaks = torch.cat([peaks, x[:, whole:].amax(1, keepdim=True)], 1)
    value, tile = peaks.max(1)
    span = (tile[:, None] * _TILE + torch.arange(_TILE, device=x.device)).clamp_(max=n - 1)
    return value, span.gather(1, x.gather(1, span).argmax(1, keepdim=True))[:, 0]


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values of each row, in falling order, with their indices.

    Equals ``x.topk(k)`` up to the choice among equal values.

    Args:
        x: ``[N, V]`` float.
        k: from 1 to V.

    Returns:
        ``[N, k]`` values and ``[N, k]`` int64 indices.
    """
    n = x.shape[1]
    block = 64 if k <= 96 else 32
    tiles = n // block
    if tiles < 2 * k:
        value, index = x.topk(k, dim=1)
        return value, index
    whole = tiles * block
    body = x[:, :whole].reshape(-1, tiles, block)
    which = body.amax(2).topk(k, dim=1, sorted=False).indices
    pool = body.gather(1, which[:, :, None].expand(-1, -1, block)).flatten(1)
    ids = (which[:, :, None] * block + torch.arange(block, device=x.device)).flatten(1)
    if whole < n:
        pool = torch.cat([pool, x[:, whole:]], 1)
        ids = torch.cat([ids, torch.arange(whole, n, device=x.device).expand(x.shape[0], -1)], 1)
    values, at = pool.topk(k, dim=1)
    return values, ids.gather(1, at)


def draw(logits: Tensor, settings: Sequence[Truncation], uniform: Tensor) -> Tensor:
    """Choose token ids at random, each row by its own settings.

    In order, as transformers' warpers: temperature; top_k (tokens equal to the k-th stay); top_p (the smallest set,
    most probable first and lower ids first among equals, whose probability reaches ``p``; at least one token);
    min_p; then the inverse CDF over what is left.

    Args:
        logits: ``[N, V]`` float32; -inf excludes a token.
        settings: one per row.
        uniform: ``[N, D]`` float64 in [0, 1): ``D`` independent draws per row.

    Returns:
        ``[N, D]`` int64 ids; -1 throughout a row that has no distribution (NaN, +inf, or -inf everywhere).
    """
    rows, vocab = logits.shape
    groups: dict[str, list[int]] = {"plain": [], "k": [], "wide_k": [], "p": []}
    for r, s in enumerate(settings):
        if 0 < s.top_k < vocab:
            groups["k" if s.top_k <= _NARROW_K else "wide_k"].append(r)
        else:
            groups["p" if s.top_p < 1 else "plain"].append(r)
    out = torch.full_like(uniform, -1, dtype=torch.int64)
    for kind, members in groups.items():
        if members:
            batch = _Batch.of(logits, settings, uniform, members)
            ids = {"plain": _plain, "k": _by_k, "wide_k": _by_wide_k, "p": _by_p}[kind](batch)
            if len(members) == rows:
                return ids
            out[torch.tensor(members, device=out.device)] = ids
    return out


@dataclass(slots=True)
class _Batch:
    """Rows that go the same way: logits ``[N, V]``, settings as ``[N]`` tensors and lists, uniforms ``[N, D]``."""

    x: Tensor
    settings: list[Truncation]
    uniform: Tensor

    @classmethod
    def of(cls, x: Tensor, settings: Sequence[Truncation], uniform: Tensor, rows: list[int]) -> _Batch:
        if len(rows) < x.shape[0]:
            index = torch.tensor(rows, device=x.device)
            x, uniform = x[index], uniform[index]
        return cls(x, [settings[r] for r in rows], uniform)

    def column(self, values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.x.device)[:, None]

    def temperature(self, dtype: torch.dtype) -> Tensor:
        return self.column([max(s.temperature, _COLDEST) for s in self.settings], dtype)

    def top_p(self) -> Tensor | None:
        values = [s.top_p for s in self.settings]
        return self.column(values, torch.float64) if min(values) < 1 else None

    def min_p(self, dtype: torch.dtype) -> Tensor | None:
        values = [s.min_p for s in self.settings]
        return self.column(values, dtype) if max(values) > 0 else None

    def probabilities(self) -> Tensor:
        x = self.x
        if any(s.temperature != 1 for s in self.settings):
            x = x / self.temperature(torch.float32)
        return x.softmax(1)

    def take(self, x: Tensor, mask: Tensor) -> _Batch:
        """The rows where ``mask`` holds; their ``x`` are those of the given one."""
        keep = mask.tolist()
        return _Batch(x[mask], [s for s, k in zip(self.settings, keep, strict=True) if k], self.uniform[mask])


def _plain(batch: _Batch) -> Tensor:
    return _from_all(batch, batch.probabilities(), None)


def _by_k(batch: _Batch) -> Tensor:
    """top_k: choose among the k largest; a tie too long to be seen whole goes the wide way."""
    vocab = batch.x.shape[1]
    k = torch.tensor([s.top_k for s in batch.settings], device=batch.x.device)[:, None]
    values, ids = largest(batch.x, min(vocab, max(s.top_k for s in batch.settings) + _SPARE))
    kth = values.gather(1, k - 1)
    edge = (k - 1 + _SPARE).clamp(max=vocab - 1)
    seen = ((values.gather(1, edge) < kth) | (edge == vocab - 1) | (kth == -torch.inf))[:, 0]
    wide = values.double()
    weights = ((wide - wide[:, :1]) / batch.temperature(torch.float64)).exp().masked_fill(values < kth, 0)
    if bool(seen.all()):
        return _from_few(batch, weights, ids, None)
    if not bool(seen.any()):
        return _by_wide_k(batch)
    out = torch.full_like(batch.uniform, -1, dtype=torch.int64)
    out[seen] = _from_few(batch.take(weights, seen), weights[seen], ids[seen], None)
    out[~seen] = _by_wide_k(batch.take(batch.x, ~seen))
    return out


def _by_wide_k(batch: _Batch) -> Tensor:
    """top_k from all values in order."""
    k = torch.tensor([s.top_k for s in batch.settings], device=batch.x.device)[:, None]
    kth = _falling(batch.x).gather(1, k - 1)
    batch.x = batch.x.masked_fill(batch.x < kth, -torch.inf)
    return _from_all(batch, batch.probabilities(), batch.top_p())


def _by_p(batch: _Batch) -> Tensor:
    """top_p without top_k: look for the nucleus among ever more of the largest, then among all."""
    out = torch.full_like(batch.uniform, -1, dtype=torch.int64)
    p = batch.probabilities()
    pending = torch.arange(p.shape[0], device=p.device)
    for k in _NUCLEUS_STEPS:
        if 4 * k > p.shape[1]:
            break
        values, ids = largest(p, k)
        top_p = batch.top_p()
        assert top_p is not None
        total = values.double().cumsum(1)
        size = (torch.searchsorted(total, top_p) + 1).clamp(max=k)
        found = ((total[:, -1:] >= top_p) & (values.gather(1, size - 1) > values[:, -1:]))[:, 0]
        if bool(found.any()):
            ready = batch.take(values, found)
            out[pending[found]] = _from_few(ready, values[found].double(), ids[found], 1.0)
            if bool(found.all()):
                return out
            batch, pending = batch.take(p, ~found), pending[~found]
            p = batch.x
    out[pending] = _from_all(batch, p, batch.top_p())
    return out


def _from_few(batch: _Batch, weights: Tensor, ids: Tensor, mass: float | None) -> Tensor:
    """top_p, min_p and the draw among candidates.

    Args:
        batch: settings and uniforms.
        weights: ``[N, K]`` float64, proportional to probability.
        ids: ``[N, K]`` their token ids.
        mass: what all weights of the vocabulary add up to; None: what these add up to.
    """
    ids, order = ids.sort(dim=1)
    weights = weights.gather(1, order)
    top_p = batch.top_p()
    if top_p is not None:
        falling, at = weights.sort(dim=1, descending=True, stable=True)
        total = falling.cumsum(1)
        goal = top_p * (total[:, -1:] if mass is None else mass)
        before = torch.cat([torch.zeros_like(goal), total[:, :-1]], 1)
        kept = falling.masked_fill(before >= goal, 0)
        weights = torch.where(top_p < 1, torch.zeros_like(weights).scatter(1, at, kept), weights)
    min_p = batch.min_p(torch.float64)
    if min_p is not None:
        weights = weights.masked_fill(weights < min_p * weights.amax(1, keepdim=True), 0)
    total = weights.cumsum(1)
    chosen = ids.gather(1, _locate(total, batch.uniform).clamp(max=ids.shape[1] - 1))
    return chosen.masked_fill(~(total[:, -1:] > 0), -1)


def _from_all(batch: _Batch, p: Tensor, top_p: Tensor | None) -> Tensor:
    """top_p, min_p and the draw from ``[N, V]`` float32 probabilities of the whole vocabulary."""
    if top_p is not None:
        p = _nucleus(p, top_p)
    min_p = batch.min_p(torch.float32)
    if min_p is not None:
        p = p * (p >= min_p * p.amax(1, keepdim=True))
    vocab = p.shape[1]
    if vocab % _TILE:
        p = torch.nn.functional.pad(p, (0, _TILE - vocab % _TILE))
    tiles = p.reshape(p.shape[0], -1, _TILE)
    sums = tiles.sum(2).double()
    total = sums.cumsum(1)
    tile = _locate(total, batch.uniform).clamp(max=total.shape[1] - 1)  # [N, D]
    start = torch.cat([torch.zeros_like(total[:, :1]), total], 1).gather(1, tile)
    share = (batch.uniform * total[:, -1:] - start) / sums.gather(1, tile)
    inner = tiles.gather(1, tile[:, :, None].expand(-1, -1, _TILE)).double().cumsum(2)  # [N, D, TILE]
    at = _locate(inner.flatten(0, 1), share.clamp(0, 1).flatten()[:, None]).view_as(tile)
    return (tile * _TILE + at).masked_fill(~(total[:, -1:] > 0), -1)


def _nucleus(p: Tensor, top_p: Tensor) -> Tensor:
    """Zero what is outside the smallest set that reaches ``top_p``; rows with ``top_p`` 1 stay whole."""
    falling = _falling(p)
    total = falling.cumsum(1, dtype=torch.float64)
    size = (torch.searchsorted(total, top_p) + 1).clamp(max=p.shape[1])
    least = falling.gather(1, size - 1).masked_fill(top_p >= 1, 0)
    kept = p >= least
    split = (falling.gather(1, size.clamp(max=p.shape[1] - 1)) == least) & (least > 0)  # equals on both sides
    if bool(split.any()):
        tied = p == least
        room = size - (falling > least).sum(1, keepdim=True)
        kept &= ~(tied & (tied.cumsum(1) > room) & (top_p < 1))
    return p * kept


def _falling(x: Tensor) -> Tensor:
    """Values of each row in falling order (numpy sorts values alone some ten times faster on a CPU)."""
    if x.device.type != "cpu":
        return x.sort(dim=1, descending=True).values
    return torch.from_numpy(np.sort(x.numpy(), axis=1)).flip(1)


def _locate(total: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds ``uniform`` times the last one, so never one of weight zero.

    Args:
        total: ``[N, K]`` float64 cumulative weights.
        uniform: ``[N, D]`` float64 in [0, 1].
    """
    last = total[:, -1:].contiguous()
    goal = torch.minimum(uniform * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(total.contiguous(), goal.contiguous(), right=True)
