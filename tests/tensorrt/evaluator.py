"""Evaluator: runs a TensorRT network on the CPU, layer by layer, in torch. What a plan of it should compute.

It reads the ``INetworkDefinition`` itself, not what the lowering meant to write: types, shapes and constants are those
that TensorRT holds, and each result is checked against the shape and type that TensorRT expects. Sixteen-bit layers are
computed in float32 and rounded once. ``KVCacheUpdate`` writes in place, as it does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F


class Evaluator:
    """Evaluates one network.

    Args:
        trt: the module.
        definition: the network.
        rules: of kinds of layers that are not among those here; for layers of several outputs they give a tuple.
    """

    def __init__(
        self, trt: Any, definition: Any, rules: Mapping[str, Callable[[Any, list[Any]], Any]] | None = None
    ) -> None:
        self._trt, self._net = trt, definition
        data = trt.DataType
        self._types = {
            data.FLOAT: torch.float32,
            data.HALF: torch.float16,
            data.BF16: torch.bfloat16,
            data.INT32: torch.int32,
            data.INT64: torch.int64,
            data.BOOL: torch.bool,
        }
        layers = [definition.get_layer(i) for i in range(definition.num_layers)]
        self._layers = [(layer, layer.type.name) for layer in layers]  # read before the class hides it
        for layer, kind in self._layers:
            layer.__class__ = getattr(trt, _class_name(kind))
        self._rules: dict[str, Callable[[Any, list[Any]], Any]] = {
            "ACTIVATION": self._activation,
            "CAST": lambda layer, x: x[0].to(self._types[layer.to_type]),
            "CONCATENATION": lambda layer, x: torch.cat(x, layer.axis),
            "CONSTANT": self._constant,
            "ELEMENTWISE": self._elementwise,
            "GATHER": self._gather,
            "KV_CACHE_UPDATE": self._kv_cache_update,
            "MATRIX_MULTIPLY": self._matmul,
            "REDUCE": self._reduce,
            "ROTARY_EMBEDDING": self._rotary,
            "SELECT": lambda layer, x: torch.where(*x),
            "SHUFFLE": self._shuffle,
            "SLICE": self._slice,
            "SOFTMAX": lambda layer, x: wide(lambda v: v.softmax(_axes(layer.axes, v)[0]), x[0]),
            "UNARY": self._unary,
            **(rules or {}),
        }

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name; caches among the inputs are written.

        Args:
            inputs: by name, of the network's types.
        """
        values: dict[str, torch.Tensor] = {}
        for i in range(self._net.num_inputs):
            tensor = self._net.get_input(i)
            values[tensor.name] = inputs[tensor.name]
            self._check(tensor, inputs[tensor.name], tensor.name)
        for layer, kind in self._layers:
            if kind == "ATTENTION_INPUT":
                continue  # an attention is two layers; both know all of it
            if kind == "ATTENTION_OUTPUT":
                result = self._attention(layer.attention, values)
            else:
                given = [layer.get_input(i) for i in range(layer.num_inputs)]
                result = self._rules[kind](layer, [None if t is None else values[t.name] for t in given])
            for i, value in enumerate(result if isinstance(result, tuple) else (result,)):
                output = layer.get_output(i)
                self._check(output, value, layer.name)
                values[output.name] = value
        return {o.name: values[o.name] for o in map(self._net.get_output, range(self._net.num_outputs))}

    def constant_values(self) -> int:
        """How many numbers the network holds itself."""
        return sum(layer.weights.size for layer, kind in self._layers if kind == "CONSTANT")

    def _check(self, tensor: Any, value: torch.Tensor, name: str) -> None:
        expected = tuple(tensor.shape)
        fits = len(expected) == value.ndim and all(e in (-1, s) for e, s in zip(expected, value.shape, strict=True))
        assert fits, f"{name}: TensorRT says {expected}, it is {tuple(value.shape)}"
        assert self._types[tensor.dtype] == value.dtype, f"{name}: TensorRT says {tensor.dtype}, it is {value.dtype}"

    # ---- layers

    def _constant(self, layer: Any, x: list[Any]) -> torch.Tensor:
        return torch.from_numpy(layer.weights).reshape(tuple(layer.shape)).clone()

    def _activation(self, layer: Any, x: list[Any]) -> torch.Tensor:
        kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "SIGMOID": torch.sigmoid,
            "RELU": torch.relu,
            "TANH": torch.tanh,
            "GELU_ERF": F.gelu,
            "GELU_TANH": lambda v: F.gelu(v, approximate="tanh"),
        }
        return wide(kinds[layer.type.name], x[0])

    def _elementwise(self, layer: Any, x: list[Any]) -> torch.Tensor:
        kinds: dict[str, Callable[..., torch.Tensor]] = {
            "SUM": torch.add, "SUB": torch.sub, "PROD": torch.mul, "DIV": torch.div, "MAX": torch.maximum,
            "MIN": torch.minimum, "GREATER": torch.gt, "LESS": torch.lt, "AND": torch.logical_and,
            "OR": torch.logical_or,
        }  # fmt: skip
        assert x[0].dtype == x[1].dtype and x[0].ndim == x[1].ndim, f"{layer.name}: operands differ"
        return wide(kinds[layer.op.name], *x)

    def _unary(self, layer: Any, x: list[Any]) -> torch.Tensor:
        kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "SQRT": torch.sqrt, "COS": torch.cos, "SIN": torch.sin, "EXP": torch.exp, "NOT": torch.logical_not,
        }  # fmt: skip
        return wide(kinds[layer.op.name], x[0])

    def _reduce(self, layer: Any, x: list[Any]) -> torch.Tensor:
        kinds: dict[str, Callable[..., torch.Tensor]] = {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax}
        return wide(lambda v: kinds[layer.op.name](v, _axes(layer.axes, v), keepdim=layer.keep_dims), x[0])

    def _matmul(self, layer: Any, x: list[Any]) -> torch.Tensor:
        turned = self._trt.MatrixOperation.TRANSPOSE
        a, b = (v.mT if op == turned else v for v, op in zip(x, (layer.op0, layer.op1), strict=True))
        assert a.ndim == b.ndim, f"{layer.name}: operands differ in rank"
        return wide(torch.matmul, a, b)

    def _gather(self, layer: Any, x: list[Any]) -> torch.Tensor:
        assert layer.axis == 0 and layer.mode == self._trt.GatherMode.DEFAULT
        assert int(x[1].min()) >= 0 and int(x[1].max()) < len(x[0]), f"{layer.name}: an index leaves the table"
        return x[0][x[1].long()]

    def _shuffle(self, layer: Any, x: list[Any]) -> torch.Tensor:
        value = x[0].permute(list(layer.first_transpose)[: x[0].ndim])
        sizes = [value.shape[i] if size == 0 else size for i, size in enumerate(layer.reshape_dims)]
        value = value.reshape(sizes)
        return value.permute(list(layer.second_transpose)[: value.ndim])

    def _slice(self, layer: Any, x: list[Any]) -> torch.Tensor:
        value = x[0]
        for axis, start, size, step in zip(layer.axes, layer.start, layer.shape, layer.stride, strict=True):
            assert step == 1 and start + size <= value.shape[axis], f"{layer.name}: it leaves the tensor"
            value = value.narrow(axis, start, size)
        return value

    def _rotary(self, layer: Any, x: list[Any]) -> torch.Tensor:
        width = layer.rotary_embedding_dim or x[0].shape[-1]
        cos, sin = (v.float().unsqueeze(1) for v in x[1:3])  # [B, 1, S, R / 2], for every head
        head, tail = x[0][..., :width].float(), x[0][..., width:]
        a, b = (head[..., 0::2], head[..., 1::2]) if layer.interleaved else head.chunk(2, -1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if layer.interleaved else torch.cat(pair, -1)
        return torch.cat((turned.to(x[0].dtype), tail), -1)

    def _kv_cache_update(self, layer: Any, x: list[Any]) -> torch.Tensor:
        cache, new, starts = x
        assert layer.cache_mode == self._trt.KVCacheMode.LINEAR and len(cache) == len(new) == len(starts)
        for row, start in enumerate(starts.tolist()):
            stop = start + new.shape[2]
            assert start >= 0 and stop <= cache.shape[2], f"{layer.name}: {start} to {stop} leaves the cache"
            cache[row, :, start:stop] = new[row]
        return cache

    def _attention(self, attention: Any, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores are not scaled. A key is looked at where the mask says so and it lies within the row's length."""
        q, k, v = (values[attention.get_input(i).name] for i in range(3))
        assert attention.causal_kind == self._trt.CausalMaskKind.NONE or attention.mask is None
        assert attention.norm_op == self._trt.AttentionNormalizationOp.SOFTMAX
        group = q.shape[1] // k.shape[1]
        keys, seen_values = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = q.float() @ keys.mT
        hidden = torch.zeros(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool)
        if attention.mask is not None:
            hidden = hidden | ~values[attention.mask.name]
        if attention.key_value_lengths is not None:
            lengths = values[attention.key_value_lengths.name]
            hidden = hidden | (torch.arange(k.shape[2]) >= lengths[:, None])[:, None, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        seen_values = torch.where((~hidden).any(2).unsqueeze(-1), seen_values, 0)  # what nobody sees may be anything
        return (weights @ seen_values).to(q.dtype)


def wide(rule: Callable[..., torch.Tensor], *x: torch.Tensor) -> torch.Tensor:
    """A rule computed in float32; a result in floating point is rounded to the operands' type."""
    if not x[0].is_floating_point():
        return rule(*x)
    out = rule(*(v.float() for v in x))
    return out.to(x[0].dtype) if out.is_floating_point() else out


def _axes(bits: int, x: torch.Tensor) -> list[int]:
    return [i for i in range(x.ndim) if bits >> i & 1]


def _class_name(kind: str) -> str:
    odd = {"ELEMENTWISE": "IElementWiseLayer", "KV_CACHE_UPDATE": "IKVCacheUpdateLayer", "SOFTMAX": "ISoftMaxLayer"}
    return odd.get(kind) or "I" + "".join(part.capitalize() for part in kind.split("_")) + "Layer"
