"""Gated feed-forward activation: ``act(gate) * up`` from one packed tensor (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmapi._kernels import gated_activation_cuda, gated_activation_tensorrt
from llmapi._kernels.native import NativeKernels
from llmapi._kernels.op import Op, Sample
from llmapi.models.activations import ACTIVATIONS


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """``act(gate_up[:, :I]) * gate_up[:, I:]``, computed in float32.

    Args:
        gate_up: ``[T, 2 I]``.
        kind: a name of :data:`~llmapi.models.activations.ACTIVATIONS`.
    """
    gate, up = gate_up.float().chunk(2, -1)
    return (ACTIVATIONS[kind](gate) * up).to(gate_up.dtype)


def _cpu(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    if gate_up.dtype != torch.float32:
        return gated_activation(gate_up, kind)
    half = gate_up.shape[-1] // 2
    return ACTIVATIONS[kind](gate_up[:, :half]).mul_(gate_up[:, half:])


_NATIVE = {"silu": 0, "gelu_tanh": 1, "relu": 2}  # numbers of Activation in csrc_cpu/pointwise.h


def _native(kernels: NativeKernels, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    if kind not in _NATIVE:
        return _cpu(gate_up, kind)
    gate_up = gate_up.contiguous()
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, half)
    threads = torch.get_num_threads()
    kernels.gated_activation(gate_up.data_ptr(), out.data_ptr(), rows, half, _NATIVE[kind], threads)
    return out


def _samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for rows, half in ((1, 32), (5, 1536), (33, 129)):
        for kind in ACTIVATIONS:
            x = torch.randn(rows, 2 * half, generator=generator).mul_(2).to(dtype)
            yield Sample(f"{rows}x{half} {kind}", (x, kind))


GATED_ACTIVATION = Op(
    name="gated_activation",
    schema="(Tensor gate_up, str kind) -> Tensor",
    shape=lambda gate_up, kind: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    reference=gated_activation,
    cuda=gated_activation_cuda.gated_activation,
    tensorrt=gated_activation_tensorrt.gated_activation,
    cpu=_cpu,
    native=_native,
    samples=_samples,
    tolerance={torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3},
    reason="pointwise in float32; one rounding to the output dtype",
)
