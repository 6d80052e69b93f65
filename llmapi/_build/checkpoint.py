"""A model's tensors by name, read one at a time: safetensors, PyTorch ``.bin`` and GGUF look the same from here.

Reading is lazy. Files are memory mapped, one at a time, and the mapping is renewed every so often, so that of what was
read only the tensors still in use stay in memory. Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmapi._build.file_span import FileSpan
from llmapi._files import read_index
from llmapi.errors import CheckpointError, unknown_name

if TYPE_CHECKING:
    import torch

    from llmapi._source import Snapshot

_RENEW_BYTES = 256 << 20  # renew a mapping after this many bytes: the pages of tensors that are gone leave with it


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says about one tensor.

    Args:
        shape: its shape, as ``read`` returns it.
        dtype: its dtype, as ``read`` returns it.
        nbytes: its size in memory, in bytes.
        file: the file it comes from.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: Path


class Checkpoint(ABC):
    """The tensors of a model, under their Hugging Face names.

    ``tensors`` lists them without reading any. A checkpoint is a context manager; ``close`` lets go of its files.
    """

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU. It may be a private view of the mapped file: it is never written back.

        Raises:
            CheckpointError: there is no tensor of that name, or its file is broken.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{unknown_name('tensor', name, sorted(self.tensors)[:8])}, ...")
        return self._read(name, self.tensors[name])

    def span(self, name: str) -> FileSpan | None:
        """Where a tensor lies in its file, as it is; None where only :meth:`read` can give it.

        Args:
            name: one of ``tensors``.
        """
        return None

    @abstractmethod
    def _read(self, name: str, info: TensorInfo) -> torch.Tensor: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """Open the weights of ``snapshot`` and check that they are all there.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or lacks a tensor that the index places in it.
        UnsupportedModelError: a GGUF file of an unknown architecture, or the package ``gguf`` is not installed.

    >>> with open_checkpoint(snapshot) as checkpoint:  # doctest: +SKIP
    ...     checkpoint.read("model.norm.weight").shape
    torch.Size([576])
    """
    if snapshot.kind == "gguf":
        from llmapi._build.gguf_tensors import GGUFCheckpoint

        return GGUFCheckpoint(snapshot.path)
    files = [f.path for f in snapshot.weight_files]
    if not files:
        raise CheckpointError(f"{snapshot.model} was resolved without weights; use load_format='auto' to read them")
    index = read_index(snapshot.index_file) if snapshot.index_file is not None else {}
    if absent := sorted(set(index.values()) - {f.name for f in files}):
        raise CheckpointError(f"{snapshot.index_file} names {', '.join(absent[:3])}, not there; fetch the model again")
    kind = _SafetensorsFile if files[0].suffix == ".safetensors" else _TorchFile
    return _Shards([kind(f) for f in files], index)


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """The model's ``config.json``, or what a GGUF file's metadata says in its terms.

    Raises:
        CheckpointError: the file is not a JSON object, or not a GGUF file.
        UnsupportedModelError: a GGUF file of an unknown architecture.
    """
    if snapshot.config_file is None:
        from llmapi._build.gguf import gguf_config

        return gguf_config(snapshot.path)
    try:
        config = json.loads(snapshot.config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(snapshot.config_file, error) from error
    if not isinstance(config, dict):
        raise broken(snapshot.config_file, f"it holds a {type(config).__name__}, not an object")
    return config


def broken(path: Path, why: object) -> CheckpointError:
    """A ``CheckpointError`` that says what is wrong with the file at ``path`` and how to mend it."""
    real = path.resolve()
    try:
        with real.open("rb") as file:
            head, size = file.read(40), real.stat().st_size
    except OSError as error:
        return CheckpointError(f"{path} cannot be read ({error.strerror}); check that it exists and is readable")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder")
    reason = " ".join(str(why).split())[:200]
    return CheckpointError(
        f"{path} ({size} bytes) is truncated or corrupt: {reason}; delete {real} and fetch or copy it again"
    )


class _File(ABC):
    """One weight file: describes its tensors at once, maps them when asked."""

    renewable = True  # whether mapping it again costs next to nothing

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos = {name: self._info(shape, dtype) for name, shape, dtype in self._describe()}
        self.close()

    def _info(self, shape: Iterable[int], dtype: torch.dtype) -> TensorInfo:
        size = tuple(shape)
        return TensorInfo(size, dtype, math.prod(size) * dtype.itemsize, self.path)

    @abstractmethod
    def _describe(self) -> Iterable[tuple[str, Iterable[int], torch.dtype]]: ...

    @abstractmethod
    def get(self, name: str) -> torch.Tensor: ...

    def span(self, name: str) -> FileSpan | None:
        return None

    @abstractmethod
    def close(self) -> None: ...


class _Shards(Checkpoint):
    """Weight files of one kind, of which one is open at a time."""

    def __init__(self, files: list[_File], index: Mapping[str, str]) -> None:
        self._files = {f.path: f for f in files}
        self._open: _File | None = None
        self._mapped = 0
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in file.infos.items():
                if index.get(name, file.path.name) != file.path.name:
                    continue  # the index knows better
                if name in tensors:
                    raise CheckpointError(
                        f"{name} is in {tensors[name].file.name} and in {file.path}; remove the file of the other model"
                    )
                tensors[name] = info
        if lost := sorted(set(index) - set(tensors)):
            raise CheckpointError(
                f"{files[0].path.with_name(index[lost[0]])} lacks {lost[0]}, which the index places in it ({len(lost)} "
                f"such of {len(index)}); the shards are not of one model, fetch them again"
            )
        self.tensors = tensors

    def _read(self, name: str, info: TensorInfo) -> torch.Tensor:
        file = self._files[info.file]
        if self._open is not file or (self._mapped > _RENEW_BYTES and file.renewable):
            self.close()
            self._open = file
        self._mapped += info.nbytes
        return file.get(name)

    def span(self, name: str) -> FileSpan | None:
        return self._files[self.tensors[name].file].span(name)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open, self._mapped = None, 0


class _SafetensorsFile(_File):
    _handle: Any = None
    _offsets: dict[str, int] | None = None

    def _map(self) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._handle is None:
            try:
                opened: Any = safe_open(self.path, framework="pt", device="cpu")
                self._handle = opened.__enter__()
            except (SafetensorError, OSError, ValueError) as error:
                raise broken(self.path, error) from error
        return self._handle

    def _describe(self) -> Iterable[tuple[str, Iterable[int], torch.dtype]]:
        handle = self._map()
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            part = handle.get_slice(name)
            yield name, part.get_shape(), _dtype(part.get_dtype(), name, self.path)

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._map().get_tensor(name)
        return tensor

    def span(self, name: str) -> FileSpan | None:
        if sys.byteorder != "little":
            return None
        if self._offsets is None:  # of a header that the library found to be right when the file was described
            try:
                with self.path.open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    entries = json.loads(file.read(size))
                self._offsets = {n: 8 + size + e["data_offsets"][0] for n, e in entries.items() if n != "__metadata__"}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise broken(self.path, error) from error
        info = self.infos[name]
        return FileSpan(self.path, self._offsets[name], info.dtype, info.shape)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
            self._handle = None


def _dtype(code: str, name: str, path: Path) -> torch.dtype:
    import torch

    known = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if code not in known:
        raise CheckpointError(f"{name} in {path}: {unknown_name('tensor type', code, known)}")
    return known[code]


class _TorchFile(_File):
    """A ``.bin`` of ``torch.save``. Those written before PyTorch 1.6 cannot be mapped, so they are read whole."""

    _state: dict[str, torch.Tensor] | None = None

    def _map(self) -> dict[str, torch.Tensor]:
        if self._state is None:
            self._state = self._load()
        return self._state

    def _load(self) -> dict[str, torch.Tensor]:
        import torch

        try:
            with self.path.open("rb") as file:
                self.renewable = file.read(2) == b"PK"
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.renewable)
        except pickle.UnpicklingError as error:
            if "Unsupported global" not in str(error) and "Trying to" not in str(error):
                raise broken(self.path, error) from error
            raise CheckpointError(
                f"{self.path} holds Python objects besides tensors, which llmapi never unpickles; convert it to "
                "safetensors where its author is trusted"
            ) from error
        except Exception as error:  # on a damaged file torch.load may raise anything
            raise broken(self.path, error) from error
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise CheckpointError(f"{self.path} is no plain mapping of names to tensors; save just the state_dict()")
        return state

    def _describe(self) -> Iterable[tuple[str, Iterable[int], torch.dtype]]:
        return [(name, tensor.shape, tensor.dtype) for name, tensor in self._map().items()]

    def get(self, name: str) -> torch.Tensor:
        return self._map()[name].detach()

    def close(self) -> None:
        self._state = None
