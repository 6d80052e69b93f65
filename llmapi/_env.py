"""The environment variables llmapi reads: this module is the only reader of ``os.environ``.

| variable | meaning | default |
|---|---|---|
| ``LLMAPI_CACHE_DIR`` | root of the build cache | the user cache folder of the platform |
| ``LLMAPI_CACHE_BYTES`` | size budget of the build cache, in bytes | a fifth of the disk, 50 GB at least |
| ``LLMAPI_CPU_KERNELS`` | ``0`` keeps to torch's operators on the CPU, compiling nothing | ``1`` |
| ``LLMAPI_PROGRESS`` | ``0`` hides every progress bar | ``1`` |
| ``LLMAPI_TENSORRT_GRAPHS`` | ``0`` runs plans of the full TensorRT without CUDA graphs | ``1`` |

``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``HF_ENDPOINT`` are read by ``huggingface_hub``.

Values are read at the time of the call, never at import.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmapi.errors import ConfigError


def cache_dir() -> Path:
    """Root of the build cache: ``LLMAPI_CACHE_DIR``, else the platform's user cache folder."""
    value = os.environ.get("LLMAPI_CACHE_DIR")
    if value:
        return Path(value).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("llmapi"))


def cache_bytes() -> int | None:
    """Size budget of the build cache in bytes from ``LLMAPI_CACHE_BYTES``; None where it is not set."""
    value = os.environ.get("LLMAPI_CACHE_BYTES")
    if not value:
        return None
    if not value.isdigit() or int(value) == 0:
        raise ConfigError(f"LLMAPI_CACHE_BYTES={value!r}: give a positive whole number of bytes, e.g. 50000000000")
    return int(value)


def cpu_kernels() -> bool:
    """Whether CPU kernels may be compiled and loaded (``LLMAPI_CPU_KERNELS``, on unless it is ``0``)."""
    return os.environ.get("LLMAPI_CPU_KERNELS", "1") != "0"


def progress() -> bool:
    """Whether progress bars may be drawn (``LLMAPI_PROGRESS``, on unless it is ``0``)."""
    return os.environ.get("LLMAPI_PROGRESS", "1") != "0"


def tensorrt_graphs() -> bool:
    """Whether full TensorRT's steps may become CUDA graphs (``LLMAPI_TENSORRT_GRAPHS``, on unless it is ``0``)."""
    return os.environ.get("LLMAPI_TENSORRT_GRAPHS", "1") != "0"
