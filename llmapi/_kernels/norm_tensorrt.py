"""Norms as TensorRT layers, from primitive ones: the package's own normalization has no RMSNorm."""

from __future__ import annotations

from llmapi._kernels.tensorrt_network import Network, Tensor


def rms_norm(net: Network, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`llmapi._kernels.norm.rms_norm`, in float32 with one rounding."""
    wide, rank = net.wide(x), len(x.shape)
    square = net.mean(net.binary("PROD", wide, wide))
    return _scaled(net, wide, square, weight, None, eps, rank)


def layer_norm(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Mean-variance normalization over the last dimension, in float32 with one rounding."""
    wide, rank = net.wide(x), len(x.shape)
    centred = net.binary("SUB", wide, net.mean(wide))
    variance = net.mean(net.binary("PROD", centred, centred))
    return _scaled(net, centred, variance, weight, bias, eps, rank)


def add_rms_norm(net: Network, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`llmapi._kernels.norm.add_rms_norm`."""
    total = net.binary("SUM", x, residual)
    return rms_norm(net, total, weight, eps), total


def add_layer_norm(
    net: Network, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`llmapi._kernels.norm.add_layer_norm`."""
    total = net.binary("SUM", x, residual)
    return layer_norm(net, total, weight, bias, eps), total


def _scaled(
    net: Network, x: Tensor, power: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rank: int
) -> Tensor:
    """``x / sqrt(power + eps) * weight + bias``."""
    root = net.unary("SQRT", net.binary("SUM", power, net.scalar(eps, rank)))
    out = net.binary("PROD", net.binary("DIV", x, root), net.wide(net.vector(weight, rank)))
    if bias is not None:
        out = net.binary("SUM", out, net.wide(net.vector(bias, rank)))
    return net.narrow(out)
