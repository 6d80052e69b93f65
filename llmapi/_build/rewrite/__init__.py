"""Graph rewrites: each is one function ``GraphModule -> GraphModule`` that leaves the outputs as they were."""

from __future__ import annotations

from torch import fx

from llmapi._build.rewrite.add_norm import fuse_add_norm
from llmapi._build.rewrite.sibling_linears import merge_sibling_linears

REWRITES = (merge_sibling_linears, fuse_add_norm)
"""In the order in which they run."""


def rewrite(module: fx.GraphModule) -> fx.GraphModule:
    """Run every rewrite.

    Args:
        module: as :func:`llmapi._build.export.trace` gave it; changed in place.
    """
    for step in REWRITES:
        module = step(module)
    return module


__all__ = ["REWRITES", "fuse_add_norm", "merge_sibling_linears", "rewrite"]
