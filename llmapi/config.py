"""Configs: frozen, resolved once. ``"auto"`` goes in (EngineOptions), a concrete object comes out (EngineConfig)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from llmapi import _device, _tensorrt
from llmapi._targets import lacking, parse_targets
from llmapi.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from llmapi.models.spec import TransformerSpec

BACKENDS = ("cpu", "cuda", "tensorrt")
DTYPES = ("float32", "float16", "bfloat16")
_CPU_DTYPES = ("float32", "bfloat16")
_DEFAULT_BATCH = {"cpu": 64, "cuda": 256, "tensorrt": 16}
_DEFAULT_TOKENS = {"cpu": 512, "cuda": 8192, "tensorrt": 2048}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK_SIZES = (8, 16, 32, 64, 128)

log = logging.getLogger("llmapi")

Backend = Literal["cpu", "cuda", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class KvCacheConfig:
    """Memory of keys and values.

    Args:
        block_size: tokens a block: 8, 16, 32, 64 or 128; ``"auto"`` is 16 on the CPU and 64 on a GPU. On
            the tensorrt backend it cannot be chosen: a block is a whole sequence with TensorRT-RTX, and 64 tokens with
            the full TensorRT.
        max_tokens: size of the cache in tokens over all sequences; None sizes it by memory.
        memory_bytes: size of the cache in bytes; None sizes it from what is free.
        memory_fraction: share of the free memory to take where neither of the above is given, in (0, 1]. None is a
            quarter of the free host memory on the CPU, and ``gpu_memory_utilization`` on a GPU.
        dtype: element type; ``"auto"`` is the model's.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> KvCacheConfig(max_tokens=4096).block_size
        'auto'
    """

    block_size: int | Literal["auto"] = "auto"
    max_tokens: int | None = None
    memory_bytes: int | None = None
    memory_fraction: float | None = None
    dtype: str = "auto"

    def __new__(cls, *args: Any, **kwargs: Any) -> KvCacheConfig:
        valid = [f.name for f in fields(cls)]
        if args:
            raise ConfigError(f"KvCacheConfig takes keyword arguments only, e.g. max_tokens=4096; got {args[0]!r}")
        for name in kwargs:
            if name not in valid:
                raise ConfigError(unknown_name("KvCacheConfig argument", name, valid))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.block_size != "auto" and (type(self.block_size) is not int or self.block_size not in _BLOCK_SIZES):
            raise ConfigError(f"block_size={self.block_size!r}: give one of {', '.join(map(str, _BLOCK_SIZES))}")
        for name in ("max_tokens", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: give a positive whole number or None")
        if self.max_tokens is not None and self.memory_bytes is not None:
            raise ConfigError("max_tokens and memory_bytes both size the KV cache: give one of them")
        if self.memory_fraction is not None:
            _check_share("memory_fraction", self.memory_fraction)
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(unknown_name("KV cache dtype", self.dtype, ("auto", *DTYPES)))

    @classmethod
    def of(cls, value: KvCacheConfig | dict[str, Any] | None) -> KvCacheConfig:
        """From a config, a dict of its arguments, or None for the defaults."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"kv_cache_config={value!r}: give a KvCacheConfig or a dict of its arguments")
        return cls(**{str(name): given for name, given in value.items()})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the user asked for; None and ``"auto"`` are filled in by :func:`resolve`."""

    backend: str = "auto"
    dtype: str = "auto"
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    target: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise ConfigError(unknown_name("backend", self.backend, ("auto", *BACKENDS)))
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(unknown_name("dtype", self.dtype, ("auto", *DTYPES)))
        for name in ("max_seq_len", "max_batch_size", "max_num_tokens", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is None and name[0] == "m":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: give a positive whole number" + " or None" * (name[0] == "m"))
        _check_share("gpu_memory_utilization", self.gpu_memory_utilization)
        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(f"enable_prefix_caching={self.enable_prefix_caching!r}: give True or False")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine, resolved.

    Attributes:
        backend, dtype, kv_dtype: where it runs and in which types.
        max_seq_len: longest sequence in tokens, prompt and output together.
        max_batch_size: most sequences in one step.
        max_num_tokens: most tokens in one step.
        block_size: tokens a KV block.
        enable_prefix_caching: whether equal prompt beginnings share KV blocks.
        kv_cache: how the KV memory is sized at load.
        targets: GPU architectures that a TensorRT plan is built for; none for a portable one, and for other backends.
    """

    backend: Backend
    dtype: str
    kv_dtype: str
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    block_size: int
    enable_prefix_caching: bool
    kv_cache: KvCacheConfig
    targets: tuple[str, ...] = ()

    @property
    def kv_dtype_bytes(self) -> int:
        """Bytes of one element of the KV cache."""
        return _BYTES[self.kv_dtype]

    def shape_parts(self) -> dict[str, int | str]:
        """What of this shapes the compiled step, by name: parts of the engine's key."""
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "max_seq_len": self.max_seq_len,
            "max_batch_size": self.max_batch_size,
            "max_num_tokens": self.max_num_tokens,
            "block_size": self.block_size,
        }


