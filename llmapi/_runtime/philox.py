"""Philox4x32-10: random numbers that are a pure function of a key and a counter.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, doi:10.1145/2063384.2063405.
There is no state to advance: a draw depends on the request's seed, the sequence's index and the position alone,
never on what else is in the batch, on preemption or on the order of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers of the two lanes
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)  # Weyl increments of the two key words
_ROUNDS = 10
_SHIFT = np.uint64(32)

Words = npt.NDArray[np.uint32]


def philox4x32(counter: Words, key: Words) -> Words:
    """Encrypt counters under keys with ten rounds of Philox4x32.

    Args:
        counter: ``[N, 4]`` uint32, least significant word first.
        key: ``[N, 2]`` uint32, least significant word first.

    Returns:
        ``[N, 4]`` uint32 random words.

    Example:
        >>> words = philox4x32(np.zeros((1, 4), np.uint32), np.zeros((1, 2), np.uint32))
        >>> [f"{int(w):08x}" for w in words[0]]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    for _ in range(_ROUNDS):
        p0 = c0.astype(np.uint64) * _M0
        p1 = c2.astype(np.uint64) * _M1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT).astype(np.uint32) ^ c1 ^ k0,
            p1.astype(np.uint32),
            (p0 >> _SHIFT).astype(np.uint32) ^ c3 ^ k1,
            p0.astype(np.uint32),
        )
        k0, k1 = k0 + _W0, k1 + _W1
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(
    seeds: Sequence[int] | npt.NDArray[Any],
    streams: Sequence[int] | npt.NDArray[Any],
    counters: Sequence[int] | npt.NDArray[Any],
) -> npt.NDArray[np.float64]:
    """One uniform number per (seed, stream, counter), with 53 random bits.

    The seed is the 64-bit key; counter and stream are the low and high 64 bits of Philox's 128-bit counter. The
    number is the top 53 bits of the first two words, first word highest, times 2**-53: it is in [0, 1), never 1.

    Args:
        seeds: ``[N]`` request seeds, 0 to 2**64 - 1.
        streams: ``[N]`` indices of the sequences in their requests, at least 0.
        counters: ``[N]`` positions of the draws in their sequences, at least 0.

    Returns:
        ``[N]`` float64 in [0, 1).

    Example:
        >>> bool(uniforms([7], [0], [3])[0] == uniforms([5, 7], [1, 0], [9, 3])[1])
        True
    """
    key = _halves(seeds)
    counter = np.concatenate([_halves(counters), _halves(streams)], axis=1)
    words = philox4x32(counter, key)
    high, low = words[:, 0].astype(np.uint64) >> np.uint64(5), words[:, 1].astype(np.uint64) >> np.uint64(6)
    return (high.astype(np.float64) * 2.0**26 + low.astype(np.float64)) * 2.0**-53


def _halves(values: Sequence[int] | npt.NDArray[Any]) -> Words:
    """``[N]`` whole numbers below 2**64 as ``[N, 2]`` uint32, low half first."""
    wide = np.asarray(values, dtype=np.uint64)
    return np.stack([wide.astype(np.uint32), (wide >> _SHIFT).astype(np.uint32)], axis=1)
