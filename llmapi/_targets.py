"""Target: the GPU architectures a plan is built for, and what they lack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmapi.errors import ConfigError, unknown_name

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX can be asked to build for; Hopper (sm90) is not among them."""

_FIRST = {"float32": 80, "bfloat16": 80, "float8": 89}
"""The first architectures that TensorRT-RTX multiplies matrices in these types for; it has float16 for all."""


def parse_targets(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of architectures, sorted by number and each once.

    Args:
        value: ``"sm89"``, ``"sm89,sm120"``, a list of names, or None for a portable plan.

    Raises:
        ConfigError: a name is not known, or of a GPU that has no such plans.

    >>> parse_targets("SM120, sm89")
    ('sm89', 'sm120')
    """
    if value is None:
        return ()
    given = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    names = {name.strip().lower().replace("sm_", "sm") if isinstance(name, str) else name for name in given}
    for name in names:
        if name in ("sm90", "sm100", "sm103"):
            raise ConfigError(
                f"target {name}: TensorRT-RTX has no plans for this GPU, only for {', '.join(RTX_TARGETS)}; run the "
                "model there with backend='cuda'"
            )
        if name not in RTX_TARGETS:
            raise ConfigError(unknown_name("target", name, RTX_TARGETS))
    return tuple(sorted(names, key=number))


def number(target: str) -> int:
    """``89`` of ``"sm89"``."""
    return int(target.removeprefix("sm"))


def lacking(targets: Sequence[str], dtype: str) -> str | None:
    """Why some of the targets cannot compute in a type, and what to do; None where all can.

    Args:
        targets: as :func:`parse_targets` gave them.
        dtype: float32, float16, bfloat16 or float8.
    """
    first = _FIRST.get(dtype, 0)
    without = [t for t in targets if number(t) < first]
    if not without:
        return None
    names = ", ".join(without)
    return f"TensorRT-RTX does not compute in {dtype} on {names}, but on sm{first} and newer: use dtype='float16'"


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Tell a builder's configuration what to build for; for a portable plan it is told nothing.

    Args:
        trt: the module ``tensorrt_rtx``.
        config: an ``IBuilderConfig``.
        targets: as :func:`parse_targets` gave them.
    """
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
