"""PyTorch's operators as TensorRT layers: those that exported graphs hold beside the project's own."""

from __future__ import annotations

from typing import Any

from llmapi._kernels.gated_activation_tensorrt import activate
from llmapi._kernels.norm_tensorrt import layer_norm
from llmapi._kernels.tensorrt_network import Lower, Network, Tensor


def embedding(net: Network, table: Tensor, rows: Tensor, *unused: Any) -> Tensor:
    """Rows of a table; the options of ``aten.embedding`` are of training."""
    return net.gather(table, rows)


def linear(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    rank = len(x.shape)
    matrix = weight if rank == 2 else net.reshape(weight, (1,) * (rank - 2) + tuple(weight.shape))
    out = net.matmul(x, matrix, transpose_b=True)
    return out if bias is None else net.binary("SUM", out, net.vector(bias, rank))


def add(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """Of two tensors of one shape."""
    return net.binary("SUM", a, b)


def view(net: Network, x: Tensor, shape: list[int]) -> Tensor:
    """``[-1, C]`` over a tensor of ``C`` channels: nothing, for rows are laid out as they are."""
    if len(shape) != 2 or shape[0] != -1 or shape[1] != x.shape[-1]:
        raise NotImplementedError(f"a view as {shape} of a tensor of {x.shape[-1]} channels")
    return x


def index_select(net: Network, x: Tensor, dim: int, rows: Tensor) -> Tensor:
    """The named rows, ``[N, C]``; they are counted through all sequences, padding included."""
    if dim != 0:
        raise NotImplementedError(f"index_select along dimension {dim}")
    flat = x if len(x.shape) == 2 else net.reshape(x, (-1, x.shape[-1]))
    return net.gather(flat, rows)


def normalized(net: Network, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor | None, eps: float = 1e-5,
               *unused: Any) -> Tensor:  # fmt: skip
    """``aten.layer_norm`` over the last dimension."""
    if len(shape) != 1 or weight is None:
        raise NotImplementedError(f"a layer norm over {shape} without a weight")
    return layer_norm(net, x, weight, bias, eps)


def silu(net: Network, x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return net.narrow(activate(net, net.wide(x), "silu"))


def gelu(net: Network, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Exact, or by ``tanh``."""
    return net.narrow(activate(net, net.wide(x), "gelu_tanh" if approximate == "tanh" else "gelu"))


def relu(net: Network, x: Tensor) -> Tensor:
    """``max(x, 0)``."""
    return net.activation("RELU", x)


ATEN: dict[str, Lower] = {
    "aten.add.Tensor": add,
    "aten.embedding.default": embedding,
    "aten.gelu.default": gelu,
    "aten.index_select.default": index_select,
    "aten.layer_norm.default": normalized,
    "aten.linear.default": linear,
    "aten.relu.default": relu,
    "aten.silu.default": silu,
    "aten.view.default": view,
    "getitem": lambda net, values, index: values[index],
}
"""Operator to lowering."""
