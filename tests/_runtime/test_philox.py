"""Philox against the published vectors, and its uniformity."""

import math

import numpy as np
import pytest

from llmapi._runtime.philox import philox4x32, uniforms

# Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    got = philox4x32(np.array([words(counter)], np.uint32), np.array([words(key)], np.uint32))
    assert got[0].tolist() == words(expected)


def test_known_answers_in_one_batch() -> None:
    got = philox4x32(
        np.array([words(c) for c, _, _ in KNOWN], np.uint32), np.array([words(k) for _, k, _ in KNOWN], np.uint32)
    )
    assert got.tolist() == [words(e) for _, _, e in KNOWN]


def test_uniform_layout() -> None:
    """Seed is the key, counter and stream are the halves of the counter, 53 bits of the first two words."""
    counter, key, expected = (words(t) for t in KNOWN[2])
    seed = key[0] | key[1] << 32
    position, stream = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32
    bits = (expected[0] >> 5) << 26 | expected[1] >> 6
    assert uniforms([seed], [stream], [position])[0] == bits / 2**53


def test_range_and_edges() -> None:
    u = uniforms([2**64 - 1, 0], [0, 2**40], [2**63, 0])
    assert u.dtype == np.float64 and u.shape == (2,)
    assert ((u >= 0) & (u < 1)).all()
    assert uniforms([], [], []).shape == (0,)


def test_independent_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**63, 50).tolist()
    streams = rng.integers(0, 8, 50).tolist()
    counters = rng.integers(0, 4096, 50).tolist()
    together = uniforms(seeds, streams, counters)
    alone = [uniforms([s], [t], [c])[0] for s, t, c in zip(seeds, streams, counters, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("axis", ["seed", "stream", "counter"])
def test_uniform_along_each_argument(axis: str) -> None:
    """Chi-square over 64 bins, Kolmogorov-Smirnov and neighbour correlation, as one argument counts up."""
    n = 40_000
    ramp, zeros = np.arange(n), np.zeros(n, int)
    args = {"seed": (ramp, zeros, zeros), "stream": (zeros, ramp, zeros), "counter": (zeros, zeros, ramp)}[axis]
    u = uniforms(*args)
    counts = np.bincount((u * 64).astype(int), minlength=64)
    chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert 30 < chi2 < 110  # 63 degrees of freedom: outside with probability 1e-4
    gap = np.abs(np.sort(u) - (np.arange(n) + 0.5) / n).max()
    assert gap < 2.0 / math.sqrt(n)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)
    low = np.bincount((u * 2**53).astype(np.int64) & 63, minlength=64)
    assert ((low - n / 64) ** 2 / (n / 64)).sum() < 110  # the low bits are random too
