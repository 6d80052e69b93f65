"""Package: the TensorRT that is installed, ``tensorrt_rtx`` or ``tensorrt``, imported when first needed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmapi import _tensorrt
from llmapi.errors import ConfigError

VERSIONS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorrt_rtx": ((1, 4), (2, 0)),
    "tensorrt": ((10, 13), (12, 0)),
}
"""Module to the versions it is known to work with: from the first, to below the second."""

_INSTALL = {
    "tensorrt_rtx": 'pip install "llmapi[tensorrt-rtx]" (tensorrt-rtx-cu13, for RTX and data centre GPUs but Hopper)',
    "tensorrt": 'pip install "llmapi[tensorrt]" (tensorrt-cu13; its libraries come from NVIDIA\'s own package index)',
}


@dataclass(frozen=True)
class Package:
    """An imported TensorRT.

    Attributes:
        name: ``tensorrt_rtx`` or ``tensorrt``.
        version: such as ``1.7.1.116``.
        trt: the module.
    """

    name: str
    version: str
    trt: Any

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds for GPUs that are not there."""
        return self.name == "tensorrt_rtx"

    @property
    def attention(self) -> Literal["native", "plugin"]:
        """How its networks do attention, see :func:`llmapi._tensorrt.attention_of`."""
        return _tensorrt.attention_of(self.name)

    def check_targets(self, targets: Sequence[str]) -> None:
        """Refuse targets of a package that builds for the GPU at hand.

        Args:
            targets: that a plan is to be built for.

        Raises:
            ConfigError: there are some, and this is full TensorRT.
        """
        if targets and not self.is_rtx:
            raise ConfigError(
                f"target={','.join(targets)}: {self.name} builds for the GPU at hand only; leave target out, or install "
                "tensorrt-rtx-cu13"
            )


def installed() -> list[str]:
    """See :func:`llmapi._tensorrt.installed`."""
    return _tensorrt.installed()


def load_package(name: str | None = None) -> Package:
    """Import TensorRT.

    Args:
        name: the module; None takes TensorRT-RTX where it is installed, else TensorRT.

    Raises:
        ConfigError: it is not installed, of another version, or cannot be loaded.
    """
    found = installed() if name is None else [name] if name in installed() else []
    if not found:
        ways = "; or ".join(_INSTALL.values()) if name is None else _INSTALL[name]
        what = "neither tensorrt_rtx nor tensorrt is" if name is None else f"{name} is not"
        raise ConfigError(f"backend='tensorrt' needs TensorRT, and {what} installed: {ways}")
    module_name = found[0]
    try:
        trt = importlib.import_module(module_name)
        version = str(trt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigError(f"{module_name} is installed but cannot be loaded ({error}): {_INSTALL[module_name]}") from error
    check_version(module_name, version)
    return Package(module_name, version, trt)


def check_version(name: str, version: str) -> None:
    """Refuse a version that this llmapi was not made for.

    Args:
        name: of the module.
        version: its version.

    Raises:
        ConfigError: it is too old or too new.
    """
    oldest, newest = VERSIONS[name]
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2])
    if not oldest <= numbers < newest:
        wanted = f"{oldest[0]}.{oldest[1]} to {newest[0] - 1}.x"
        raise ConfigError(f"{name} {version} is installed, and this llmapi works with {wanted}: {_INSTALL[name]}")
