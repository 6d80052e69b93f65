"""Launch of ``csrc/gated_activation.cu``."""

from __future__ import annotations

import torch

from llmapi._kernels.gpu import Gpu, dtype_macro
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit

ACTIVATION_MACRO = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Value of ``ACT`` by name of :data:`~llmapi.models.activations.ACTIVATIONS`."""


def units(dtype: str) -> list[Unit]:
    """Every specialization for an element type."""
    return [Unit.of("gated_activation.cu", LLM_DTYPE=DTYPE_MACRO[dtype], ACT=act) for act in ACTIVATION_MACRO.values()]


def gated_activation(gpu: Gpu, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """See :func:`llmapi._kernels.gated_activation.gated_activation`; on the GPU, contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if not rows:
        return out
    dtype = dtype_macro(gate_up.dtype)
    unit = Unit.of("gated_activation.cu", LLM_DTYPE=dtype, ACT=ACTIVATION_MACRO[kind])
    kernel = gpu.kernel(unit, "gated_activation", "ppi", overlap=True)
    columns = -(-width // (16 // gate_up.element_size()))
    threads = min(256, columns + 31 & ~31)
    for first in range(0, rows, 65535):  # CUDA's limit of the grid in y
        part = min(65535, rows - first)
        kernel((-(-columns // threads), part, 1), threads, gate_up[first:], out[first:], width)
    return out
