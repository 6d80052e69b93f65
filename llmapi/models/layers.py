"""The decoder's parts: attention and feed-forward, over plain torch and ``torch.ops.llmapi``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmapi.models.activations import ACTIVATIONS
from llmapi.models.spec import TransformerSpec

ops = torch.ops.llmapi


@dataclass
class StepInputs:
    """What a step runs on; shapes in :meth:`llmapi.models.transformer.Transformer.forward`."""

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    cos_sin: torch.Tensor | None


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension.

    Args:
        size: channels.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, size]`` to the same."""
        out: torch.Tensor = ops.rms_norm(x, self.weight, self.eps)
        return out


def make_norm(spec: TransformerSpec) -> nn.Module:
    """The normalization that the spec names."""
    if spec.norm == "rms":
        return RMSNorm(spec.hidden_size, spec.norm_eps)
    return nn.LayerNorm(spec.hidden_size, spec.norm_eps)


class Attention(nn.Module):
    """Self-attention over the paged cache.

    Args:
        spec: the architecture.
        layer: index of the layer, for its window.
    """

    def __init__(self, spec: TransformerSpec, layer: int) -> None:
        super().__init__()
        self.q = nn.Linear(spec.hidden_size, spec.q_size, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.hidden_size, spec.kv_size, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.hidden_size, spec.kv_size, bias=spec.qkv_bias)
        self.o = nn.Linear(spec.q_size, spec.hidden_size, bias=spec.o_bias)
        self.size = spec.q_size
        self.scale = spec.attention_scale
        self.window = spec.windows[layer]
        self.softcap = spec.softcap
        self.interleaved = spec.rope is not None and spec.rope.interleaved

    def forward(
        self,
        x: torch.Tensor,
        step: StepInputs,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[T, hidden]`` to the same, or to the named rows; writes this step's keys and values into the caches."""
        qkv = torch.cat((self.q(x), self.k(x), self.v(x)), -1)
        q = ops.rotary_kv_write(qkv, step.cos_sin, step.slot_mapping, k_cache, v_cache, self.interleaved)
        attended = ops.paged_attention(
            q, k_cache, v_cache, step.block_tables, step.seq_lens, step.query_start,
            self.scale, self.window, self.softcap, None, None,
        )  # fmt: skip
        attended = attended.view(-1, self.size)
        out: torch.Tensor = self.o(attended if rows is None else attended.index_select(0, rows))
        return out


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``.

    Args:
        spec: the architecture.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, hidden]`` to the same."""
        gate_up = torch.cat((self.gate(x), self.up(x)), -1)
        out: torch.Tensor = self.down(ops.gated_activation(gate_up, self.activation))
        return out


class MLP(nn.Module):
    """``down(act(up(x)))``.

    Args:
        spec: the architecture.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, hidden]`` to the same."""
        out: torch.Tensor = self.down(self.activation(self.up(x)))
        return out


class Block(nn.Module):
    """One decoder layer, normalizing before each half.

    Args:
        spec: the architecture.
        layer: index of the layer.
    """

    def __init__(self, spec: TransformerSpec, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(spec)
        self.attn = Attention(spec, layer)
        self.mlp_norm = make_norm(spec)
        self.mlp = GatedMLP(spec) if spec.gated else MLP(spec)

    def forward(
        self,
        x: torch.Tensor,
        step: StepInputs,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[T, hidden]`` to the same, or to ``[N, hidden]``, the named rows alone.

        Every row's key and value are written; what follows the attention is computed for the named rows only.
        """
        attended = self.attn(self.attn_norm(x), step, k_cache, v_cache, rows)
        x = (x if rows is None else x.index_select(0, rows)) + attended
        out: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return out
