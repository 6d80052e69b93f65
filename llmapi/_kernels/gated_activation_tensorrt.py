"""Activations as TensorRT layers, plain and gated."""

from __future__ import annotations

from llmapi._kernels.tensorrt_network import Network, Tensor

_LAYERS = {"gelu": "GELU_ERF", "gelu_tanh": "GELU_TANH", "relu": "RELU"}


def activate(net: Network, x: Tensor, kind: str) -> Tensor:
    """A function of :data:`llmapi.models.activations.ACTIVATIONS` of a float32 tensor.

    Args:
        net: the network.
        x: float32.
        kind: its name.
    """
    if kind == "silu":
        return net.binary("PROD", x, net.activation("SIGMOID", x))
    return net.activation(_LAYERS[kind], x)


def gated_activation(net: Network, gate_up: Tensor, kind: str) -> Tensor:
    """:func:`llmapi._kernels.gated_activation.gated_activation`, in float32 with one rounding."""
    size = gate_up.shape[-1] // 2
    gate, up = (net.wide(net.slice(gate_up, start, size)) for start in (0, size))
    return net.narrow(net.binary("PROD", activate(net, gate, kind), up))
