"""BeamCounts: how often each token stands in the beams of searches, on the GPU, for penalties."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmapi._kernels.beam_reorder_cuda import BEAM_TALLY, move_counts
from llmapi._kernels.gpu import Gpu
from llmapi._runtime.beam_ask import Chosen
from llmapi._runtime.beam_moves import upload
from llmapi._runtime.request import Request, Sequence
from llmapi._runtime.token_counts import IN_PROMPT
from llmapi._runtime.transfer import to_device

Search = tuple[list[Sequence], int | None]
"""Its beams, and their first place among what the step before chose, where that is not known on the host yet."""


class BeamCounts:
    """A table for each search with penalties: a row for each beam, entries as of
    :class:`~llmapi._runtime.token_counts.TokenCounts`.

    It is filled where the host knows the beams. Where it does not yet, the table moves as they did on the device.

    Args:
        gpu: where.
        vocab_size: width of a row; ids beyond it are passed over.
    """

    def __init__(self, gpu: Gpu, vocab_size: int) -> None:
        self._gpu, self._vocab = gpu, vocab_size
        self._tables: dict[Request, Tensor] = {}
        self._tallied: list[tuple[int, int, int]] = []
        self._uploaded: Tensor | None = None  # kept while the searches stay where they are

    @property
    def nbytes(self) -> int:
        """GPU memory held."""
        return sum(table.nbytes for table in self._tables.values())

    def bring(self, searches: list[Search], before: Chosen | None) -> list[int]:
        """Make the tables those of the beams' tokens so far.

        Args:
            searches: a search that was chosen for on the device in the step before, and asked for here then, comes with
                its place.
            before: what that step chose.

        Returns:
            The address of each search's table, valid until it ends.
        """
        self._let_go({beams[0].request for beams, _ in searches})
        tallied: list[tuple[int, int, int]] = []
        addresses = []
        for beams, place in searches:
            if place is None:
                self._fill(beams)
            address = self._tables[beams[0].request].data_ptr()
            addresses.append(address)
            if place is not None:
                tallied.append((address, len(beams), place))
        if tallied:
            assert before is not None
            if self._uploaded is None or self._tallied != tallied:
                settings = np.array(tallied, dtype=BEAM_TALLY)
                self._uploaded, self._tallied = upload(settings, self._gpu.device), tallied
            move_counts(
                self._gpu, self._uploaded, most_rows=max(rows for _, rows, _ in tallied), parents=before.parents,
                tokens=before.tokens, vocab_size=self._vocab,
            )  # fmt: skip
        return addresses

    def _let_go(self, staying: set[Request]) -> None:
        """Give back the tables of searches that have ended.

        Args:
            staying: those that are asked for still.
        """
        for request in [r for r in self._tables if r.finished and r not in staying]:
            del self._tables[request]

    def _fill(self, beams: list[Sequence]) -> None:
        """Count a search's tokens anew. Its beams are equally long, and have one prompt."""
        first = beams[0]
        shape = len(beams), self._vocab
        table = self._tables.get(first.request)
        if table is None or table.shape != shape:
            table = torch.empty(shape, dtype=torch.int32, device=self._gpu.device)
            self._tables[first.request] = table
        prompt, known = self._ids([first.token_ids[: first.num_prompt]])
        flags = torch.zeros(1, self._vocab, dtype=torch.int32, device=self._gpu.device)
        flags.scatter_add_(1, prompt, known)
        table.copy_((flags > 0).int() * IN_PROMPT)
        table.scatter_add_(1, *self._ids([beam.output_ids for beam in beams]))

    def _ids(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids as places in a row, and 1 where a place is the id's."""
        device = self._gpu.device
        ids = to_device(torch.tensor(rows, dtype=torch.int64), device)
        return ids.clamp(max=self._vocab - 1), (ids < self._vocab).int()
