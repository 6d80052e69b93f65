"""Copies between the host and the device that nobody waits for."""

from __future__ import annotations

import torch


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy on the host; of a tensor on a GPU it is there once the stream has come so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device; on a GPU the copy is queued, and nobody waits for what is
    before it, as ``x.to(device)`` would."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def indices(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Numbers as int64 ``[N]`` on a device; see :func:`to_device`."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)
