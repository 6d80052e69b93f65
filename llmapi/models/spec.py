"""TransformerSpec: everything the one decoder needs to know about an architecture, as data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched to long contexts.

    Attributes:
        theta: base of the geometric frequencies.
        kind: ``default``; ``linear`` (positions divided by ``factor``); ``llama3`` (Llama 3.1's wavelength-dependent
            factor); ``yarn`` (Peng et al. 2023, arXiv:2309.00071).
        rotary_dim: leading channels of each head that are rotated; even.
        interleaved: pairs are (0,1),(2,3),... instead of (0,d/2),(1,d/2+1),...
        factor: how many times longer than ``original_max_positions`` the context became.
        original_max_positions: context length before stretching (llama3, yarn).
        low_freq_factor, high_freq_factor: limits of llama3's interpolation band.
        beta_fast, beta_slow: limits of yarn's interpolation band, in rotations.
        attention_factor: what cos and sin are multiplied by (yarn); 1 elsewhere.
        truncate: whether yarn's band limits are rounded to whole channels.
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """One decoder-only architecture, read off a config.json by a family.

    Attributes:
        family: name of the family that made this spec; for messages only, nothing branches on it.
        vocab_size, hidden_size, intermediate_size, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: attention heads; ``num_heads`` is a multiple of ``num_kv_heads``.
        max_position_embeddings: longest sequence the model was made for, in tokens.
        norm, norm_eps: root-mean-square or mean-variance normalization, and its epsilon.
        activation, gated: the feed-forward's non-linearity, and whether it gates a second projection.
        rope: rotary embedding, or None.
        learned_positions: rows of a learned position table, 0 for none.
        qkv_bias, o_bias, mlp_bias, lm_head_bias: which linears carry a bias.
        tie_word_embeddings: whether the output projection is the embedding table.
        attention_scale: what scores are multiplied by.
        windows: sliding window of each layer in tokens; 0 for full attention.
        softcap: bound on attention scores (``c * tanh(score / c)``), 0 for none.
        dtype: the checkpoint's own dtype.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated: bool
    rope: RopeSpec | None
    learned_positions: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    attention_scale: float
    windows: tuple[int, ...]
    softcap: float = 0.0
    dtype: str = "float32"

    @property
    def q_size(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of all key heads, and as many of all value heads."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token occupies over all layers.

        Args:
            dtype_bytes: bytes of one cache element.
        """
        return 2 * self.num_layers * self.kv_size * dtype_bytes

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; inverse of :meth:`from_json`."""
        out: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TransformerSpec:
        """From what :meth:`to_json` gave."""
        rope = data["rope"]
        return cls(**{**data, "windows": tuple(data["windows"]), "rope": None if rope is None else RopeSpec(**rope)})