def resolve(options: EngineOptions, spec: TransformerSpec) -> EngineConfig:
    """Fill in what was left to us.

    Args:
        options: what the user asked for.
        spec: the model.

    Raises:
        ConfigError: the model or the backend cannot do what was asked.
    """
    backend = _backend(options.backend)
    if options.target is not None and backend != "tensorrt":
        raise ConfigError(f"target={options.target!r} with backend={backend!r}: only backend='tensorrt' takes a target")
    targets = _targets(options.target)
    if backend == "cuda" and spec.head_dim not in _device.HEAD_SIZES:
        sizes = ", ".join(map(str, _device.HEAD_SIZES))
        why = f"this model's heads have {spec.head_dim} channels, and the cuda backend's attention takes {sizes}"
        if options.backend != "auto":
            raise ConfigError(f"backend='cuda' cannot run this model: {why}; use backend='cpu'")
        log.info("running on the cpu backend: %s", why)
        backend = "cpu"
    if options.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size={options.tensor_parallel_size}: the {backend} backend runs on one device; "
            "leave tensor_parallel_size at 1"
        )
    dtype = _dtype(options.dtype, backend, spec, targets)
    limit = spec.max_position_embeddings
    max_seq_len = options.max_seq_len or limit
    if max_seq_len > limit:
        raise ConfigError(
            f"max_seq_len={max_seq_len} is more than the {limit} positions that this model was made for: give at most "
            f"{limit}, or none for {limit}"
        )
    max_batch_size = options.max_batch_size or _DEFAULT_BATCH[backend]
    max_num_tokens = options.max_num_tokens or max(_DEFAULT_TOKENS[backend], max_batch_size)
    if max_num_tokens < max_batch_size:
        raise ConfigError(
            f"max_num_tokens={max_num_tokens} is less than max_batch_size={max_batch_size}: a step must have room "
            f"for one token of each sequence. Raise max_num_tokens to {max_batch_size}, or lower max_batch_size"
        )
    kv_dtype = dtype if options.kv_cache.dtype == "auto" else options.kv_cache.dtype
    if kv_dtype != dtype:
        raise ConfigError(
            f"KV cache dtype={kv_dtype!r} with dtype={dtype!r}: the {backend} backend keeps keys and values in the "
            "model's type; leave it at 'auto'"
        )
    block_size = options.kv_cache.block_size
    if backend == "tensorrt":
        block_size = _tensorrt_block_size(block_size, max_seq_len, spec)
    elif block_size == "auto":
        block_size = 64 if backend == "cuda" else 16
    return EngineConfig(
        backend=backend,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        block_size=block_size,
        enable_prefix_caching=options.enable_prefix_caching,
        kv_cache=options.kv_cache,
        targets=targets,
    )


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: give a number in (0, 1]")


def _backend(asked: str) -> Backend:
    """The backend to take; "auto" is a GPU where there is one that can be used."""
    if asked == "cpu":
        return "cpu"
    if asked == "tensorrt":  # builds without a GPU, so whether there is one is asked at load
        return "tensorrt"
    problem = _device.cuda_problem()
    if problem is None:
        return "cuda"
    if asked == "auto":
        return "cpu"
    raise ConfigError(f"backend='cuda' cannot run here: {problem}; or use backend='cpu'")


def _tensorrt_block_size(asked: int | Literal["auto"], max_seq_len: int, spec: TransformerSpec) -> int:
    """Tokens a block of the plans that are built here: a whole sequence in the linear cache, else what plugins take."""
    if not _tensorrt.builds_paged():
        if asked != "auto":
            raise ConfigError(f"block_size={asked}: the tensorrt backend keeps a sequence in one block; leave it out")
        return max_seq_len
    if asked not in ("auto", _tensorrt.BLOCK_SIZE):
        raise ConfigError(
            f"block_size={asked}: plans of the full TensorRT have blocks of {_tensorrt.BLOCK_SIZE} tokens; leave it out"
        )
    if spec.head_dim not in _device.HEAD_SIZES:
        raise ConfigError(
            f"backend='tensorrt' cannot run this model: its heads have {spec.head_dim} channels, and llmapi's plugins "
            f"for the full TensorRT take {', '.join(map(str, _device.HEAD_SIZES))}; use backend='cpu', or install "
            "tensorrt-rtx-cu13"
        )
    return _tensorrt.BLOCK_SIZE


def _targets(asked: str | Sequence[str] | None) -> tuple[str, ...]:
    if asked is None:
        return ()
    return parse_targets(asked)


def _dtype(asked: str, backend: Backend, spec: TransformerSpec, targets: Sequence[str]) -> str:
    """The type of weights and activations; on a GPU, "auto" is the checkpoint's own if that has 16 bits."""
    if backend == "tensorrt":
        return _tensorrt_dtype(asked, spec, targets)
    if backend == "cpu":
        if asked not in ("auto", *_CPU_DTYPES):
            raise ConfigError(f"dtype={asked!r} does not run on the cpu backend: use {' or '.join(_CPU_DTYPES)}")
        return "float32" if asked == "auto" else asked
    return _gpu_dtype(asked, spec, has_bfloat16=_device.cuda_capability() >= (8, 0))


def _gpu_dtype(asked: str, spec: TransformerSpec, *, has_bfloat16: bool) -> str:
    if asked == "auto":
        asked = "float16" if spec.dtype == "float16" else "bfloat16"
        return asked if has_bfloat16 else "float16"
    if asked == "bfloat16" and not has_bfloat16:
        raise ConfigError("dtype='bfloat16' needs a GPU of compute capability 8.0 (Ampere) or newer: use 'float16'")
    return asked


def _tensorrt_dtype(asked: str, spec: TransformerSpec, targets: Sequence[str]) -> str:
    """A type that every target computes in; without targets, that the GPU at hand does, where there is one."""
    if _tensorrt.builds_paged():  # for the GPU at hand alone, with kernels of our own
        return _gpu_dtype(asked, spec, has_bfloat16=not _device.cuda_visible() or _device.cuda_capability() >= (8, 0))
    if not targets and _device.cuda_visible():
        major, minor = _device.cuda_capability()
        targets = (f"sm{major}{minor}",)
    if asked == "auto":
        return "float16" if spec.dtype == "float16" or lacking(targets, "bfloat16") else "bfloat16"
    if why := lacking(targets, asked):
        raise ConfigError(why)
    return asked
