"""The tensors of a GGUF file as a ``Checkpoint``: Hugging Face's names, shapes and order of rows, in float32.

Each tensor is dequantized when it is read, straight from the mapped file, a piece at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmapi._build.checkpoint import Checkpoint, TensorInfo, broken
from llmapi._build.gguf import GGUFTensor, read_header
from llmapi.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # elements dequantized at a time

_DECODER = (
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    "model.layers.{i}.input_layernorm",
    "model.layers.{i}.self_attn.q_proj",
    "model.layers.{i}.self_attn.k_proj",
    "model.layers.{i}.self_attn.v_proj",
    "model.layers.{i}.self_attn.o_proj",
    "model.layers.{i}.post_attention_layernorm",
    "model.layers.{i}.mlp.gate_proj",
    "model.layers.{i}.mlp.up_proj",
    "model.layers.{i}.mlp.down_proj",
)
_GPT2 = (
    "transformer.wte",
    "transformer.wpe",
    "transformer.ln_f",
    "lm_head",
    "transformer.h.{i}.ln_1",
    "transformer.h.{i}.attn.c_attn",
    "transformer.h.{i}.attn.c_proj",
    "transformer.h.{i}.ln_2",
    "transformer.h.{i}.mlp.c_fc",
    "transformer.h.{i}.mlp.c_proj",
)


@dataclass(frozen=True)
class _Family:
    """How GGUF keeps the tensors of one architecture.

    Args:
        modules: Hugging Face's names of the modules that have tensors; ``{i}`` is the layer.
        paired: modules whose rows GGUF keeps in pairs (x0, y0, x1, y1, ...) where Hugging Face keeps halves, with the
            metadata key of their number of heads.
        transposed: modules whose weight GGUF keeps as (out, in) and Hugging Face as (in, out).
    """

    modules: tuple[str, ...]
    paired: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()


_FAMILIES = {
    "llama": _Family(_DECODER, paired=((".q_proj", "attention.head_count"), (".k_proj", "attention.head_count_kv"))),
    "qwen2": _Family(_DECODER),
    "gpt2": _Family(_GPT2, transposed=(".c_attn", ".c_proj", ".c_fc")),
}


class GGUFCheckpoint(Checkpoint):
    """The tensors of the GGUF file at ``path``; those without a Hugging Face name keep their own.

    Raises:
        CheckpointError: the file is broken or ends too early.
        UnsupportedModelError: unknown architecture or quantization, or the package ``gguf`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        gguf = _package(path)
        header = read_header(path)
        self._header, self._family = header, _FAMILIES[header.architecture]
        self._stored = {n: t for n, t in header.tensors.items() if not _is_derived(n)}
        self._bytes = {name: self._check(gguf, name, tensor) for name, tensor in self._stored.items()}
        self._origin = self._names(gguf)
        self.tensors = {hf: self._info(hf, self._stored[name]) for hf, name in self._origin.items()}

    def _names(self, gguf: Any) -> dict[str, str]:
        """Hugging Face's name → the name in the file."""
        layers = self._header.get("block_count")
        arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self._header.architecture)
        table = gguf.get_tensor_name_map(arch, layers)
        modules = {m.format(i=i) for m in self._family.modules for i in range(layers)}
        known = {table.get_name(m): m for m in modules}
        names = {}
        for name in self._stored:
            module, dot, kind = name.rpartition(".")
            names[known.get(module, module) + dot + kind] = name
        return names

    def _check(self, gguf: Any, name: str, tensor: GGUFTensor) -> int:
        """Size of the tensor in the file, in bytes, once it is known to be all there."""
        path = self._header.path
        try:
            kind = gguf.GGMLQuantizationType(tensor.ggml_type)
        except ValueError:
            raise UnsupportedModelError(
                f"{path}: {name} has ggml type {tensor.ggml_type}, unknown to gguf; upgrade it: pip install -U gguf"
            ) from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not tensor.shape or tensor.shape[-1] % block:
            raise broken(path, f"{name} has shape {tensor.shape}, which {kind.name} blocks of {block} do not divide")
        nbytes = math.prod(tensor.shape) // block * size
        if tensor.offset + nbytes > path.stat().st_size:
            raise broken(path, f"{name} would end at byte {tensor.offset + nbytes}")
        return int(nbytes)

    def _info(self, hf_name: str, tensor: GGUFTensor) -> TensorInfo:
        import torch

        shape = tensor.shape[::-1] if self._is_transposed(hf_name) else tensor.shape
        return TensorInfo(shape, torch.float32, 4 * math.prod(shape), self._header.path)

    def _is_transposed(self, hf_name: str) -> bool:
        module, _, kind = hf_name.rpartition(".")
        return kind == "weight" and module.endswith(self._family.transposed)

    def _read(self, name: str, info: TensorInfo) -> torch.Tensor:
        origin = self._origin[name]
        tensor = self._dequantized(origin)
        if self._is_transposed(name):
            return tensor.t().contiguous()
        for module, key in self._family.paired:
            if name.rpartition(".")[0].endswith(module):
                heads = self._header.get(key, self._header.get("attention.head_count"))
                return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def _dequantized(self, origin: str) -> torch.Tensor:
        import gguf
        import numpy as np
        import torch

        stored, path = self._stored[origin], self._header.path
        kind = gguf.GGMLQuantizationType(stored.ggml_type)
        plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
        rows, columns = math.prod(stored.shape[:-1]), stored.shape[-1]
        data = np.memmap(
            path, mode="r", dtype=np.uint8, offset=stored.offset, shape=(rows, self._bytes[origin] // rows)
        )
        out = torch.empty((rows, columns), dtype=torch.float32)
        into = out.numpy()
        step = max(1, _CHUNK // columns)
        for i in range(0, rows, step):
            piece = data[i : i + step]
            try:
                into[i : i + step] = (
                    piece.view(plain[kind.name]) if kind.name in plain else gguf.dequantize(piece, kind)
                )
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{path}: {origin} is quantized as {kind.name}, which the installed gguf cannot decode; upgrade it "
                    "(pip install -U gguf) or use another quantization of the model"
                ) from error
        return out.view(stored.shape)

    def close(self) -> None:
        """Nothing stays open between reads."""


def _is_derived(name: str) -> bool:
    """Whether the tensor repeats what the configuration says: rotary frequencies, not weights."""
    return name == "rope_freqs.weight" or name.endswith((".attn_rot_embd.weight", ".attn_rot_embd"))


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedModelError(
            f'{path}: to read GGUF weights, install the package gguf: pip install "llmapi[gguf]"'
        ) from error
    return gguf
