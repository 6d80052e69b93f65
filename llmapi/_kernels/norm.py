"""Normalization, alone and fused with the residual add before it.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. LayerNorm: Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F

from llmapi._kernels import norm_cuda, norm_tensorrt
from llmapi._kernels.native import NativeKernels
from llmapi._kernels.op import Op, Sample

_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
_REASON = "float32 accumulation over a row; one rounding to the output dtype"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension, computed in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual``; returns ``(rms_norm(s), s)``."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual``; returns ``(layer_norm(s), s)``."""
    total = x + residual
    normed = F.layer_norm(total.float(), (total.shape[-1],), weight.float(), bias.float(), eps)
    return normed.to(x.dtype), total


def _rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same with temporaries reused; torch has no fused CPU kernel for it."""
    if x.dtype != torch.float32:
        return rms_norm(x, weight, eps)
    norm = torch.linalg.vector_norm(x, 2, -1, True)
    scale = torch.addcmul(_scalar(eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


@cache
def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def _add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _rms_norm_cpu(total, weight, eps), total


def _add_layer_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.layer_norm(total, (total.shape[-1],), weight, bias, eps), total


def _rms_norm_native(kernels: NativeKernels, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, out = x.contiguous(), torch.empty_like(x)
    rows, threads = x.numel() // x.shape[-1], torch.get_num_threads()
    kernels.rms_norm(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, rows, x.shape[-1], eps, threads)
    return out


def _add_rms_norm_native(
    kernels: NativeKernels, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows, threads = x.numel() // x.shape[-1], torch.get_num_threads()
    kernels.rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
        rows, x.shape[-1], eps, threads,
    )  # fmt: skip
    return out, total


def _add_layer_norm_native(
    kernels: NativeKernels,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows, threads = x.numel() // x.shape[-1], torch.get_num_threads()
    kernels.add_layer_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), total.data_ptr(),
        rows, x.shape[-1], eps, threads,
    )  # fmt: skip
    return out, total


def _inputs(generator: torch.Generator, dtype: torch.dtype, count: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    for rows, width in ((1, 64), (3, 576), (17, 1001), (5, 4096)):
        tensors = [torch.randn(rows, width, generator=generator).mul_(3).to(dtype) for _ in range(count)]
        vectors = [torch.randn(width, generator=generator).to(dtype) for _ in range(2)]
        yield f"{rows}x{width}", tensors + vectors


def _rms_samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for label, (x, weight, _) in _inputs(generator, dtype, 1):
        for eps in (1e-6, 1e-2):
            yield Sample(f"{label} eps={eps}", (x, weight, eps))


def _add_rms_samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for label, (x, residual, weight, _) in _inputs(generator, dtype, 2):
        for eps in (1e-6, 1e-2):
            yield Sample(f"{label} eps={eps}", (x, residual, weight, eps))


def _add_layer_samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for label, (x, residual, weight, bias) in _inputs(generator, dtype, 2):
        for eps in (1e-5, 1e-2):
            yield Sample(f"{label} eps={eps}", (x, residual, weight, bias, eps))


RMS_NORM = Op(
    name="rms_norm",
    schema="(Tensor x, Tensor weight, float eps) -> Tensor",
    shape=lambda x, weight, eps: torch.empty_like(x),
    reference=rms_norm,
    cuda=norm_cuda.rms_norm,
    tensorrt=norm_tensorrt.rms_norm,
    cpu=_rms_norm_cpu,
    native=_rms_norm_native,
    samples=_rms_samples,
    tolerance=_TOLERANCE,
    reason=_REASON,
)
ADD_RMS_NORM = Op(
    name="add_rms_norm",
    schema="(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    shape=lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
    reference=add_rms_norm,
    cuda=norm_cuda.add_rms_norm,
    tensorrt=norm_tensorrt.add_rms_norm,
    cpu=_add_rms_norm_cpu,
    native=_add_rms_norm_native,
    samples=_add_rms_samples,
    tolerance=_TOLERANCE,
    reason=_REASON,
)
ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    shape=lambda x, residual, weight, bias, eps: (torch.empty_like(x), torch.empty_like(x)),
    reference=add_layer_norm,
    cuda=norm_cuda.add_layer_norm,
    tensorrt=norm_tensorrt.add_layer_norm,
    cpu=_add_layer_norm_cpu,
    native=_add_layer_norm_native,
    samples=_add_layer_samples,
    tolerance=_TOLERANCE,
    reason=_REASON,
)
