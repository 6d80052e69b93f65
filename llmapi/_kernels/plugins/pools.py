"""The int64 tensor through which plugins find the KV caches.

A cache that were a tensor of the network could be copied by TensorRT; an address cannot grow into one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

POOL_GUARD = 0x6C6C6D6170694B56
"""First element of the tensor; ``csrc/plugin.cuh`` has it, too. Kernels leave everything else alone without it."""


def pool_addresses(caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """What the plugins' input ``pools`` is bound to.

    Args:
        caches: keys and values of each layer, ``[blocks, block_size, K, D]``, contiguous; they must live as long as an
            engine that was given their addresses runs.

    Returns:
        ``[1 + 2 * layers]`` int64 on the CPU: the guard, then the addresses of keys and values, layer by layer.

    Raises:
        ValueError: a cache that is not contiguous, or does not start at a multiple of 16 bytes.
    """
    addresses = [POOL_GUARD]
    for layer, pair in enumerate(caches):
        for name, cache in zip(("keys", "values"), pair, strict=True):
            if not cache.is_contiguous() or cache.data_ptr() % 16:
                raise ValueError(
                    f"the {name} of layer {layer} have strides {cache.stride()} at address {cache.data_ptr():#x}: "
                    "plugins need contiguous caches that start at multiples of 16 bytes"
                )
            addresses.append(cache.data_ptr())
    return torch.tensor(addresses, dtype=torch.int64)
