"""BeamMover: beams go on from others on the GPU, before a step that was launched without knowing from which."""

from __future__ import annotations

import numpy as np
import torch

from llmapi._kernels.beam_reorder_cuda import BEAM_MOVE, move_beams
from llmapi._kernels.gpu import Gpu
from llmapi._runtime.batch import Moves
from llmapi._runtime.transfer import to_device


class BeamMover:
    """Makes the block tables of a step from those of the step before, and copies the blocks that are begun.

    Args:
        gpu: where.
        caches: ``[C]`` int64 addresses of the caches.
        block_size: tokens of a block.
        token_bytes: bytes of a token in a cache.

    Attributes:
        launches: how often it did so.
    """

    def __init__(self, gpu: Gpu, caches: torch.Tensor, block_size: int, token_bytes: int) -> None:
        self._gpu, self._caches = gpu, caches
        self._block_size, self._token_bytes = block_size, token_bytes
        self._searches: list[tuple[int, int, int]] = []
        self._uploaded: torch.Tensor | None = None  # their settings, kept while the searches stay where they are
        self.launches = 0

    def __call__(self, moves: Moves, tables: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Queue it.

        Args:
            moves: the searches.
            tables: ``[B, M]`` int32, changed.
            seq_lens: ``[B]`` int32: tokens of each row, those of the step included.
        """
        if self._uploaded is None or self._searches != moves.searches:
            settings = np.zeros(len(moves.searches), dtype=BEAM_MOVE)
            settings["row"], settings["rows"], settings["slot"] = zip(*moves.searches, strict=True)
            self._uploaded = upload(settings, self._gpu.device)
            self._searches = moves.searches
        move_beams(
            self._gpu, tables, self._caches, moves=self._uploaded, most_rows=max(m[1] for m in moves.searches),
            parents=moves.parents, seq_lens=seq_lens, block_size=self._block_size, token_bytes=self._token_bytes,
        )  # fmt: skip
        self.launches += 1


def upload(settings: np.ndarray[tuple[int], np.dtype[np.void]], device: torch.device) -> torch.Tensor:
    """A table of settings as bytes on the device; the copy is queued."""
    return to_device(torch.from_numpy(settings.view(np.uint8)), device)
