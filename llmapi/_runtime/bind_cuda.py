"""Binder: what runs on the GPU for each node of the graph. Decided once, at load.

Some nodes need more than a launch: attention, which is two kernels that share a workspace; rotary embedding, which
leaves the queries where they are, and is part of attention in steps of decoding; linear layers, for which the fastest
of several implementations is taken, and which take over activations and norms around them; and the choice of the rows
whose logits are wanted, which in steps of decoding are all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmapi._build.graph import Graph, Node, Ref
from llmapi._kernels import OPS
from llmapi._kernels.context_attention_cuda import ContextAttention
from llmapi._kernels.decode_attention_cuda import DecodeAttention, Fusion
from llmapi._kernels.gated_activation_cuda import gated_activation
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.rotary_cuda import rotary_kv_write
from llmapi._kernels.skinny_linear_layout import BUCKETS
from llmapi._runtime.graph_uses import GraphUses
from llmapi._runtime.linear_cuda import CudaLinear, LinearChoices, NormBetween, bucket_of
from llmapi._runtime.program import Call, Slot, call_of, torch_function
from llmapi._runtime.step_buffers import StepShape
from llmapi.config import EngineConfig
from llmapi.errors import BuildError
from llmapi.models.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """What attention needs to know about a step on the host.

    Attributes:
        decode, context: whether the step may have sequences of one token at its beginning, and others.
        every: row ``i`` of the logits is that of token ``i``.
        counts: ``[4]`` on the GPU: sequences of one token at the beginning, sequences, tokens, rows of logits.
        seq_lens, query_start: the step's arrays.
    """

    decode: bool
    context: bool
    every: bool
    counts: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor

    @classmethod
    def of(cls, arrays: Mapping[str, torch.Tensor], shape: StepShape, decodes: int) -> CudaPlan:
        """For a step with this many sequences of one token at its beginning."""
        names = ("counts", "seq_lens", "query_start")
        return cls(decodes > 0, decodes < shape.seqs, False, *(arrays[name] for name in names))

    @classmethod
    def any(cls, arrays: Mapping[str, torch.Tensor], shape: StepShape) -> CudaPlan:
        """For every step of a shape."""
        names = ("counts", "seq_lens", "query_start")
        return cls(not shape.prompts, not shape.decode, shape.decode, *(arrays[name] for name in names))


@dataclass(frozen=True, slots=True)
class Unrotated:
    """Queries in packed rows as the projection left them; attention is to rotate them and to write keys and values."""

    queries: torch.Tensor
    cos_sin: torch.Tensor | None
    fusion: Fusion


class Binder:
    """Implementations for one engine.

    Args:
        gpu: the device.
        graph: the step.
        values: weights by name.
        spec: the model.
        config: limits and types.

    Attributes:
        choices: which implementation a linear layer takes, by its shape and the number of rows.
    """

    def __init__(
        self, gpu: Gpu, graph: Graph, values: Mapping[str, Any], spec: TransformerSpec, config: EngineConfig
    ) -> None:
        self._gpu = gpu
        self._values = values
        self._graph = graph
        self._uses = GraphUses(graph)
        dtype, kv_dtype = getattr(torch, config.dtype), getattr(torch, config.kv_dtype)
        heads: dict[str, Any] = {
            "dtype": dtype, "kv_dtype": kv_dtype, "heads": spec.num_heads, "kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim, "block_size": config.block_size,
            "max_batch_size": config.max_batch_size, "max_seq_len": config.max_seq_len,
        }  # fmt: skip
        self._num_heads, self._head_dim = spec.num_heads, spec.head_dim
        rotated = 0 if spec.rope is None else spec.rope.rotary_dim
        self._fusions = self._find_fusions(dtype, spec.num_heads // spec.num_kv_heads, rotated)
        self._decode = DecodeAttention(gpu, **heads, fusions=set(self._fusions.values()))
        self._context = ContextAttention(gpu, **heads, max_num_tokens=config.max_num_tokens)
        self.choices = LinearChoices(gpu, dtype)
        self._max_tokens = config.max_num_tokens

    def linear_groups(self) -> list[tuple[str | None, list[torch.Tensor]]]:
        """Linear layers of one shape and epilogue: the activation fused into them, if any, and their weights."""
        groups: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for name, gate in self._uses.linears():
            weight = self._values[name]
            groups.setdefault((gate, *weight.shape), []).append(weight)
        return [(key[0], weights) for key, weights in groups.items()]

    def units(self, rows: tuple[int, ...]) -> list[Unit]:
        """What linear layers and norms in them need compiled for these numbers of rows, by what was chosen."""
        shapes = [(gate, weights[0].shape) for gate, weights in self.linear_groups()]
        products = [self.choices.unit(r, n, k, gate) for r in rows for gate, (n, k) in shapes]
        norms = [self._norm_between(node) for node in self._graph.nodes if node.op == "llmapi.add_rms_norm.default"]
        parts = [unit for norm in norms if norm is not None for r in rows for unit in norm.units(r)]
        return list(dict.fromkeys([*(unit for unit in products if unit is not None), *parts]))

    def later_units(self) -> list[Unit]:
        """What steps of other sizes than those of the start will need compiled."""
        return self.units(tuple(r for r in BUCKETS if r <= bucket_of(self._max_tokens))) + self._context.other_units()

    def begin(self, plan: CudaPlan) -> None:
        """Launch what divides the step's attention among the multiprocessors; once, before all layers."""
        if plan.context:
            self._context.plan(plan.seq_lens, plan.query_start, plan.counts)

    def implement(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Call:
        """The call of a node; see :class:`llmapi._runtime.program.Program`."""
        if node.op == "aten.linear.default":
            if self._uses.gate_of(node) is not None or self._uses.norm_of(node) is not None:
                (slot,) = (a for a in args[:1] if isinstance(a, Slot))
                return lambda env: env[slot]  # the activation or norm that follows computes both
            return call_of(self._linear(node), args[:1], {})
        if node.op == "llmapi.add_rms_norm.default":
            between = self._norm_between(node)
            if between is not None:
                return call_of(between, args, kwargs)
        if node.op == "llmapi.gated_activation.default":
            producer = self._uses.nodes.get(node.args[0].name)
            if producer is not None and self._uses.gate_of(producer) is node:
                return call_of(self._linear(producer), args[:1], {})
            return call_of(partial(gated_activation, self._gpu), args, kwargs)
        if node.op == "llmapi.rotary_kv_write.default":
            alone = self._uses.count[node.args[0].name] == 1
            write = partial(rotary_kv_write, self._gpu, in_place=alone)
            fusion = self._fusions.get(node.name)
            if fusion is None:
                return call_of(write, args, kwargs)
            return call_of(partial(self._rotary, write, fusion), args, kwargs, plan=True)
        if node.op == "llmapi.paged_attention.default":
            return call_of(self._attention, args, kwargs, plan=True)
        if node.op == "aten.index_select.default" and node.args[1:] == (0, Ref("logits_indices")):
            return call_of(_select, [args[0], args[2]], kwargs, plan=True)
        if node.op in OPS:
            launch = OPS[node.op].cuda
            if launch is None:
                raise BuildError(f"{node.op} at {node.path} has no implementation for CUDA: use backend='cpu'")
            return call_of(partial(launch, self._gpu), args, kwargs)
        return call_of(torch_function(node.op), args, kwargs)

    def _norm_between(self, norm: Node) -> NormBetween | None:
        before, after = self._uses.nodes.get(norm.args[0].name), self._uses.after_norm(norm)
        if before is None or after is None or self._uses.norm_of(before) is not norm:
            return None
        return NormBetween(self._gpu, self._linear(before), self._linear(after))

    def _linear(self, node: Node) -> CudaLinear:
        """A linear layer with the activation that follows it, if that is all that reads it."""
        weight, *bias = (self._values[ref.name] for ref in node.args[1:] if isinstance(ref, Ref))
        gate = self._uses.gate_of(node)
        return CudaLinear(self.choices, weight, bias[0] if bias else None, None if gate is None else str(gate.args[1]))

    def _find_fusions(self, dtype: torch.dtype, group: int, rotated: int) -> dict[str, Fusion]:
        """The rotary nodes whose work attention can do: nobody else reads what they read and what they return."""
        found = {}
        for node in self._graph.nodes:
            if node.op != "llmapi.paged_attention.default":
                continue
            source = self._uses.nodes.get(node.args[0].name)
            if source is None or source.op != "llmapi.rotary_kv_write.default" or self._uses.count[source.name] != 1:
                continue
            qkv, cos_sin, *_, interleaved = source.args
            fusion = Fusion.of(dtype, group, 0 if cos_sin is None else rotated, bool(interleaved))
            if fusion is not None and self._uses.count[qkv.name] == 1:
                found[source.name] = fusion
        return found

    def _rotary(
        self,
        write: Callable[..., torch.Tensor],
        fusion: Fusion,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor | None,
        *others: Any,
        plan: CudaPlan,
    ) -> torch.Tensor | Unrotated:
        """``write`` in steps that have prompts in them; else its work is left to attention."""
        if plan.context:
            return write(qkv, cos_sin, *others)
        heads = qkv.view(qkv.shape[0], -1, self._head_dim)
        return Unrotated(heads[:, : self._num_heads], cos_sin, fusion)

    def _attention(
        self,
        q: torch.Tensor | Unrotated,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
        *,
        plan: CudaPlan,
    ) -> torch.Tensor:
        fused: dict[str, Any] = {}
        if isinstance(q, Unrotated):
            fused = {"fusion": q.fusion, "cos_sin": q.cos_sin}
            q = q.queries
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        options: dict[str, Any] = {
            "scale": scale, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks,
        }  # fmt: skip
        if plan.decode:
            fused["counts"] = plan.counts
            self._decode(out, q, k_cache, v_cache, block_tables, seq_lens, None, **options, **fused)
        if plan.context:
            self._context(
                out, q, k_cache, v_cache, block_tables, seq_lens, query_start, plan.counts, planned=True, **options
            )
        return out


def _select(x: torch.Tensor, rows: torch.Tensor, *, plan: CudaPlan) -> torch.Tensor:
    return x if plan.every else x.index_select(0, rows)
