"""The one decoder. Every family runs through this module; what differs between them is in the spec.

It calls ``torch.ops.llmapi``, which ``llmapi._kernels`` defines: import that before running it.
"""

from __future__ import annotations

import torch
from torch import nn

from llmapi.models.layers import Block, StepInputs, make_norm
from llmapi.models.rope import inverse_frequencies
from llmapi.models.spec import TransformerSpec

ops = torch.ops.llmapi


class Transformer(nn.Module):
    """A decoder-only transformer over ragged batches and a paged cache.

    Its parameters carry the canonical tensor names that the families' weight tables fill.

    Args:
        spec: the architecture.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.learned_positions:
            self.positions = nn.Embedding(spec.learned_positions, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, i) for i in range(spec.num_layers))
        self.norm = make_norm(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.lm_head_bias)
        if spec.rope is not None:
            self.register_buffer("inv_freq", torch.empty(spec.rope.rotary_dim // 2, dtype=torch.float32))
        self.spec = spec

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """One step: prefill, chunked prefill and decode alike. Integer inputs are int32.

        Args:
            input_ids: ``[T]`` tokens of all sequences, one sequence after the other.
            positions: ``[T]`` position of each in its sequence.
            slot_mapping: ``[T]`` where its key and value go.
            block_tables: ``[B, M]`` blocks of each sequence.
            seq_lens: ``[B]`` tokens of each sequence, these included.
            query_start: ``[B + 1]`` first row of each sequence, then ``T``.
            logits_indices: ``[N]`` rows whose logits are wanted.
            k_caches, v_caches: per layer ``[blocks, block_size, K, D]``, written.

        Returns:
            ``[N, vocab_size]`` logits in the weights' dtype.
        """
        x = self.embed(input_ids)
        if self.spec.learned_positions:
            x = x + self.positions(positions)
        cos_sin = None
        if self.spec.rope is not None:
            cos_sin = ops.rotary_cos_sin(positions, self.inv_freq, self.spec.rope.attention_factor)
        step = StepInputs(slot_mapping, block_tables, seq_lens, query_start, cos_sin)
        for i, (layer, k_cache, v_cache) in enumerate(zip(self.layers, k_caches, v_caches, strict=True)):
            # After its attention the last layer only matters for the rows whose logits are wanted.
            rows = logits_indices if i == len(self.layers) - 1 else None
            x = layer(x, step, k_cache, v_cache, rows)
        x = self.norm(x)
        table = self.embed.weight if self.spec.tie_word_embeddings else self.lm_head.weight
        bias = self.lm_head.bias if self.spec.lm_head_bias else None
        return nn.functional.linear(x, table, bias)


def constants(spec: TransformerSpec) -> dict[str, torch.Tensor]:
    """Values of the buffers, small tables that follow from the spec alone.

    Args:
        spec: the architecture.
    """
    return {} if spec.rope is None else {"inv_freq": inverse_frequencies(spec.rope)}
