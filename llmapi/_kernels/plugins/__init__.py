"""Plugins of full TensorRT around the project's own CUDA sources: what its native layers cannot do over a paged cache.

Importing this imports no ``tensorrt``; a plugin is made known to it when a network first gets one.
docs/kernels/plugins.md tells how a plugin's kernel is called and what it must keep to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from llmapi._kernels.nvrtc import Unit, source_text_digest, version
from llmapi._kernels.plugins import add_rms_norm, paged_attention, rotary_kv_write
from llmapi._kernels.plugins.add_rms_norm import add_add_rms_norm
from llmapi._kernels.plugins.paged_attention import add_paged_attention
from llmapi._kernels.plugins.plugin import Launch, Plugin
from llmapi._kernels.plugins.pools import pool_addresses
from llmapi._kernels.plugins.rotary_kv_write import add_rotary_kv_write

PLUGINS: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        rotary_kv_write.ROTARY_KV_WRITE,
        rotary_kv_write.KV_WRITE,
        paged_attention.PAGED_ATTENTION,
        paged_attention.PAGED_ATTENTION_BIASED,
        paged_attention.PAGED_PARTS,
        paged_attention.PAGED_PARTS_BIASED,
        paged_attention.JOIN_PARTS,
        paged_attention.JOIN_PARTS_SINKS,
        add_rms_norm.ADD_RMS_NORM,
    )
}
"""Every plugin by its name."""


def units(dtype: str) -> list[Unit]:
    """Specializations that together exercise every path of the sources.

    Args:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """
    return [*rotary_kv_write.units(dtype), *paged_attention.units(dtype), *add_rms_norm.units(dtype)]


def key_parts() -> Mapping[str, str]:
    """What shapes the kernels that a plan carries, by name, beside the networks that use them.

    Raises:
        BuildError: there is no NVRTC.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\0{len(path.read_bytes())}\0".encode() + path.read_bytes())
    for source in sorted({unit.source for unit in units("float32")}):
        digest.update(source_text_digest(source).encode())
    return {"plugins": digest.hexdigest(), "nvrtc": version()}


__all__ = [
    "PLUGINS",
    "Launch",
    "Plugin",
    "add_add_rms_norm",
    "add_paged_attention",
    "add_rotary_kv_write",
    "key_parts",
    "pool_addresses",
    "units",
]
