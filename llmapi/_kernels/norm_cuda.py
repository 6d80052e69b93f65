"""Launches of ``csrc/norm.cu``: RMSNorm and LayerNorm, alone or after a residual add."""

from __future__ import annotations

import torch

from llmapi._kernels.gpu import Gpu, dtype_macro
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit

_SIGNATURE = "ppppppif"


def units(dtype: str) -> list[Unit]:
    """Every specialization for an element type."""
    return [
        Unit.of("norm.cu", LLM_DTYPE=DTYPE_MACRO[dtype], ADD=add, LAYER=layer) for add in (0, 1) for layer in (0, 1)
    ]


def rms_norm(gpu: Gpu, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`llmapi._kernels.norm.rms_norm`; tensors on the GPU, contiguous."""
    out = torch.empty_like(x)
    _launch(gpu, x, None, weight, None, out, None, eps)
    return out


def add_rms_norm(
    gpu: Gpu, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`llmapi._kernels.norm.add_rms_norm`."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(gpu, x, residual, weight, None, out, total, eps)
    return out, total


def add_layer_norm(
    gpu: Gpu, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`llmapi._kernels.norm.add_layer_norm`."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(gpu, x, residual, weight, bias, out, total, eps)
    return out, total


def _launch(
    gpu: Gpu,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
) -> None:
    rows, width = x.shape
    if not rows:
        return
    unit = Unit.of(
        "norm.cu",
        LLM_DTYPE=dtype_macro(x.dtype),
        ADD=int(residual is not None),
        LAYER=int(bias is not None),
    )
    kernel = gpu.kernel(unit, "norm_rows", _SIGNATURE, overlap=True)
    per_access = 16 // x.element_size()
    threads = min(1024, max(32, -(-width // per_access) + 31 & ~31))
    kernel((rows, 1, 1), threads, x, residual, weight, bias, out, total, width, eps)
