"""Fit: whether a model can fit the GPU, asked of its config.json before any weight is fetched or built."""

from __future__ import annotations

import json
from pathlib import Path

from llmapi.config import EngineConfig, EngineOptions, resolve
from llmapi.errors import ConfigError
from llmapi.models.family import spec_of
from llmapi.models.spec import TransformerSpec

RESERVE = 512 << 20
"""Bytes left free for CUDA graphs and for what libraries allocate behind torch's back."""

_GIB = 2**30


def check_config_file(path: Path, options: EngineOptions) -> None:
    """Refuse a model of which config.json says that it cannot run as asked.

    Args:
        path: config.json; one that cannot be read is left to those who read it next.
        options: how it is to run.

    Raises:
        ConfigError: it cannot, with the numbers and what to change.
        UnsupportedModelError: its architecture is not known.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(data, dict):
        return
    spec = spec_of(data)
    check_fits(spec, resolve(options, spec), options.gpu_memory_utilization)


def check_fits(spec: TransformerSpec, config: EngineConfig, utilization: float) -> None:
    """Refuse a model whose weights and one KV block do not fit the GPU. Other backends take any model.

    Args:
        spec: the model.
        config: limits and types.
        utilization: share of the GPU's memory that may be used.

    Raises:
        ConfigError: with the arithmetic.
    """
    if config.backend != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info()
    complain(spec, config, utilization, free, total, torch.cuda.get_device_name())


def complain(spec: TransformerSpec, config: EngineConfig, utilization: float, free: int, total: int, name: str) -> None:
    """The rule behind :func:`check_fits`, for a GPU with ``free`` of ``total`` bytes.

    Raises:
        ConfigError: it does not fit.
    """
    from llmapi._build.weights import tensor_specs  # imports torch

    weights = sum(s.nbytes for s in tensor_specs(spec, config.dtype))
    block = config.block_size * spec.kv_bytes_per_token(config.kv_dtype_bytes)
    usable = int(total * utilization) - (total - free)
    need = weights + RESERVE + block
    if need <= usable:
        return
    raise ConfigError(
        f"the model does not fit {name}: its weights take {weights / _GIB:.2f} GiB in {config.dtype}, "
        f"{RESERVE / _GIB:.1f} GiB are kept for CUDA graphs, and one KV block of {config.block_size} tokens takes "
        f"{block / _GIB:.3f} GiB: {need / _GIB:.2f} GiB together. "
        f"Of {total / _GIB:.2f} GiB, {(total - free) / _GIB:.2f} are in use and gpu_memory_utilization="
        f"{utilization} allows {max(0, usable) / _GIB:.2f} more. Use a smaller model, end other "
        "programs that use this GPU, or raise gpu_memory_utilization"
    )
