"""Which TensorRT is installed, and what keys and values look like to its plans; nothing of it is imported to tell."""

from __future__ import annotations

import importlib.util
from typing import Literal

PACKAGES = ("tensorrt_rtx", "tensorrt")
"""Modules of TensorRT, the preferred one first."""

BLOCK_SIZE = 64
"""Tokens of a block of the paged cache, in plans that have one."""


def installed() -> list[str]:
    """Modules of TensorRT that are installed, the preferred one first."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


def attention_of(package: str) -> Literal["native", "plugin"]:
    """How a package's networks do attention: RTX takes no plugins, and full TensorRT gets the paged cache through them.

    Args:
        package: its module.
    """
    return "native" if package == "tensorrt_rtx" else "plugin"


def builds_paged() -> bool:
    """Whether the plans that are built here have the paged cache."""
    return [attention_of(name) for name in installed()][:1] == ["plugin"]
