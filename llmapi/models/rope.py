"""Rotary frequencies of a RopeSpec, in float32 as the published models were trained with."""

from __future__ import annotations

import math

import torch

from llmapi.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """Angle per position of each rotated pair.

    Args:
        rope: the embedding.

    Returns:
        ``[rotary_dim / 2]`` float32, in radians per position.

    Example:
        >>> inverse_frequencies(RopeSpec(theta=10000.0, rotary_dim=4)).tolist()
        [1.0, 0.009999999776482582]
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    return _yarn(rope, base)


def _llama3(rope: RopeSpec, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / base
    turns = rope.original_max_positions / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * base / rope.factor + blend * base
    out = torch.where(turns < rope.low_freq_factor, base / rope.factor, base)
    between = (turns >= rope.low_freq_factor) & (turns <= rope.high_freq_factor)
    return torch.where(between, blended, out)


def _yarn(rope: RopeSpec, base: torch.Tensor) -> torch.Tensor:
    """YaRN, "NTK by parts": a ramp over channels from extrapolation to interpolation (section 3.2 of the paper)."""

    def channel(rotations: float) -> float:
        ratio = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)
