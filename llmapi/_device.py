"""The GPU at hand: whether the cuda backend can run, and what it can do. torch is imported at the first question."""

from __future__ import annotations

import functools
import importlib.util

OLDEST_CAPABILITY = (7, 5)
"""Turing: what the kernels need at least."""


HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
"""Head sizes that the attention kernels are made for."""


def cuda_problem() -> str | None:
    """Why the cuda backend cannot run on this machine, with the remedy; None where it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    capability = cuda_capability()
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name()
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, and the kernels need 7.5 (Turing) or newer"
        )
    for module in ("cuda.bindings.nvrtc", "cuda.pathfinder"):
        try:
            missing = importlib.util.find_spec(module) is None
        except ImportError:
            missing = True
        if missing:
            return f'the Python package of {module} is not installed: pip install "llmapi[cuda]"'
    return None


def cuda_visible() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available()


@functools.cache
def cuda_capability() -> tuple[int, int]:
    """Compute capability of the current GPU, such as ``(9, 0)``."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return major, minor
