"""How a skinny product is laid out on a GPU: variants of ``csrc/skinny_linear*.cu``, tiles, stages, shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of rows that there is code for; fewer rows take the next."""

GATES = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
"""``LLM_GATE`` by name of the activation."""

SCALES, WRITES = 1, 2
"""``LLM_NORM``: which part of an RMSNorm between two products one of them does."""

_MOST_STAGES = 32


def bucket_of(rows: int) -> int:
    """The number of :data:`BUCKETS` whose code takes so many rows."""
    return next(bucket for bucket in BUCKETS if rows <= bucket)


class Variant(NamedTuple):
    """A configuration of the kernel. :attr:`code` is the number that tuning tables keep.

    Attributes:
        cluster: blocks that share a tile, each a part of K, 1 or 2, with bulk copies (compute capability 9.0); 0 is
            the kernel that copies with ``cp.async``, which runs on any GPU.
        boxes: depth of a stage in 64 columns.
        coarse: 1 for tiles of a multiple of 16 rows, where 8 would do.
    """

    cluster: int
    boxes: int
    coarse: int = 0

    @property
    def code(self) -> int:
        """Decimal digits ``coarse cluster boxes``.

        >>> Variant(2, 4).code, Variant(1, 2, 1).code
        (24, 112)
        """
        return self.coarse * 100 + self.cluster * 10 + self.boxes

    @classmethod
    def of(cls, code: int) -> Variant:
        """From :attr:`code`.

        >>> Variant.of(112)
        Variant(cluster=1, boxes=2, coarse=1)
        """
        return cls(code // 10 % 10, code % 10, code // 100)


@dataclass(frozen=True)
class Layout:
    """How a product is laid out on a GPU.

    Attributes:
        variant: of which this follows.
        bucket: rows of x that there is code for.
        tile_rows: weight rows of a tile.
        tiles: of the weight.
        blocks: of the grid.
        stages: of the ring in shared memory.
        shared: bytes of dynamic shared memory, alignment included.
        norm: :data:`SCALES` its sums, as a norm of x asks for; :data:`WRITES` what such a product needs; or 0.
    """

    variant: Variant
    bucket: int
    tile_rows: int
    tiles: int
    blocks: int
    stages: int
    shared: int
    norm: int = 0

    @classmethod
    def of(
        cls, variant: Variant, rows: int, n: int, k: int, *, sms: int, shared_memory: int, norm: int = 0
    ) -> Layout | None:
        """None where the variant does not go with the shape or the GPU.

        Args:
            variant: the configuration.
            rows: of x.
            n, k: rows and columns of the weight.
            sms: multiprocessors.
            shared_memory: bytes that a block may have.
            norm: see :attr:`norm`; with bulk copies only.
        """
        bucket, units = bucket_of(rows), -(-k // (64 * variant.boxes))
        if not variant.cluster:
            if norm:
                return None
            stage = variant.boxes * (64 + bucket) * 128
            half = (shared_memory - 1024) // 2  # room for a second block
            stages = max(2, min(8, (half - 2048) // stage))
            tiles = -(-n // 64)
            blocks = max(1, min(2 * sms, tiles * units // 2))
            return cls(variant, bucket, 64, tiles, blocks, stages, stages * stage + 1024)
        teams = sms // variant.cluster
        turns = -(-n // (teams * 256))
        if variant.cluster > 1 and (turns > 1 or units < variant.cluster):
            return None
        tile_rows = -(-n // (teams * turns * 8)) * 8
        if variant.coarse:
            if tile_rows % 16 == 0 or tile_rows < 64:
                return None  # the same as the fine one, or many more blocks idle
            tile_rows += 8
        tiles, subtiles = -(-n // tile_rows), -(-tile_rows // 64)
        blocks_of_sums = subtiles * bucket // 8
        parts = -(-blocks_of_sums // variant.cluster) * variant.cluster * 2048 if variant.cluster > 1 else 0
        of_rows = (0, 1, subtiles * 4)[norm] * bucket * 4
        # What is read past a tile; sums from other blocks; scales or squares.
        rest = (subtiles * 64 - tile_rows) * 128 + parts + of_rows + 1024
        stage = variant.boxes * (tile_rows + bucket) * 128
        stages = min(_MOST_STAGES, (shared_memory - 1024 - rest) // stage)
        if stages < 2:
            return None
        blocks = min(tiles, teams) * variant.cluster
        # At least half of the memory, so that one multiprocessor never gets two blocks and another none.
        shared = max(stages * stage + rest, shared_memory // 2)
        return cls(variant, bucket, tile_rows, tiles, blocks, stages, shared, norm)

    @property
    def threads(self) -> int:
        """Of a block."""
        if not self.variant.cluster:
            return 128
        return -(-self.tile_rows // 64) * 128 + (64 if self.norm == SCALES else 32)

    def unit(self, dtype: str, gate: int) -> Unit:
        """What to compile.

        Args:
            dtype: ``"float16"`` or ``"bfloat16"``.
            gate: a value of :data:`GATES`.
        """
        common = {"LLM_ROWS": self.bucket, "LLM_BOXES": self.variant.boxes, "LLM_GATE": gate}
        if not self.variant.cluster:
            return Unit.of("skinny_linear_copy.cu", LLM_DTYPE=DTYPE_MACRO[dtype], **common, LLM_STAGES=self.stages)
        subtiles = -(-self.tile_rows // 64)
        own = {"LLM_CLUSTER": self.variant.cluster, "LLM_SUBTILES": subtiles, "LLM_NORM": self.norm}
        return Unit.of("skinny_linear.cu", LLM_DTYPE=DTYPE_MACRO[dtype], **common, **own)
