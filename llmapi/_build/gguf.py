"""The header of a GGUF file: what its metadata says, as a ``config.json``, and where its tensors lie.

It is parsed here, in a few milliseconds and without the package ``gguf``: the vocabulary is skipped, not read.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmapi._build.checkpoint import broken
from llmapi.errors import UnsupportedModelError, unknown_name

_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {10: "<Q", 11: "<q", 12: "<d"}
_LONG = 4096  # an array beyond this many items is a vocabulary: only its length is kept


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place in the file: shape (rows first), number of its ggml type, and offset in bytes."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the tensor data: metadata (a long array is given as its length) and where the tensors lie."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``, one of those supported."""
        name = str(self.metadata.get("general.architecture", ""))
        if name not in _FAMILIES:
            raise UnsupportedModelError(f"{self.path}: {unknown_name('GGUF architecture', name, _FAMILIES)}")
        if int(self.metadata.get("split.count", 0)) > 1:
            raise UnsupportedModelError(f"{self.path} is one part of a split model; join the parts: gguf-split --merge")
        return name

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata ``<architecture>.<key>``; without a default it must be there, and one value for all layers."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise broken(self.path, f"its metadata lacks {self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(f"{self.path}: {key} differs between layers, which is not supported")
            value = value[0]
        return value


def read_header(path: Path) -> GGUFHeader:
    """Parse the metadata and the tensor table of a GGUF file; no tensor is read.

    Raises:
        CheckpointError: no GGUF file, one of an unknown version or byte order, or one that ends too early.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).header()
    except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
        raise broken(path, f"no whole GGUF header ({error})") from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> GGUFHeader:
        magic, version = self.data[:4], self._scalar("<4xI")
        if magic != b"GGUF":
            raise broken(self.path, f"it starts with {magic!r}, not with b'GGUF'")
        if version not in (2, 3):
            raise broken(self.path, f"GGUF version {version} (or another byte order); 2 and 3 are known")
        tensors, pairs = self._scalar("<Q"), self._scalar("<Q")
        metadata = {self._string(): self._value(self._scalar("<I")) for _ in range(pairs)}
        table = [(self._string(), *self._place()) for _ in range(tensors)]
        align = int(metadata.get("general.alignment", 32))
        start = -(-self.at // align) * align
        return GGUFHeader(self.path, metadata, {n: GGUFTensor(shape, t, start + at) for n, shape, t, at in table})

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return float(f"{value:.7g}") if code == "<f" else value  # 1e-05, not its nearest float32

    def _string(self) -> str:
        size = self._scalar("<Q")
        if size > len(self.data) - self.at:
            raise ValueError("a string runs past the end")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"metadata of unknown type {kind}")
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("<I"), self._scalar("<Q")
        if count <= _LONG:
            return [self._value(item) for _ in range(count)]
        if item in _SCALARS:
            self.at += count * struct.calcsize(_SCALARS[item])
        elif item == _STRING:
            size, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
            for _ in range(count):
                at += 8 + size(data, at)[0]
            self.at = at
        else:
            raise ValueError(f"an array of type {item}")
        return count

    def _place(self) -> tuple[tuple[int, ...], int, int]:
        dims = tuple(self._scalar("<Q") for _ in range(min(self._scalar("<I"), 8)))
        return dims[::-1], self._scalar("<I"), self._scalar("<Q")


def gguf_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` that the metadata of the GGUF file at ``path`` amounts to, in the terms of transformers 5.

    Raises:
        CheckpointError: the file is broken or lacks a value.
        UnsupportedModelError: its architecture, or an option of it, is not supported.

    >>> gguf_config(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))["num_key_value_heads"]  # doctest: +SKIP
    3
    """
    header = read_header(path)
    config = _FAMILIES[header.architecture](header)
    if "token_embd.weight" not in header.tensors:
        raise broken(path, "it has no token_embd.weight")
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (token := header.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _decoder_config(header: GGUFHeader, model_type: str, architecture: str) -> dict[str, Any]:
    if header.get("expert_count", 0):
        raise UnsupportedModelError(f"{header.path} is a mixture of experts, which is not supported as GGUF")
    hidden, heads = header.get("embedding_length"), header.get("attention.head_count")
    head_dim = header.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := header.get(key, head_dim)) != head_dim:
            raise UnsupportedModelError(f"{header.path}: {key} {size} with heads of {head_dim} is not supported")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": header.get("feed_forward_length"),
        "num_hidden_layers": header.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": header.get("context_length"),
        "rms_norm_eps": header.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, head_dim),
    }


def _llama_config(header: GGUFHeader) -> dict[str, Any]:
    return _decoder_config(header, "llama", "LlamaForCausalLM") | {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2_config(header: GGUFHeader) -> dict[str, Any]:
    return _decoder_config(header, "qwen2", "Qwen2ForCausalLM") | {"use_sliding_window": False}


def _gpt2_config(header: GGUFHeader) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": header.get("embedding_length"),
        "n_layer": header.get("block_count"),
        "n_head": header.get("attention.head_count"),
        "n_inner": header.get("feed_forward_length"),
        "n_positions": header.get("context_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_epsilon"),
    }


def _rope(header: GGUFHeader, head_dim: int) -> dict[str, Any]:
    """``rope_parameters``: plain, scaled as the metadata says, or the Llama 3 scaling kept in ``rope_freqs.weight``."""
    theta = header.get("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = header.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": header.get("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = header.get("rope.scaling.original_context_length")
    elif kind != "none":
        raise UnsupportedModelError(f"{header.path}: {unknown_name('rope scaling', kind, ['none', 'linear', 'yarn'])}")
    if (freqs := header.tensors.get("rope_freqs.weight")) is not None and freqs.ggml_type == 0:
        with header.path.open("rb") as file:
            file.seek(freqs.offset)
            data = file.read(4 * freqs.shape[0])
        if len(data) != 2 * head_dim:
            raise broken(header.path, "rope_freqs.weight is cut short, or not of half a head")
        factors = struct.unpack(f"<{head_dim // 2}f", data)
        llama3 = {"factor": round(max(factors), 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        expected = _llama3_factors(theta, head_dim, **llama3)
        if max(factors) > 1:
            if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=True)):
                raise UnsupportedModelError(f"{header.path}: its rope_freqs are not the scaling that Llama 3 uses")
            rope |= {"rope_type": "llama3", "original_max_position_embeddings": _LLAMA3_CONTEXT, **llama3}
    return rope


_LLAMA3_CONTEXT = 8192


def _llama3_factors(
    theta: float, head_dim: int, factor: float, low_freq_factor: float, high_freq_factor: float
) -> list[float]:
    """By how much Llama 3 slows each rotary frequency: 1 for the fast, ``factor`` for the slow, smooth between."""
    factors = []
    for i in range(head_dim // 2):
        turns = _LLAMA3_CONTEXT / (2 * math.pi * theta ** (2 * i / head_dim))
        smooth = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


_FAMILIES: dict[str, Callable[[GGUFHeader], dict[str, Any]]] = {
    "llama": _llama_config,
    "qwen2": _qwen2_config,
    "gpt2": _gpt2_config,
}
