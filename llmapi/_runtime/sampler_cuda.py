"""CudaSampler: :class:`~llmapi._runtime.sampler.Sampler` on the GPU, one launch for a batch.

A step's settings go to the GPU in one copy, and only token ids (and the log probabilities asked for) come back, when
they are waited for. What a row's penalties need stays on the GPU: a table of how often each token stands in the
output, to which the kernel adds the token it chooses. So a row with penalties can be sampled again before the host
knows its last token, and a long history costs the host nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmapi._kernels.gpu import Gpu
from llmapi._kernels.sample_cuda import EDIT, MAX_LOGPROBS, ROW, SampleKernels, nucleus_range
from llmapi._runtime.candidates import Candidates
from llmapi._runtime.candidates_cuda import KernelSelect
from llmapi._runtime.draw import _COLDEST
from llmapi._runtime.guide import fill, words
from llmapi._runtime.logit_edits import _completing, _held_back, _penalized
from llmapi._runtime.logprobs import _ranked
from llmapi._runtime.no_choice import failed
from llmapi._runtime.params_memo import ParamsMemo
from llmapi._runtime.request import Sequence
from llmapi._runtime.sampler import Sampled, Sampler, SampleRow, SamplerTokenizer
from llmapi._runtime.scratch import Scratch
from llmapi._runtime.token_counts import TokenCounts
from llmapi._runtime.transfer import to_host
from llmapi.errors import RequestError
from llmapi.outputs import Logprob
from llmapi.sampling import SamplingParams

_HOTTEST = 3e38  # larger temperatures overflow float32, and are no hotter


@dataclass(slots=True)
class _Fixed:
    """What all rows of one request share.

    Attributes:
        row: one of ``ROW`` as bytes, without seed, stream, counter and addresses.
        bias: entries of ``EDIT``.
        served: whether the kernels can do it; else the sampler of the CPU does, on the GPU's tensors.
        penalized: whether the row needs counts.
        words: whether there are bad_words.
        ends: whether min_tokens may mask something.
        guided: whether a grammar says what may come next.
        busy: whether a row must be looked at in every step.
        waits: whether the choice is made of something that the host works out from the tokens before.
    """

    row: bytes
    bias: npt.NDArray[np.void]
    served: bool
    penalized: bool
    words: bool
    ends: bool
    guided: bool
    busy: bool
    waits: bool


@dataclass(slots=True)
class _Batch:
    """The rows of a step, kept for the next one.

    Attributes:
        sequences, draws: by which it is known again.
        fixed: settings by row.
        table: ``[N]`` of ``ROW``; counters, edits and addresses change in each step.
        busy: rows that must be looked at in each step.
        others: rows that the kernels do not serve.
        width: the most log probabilities that a row wants, -1 if none wants any.
    """

    sequences: list[Sequence]
    draws: list[int]
    fixed: list[_Fixed]
    table: npt.NDArray[np.void]
    busy: list[int]
    others: list[int]
    width: int


class CudaSampler(Sampler):
    """Chooses tokens for a batch of rows on the GPU; the same tokens as :class:`Sampler` up to rounding.

    Args:
        gpu: where.
        vocab_size: width of the logits.
        tokenizer: encodes bad_words and gives logprobs their texts; None where there is none.
        max_rows: most rows in a step.
        logits_dtype: float32, bfloat16 or float16.
    """

    def __init__(
        self,
        gpu: Gpu,
        vocab_size: int,
        tokenizer: SamplerTokenizer | None = None,
        *,
        max_rows: int,
        logits_dtype: torch.dtype,
    ) -> None:
        super().__init__(vocab_size, tokenizer)
        self._gpu, self._device = gpu, gpu.device
        self._kernels = SampleKernels(gpu, vocab_size=vocab_size, max_rows=max_rows, logits_dtype=logits_dtype)
        found = KernelSelect(gpu, vocab_size=vocab_size, max_rows=max_rows, logits_dtype=logits_dtype)
        self.candidates = Candidates(vocab_size, self._edits, found, found)
        self._counts = TokenCounts(vocab_size, gpu.device)
        self._scratch = Scratch(vocab_size, gpu.device)  # edited logits
        self._settings = ParamsMemo(self._prepare)
        self._last_ids: Tensor | None = None
        self._batch = self._begin([], [])

    @property
    def workspace_bytes(self) -> int:
        """GPU memory held between steps: 4 bytes per vocabulary entry of each penalized and of each edited row."""
        return self._counts.nbytes + self._scratch.nbytes

    def overlaps(self, row: SampleRow) -> bool:
        """Whether the next step may be launched before this row's token is known to the host: its id stays here."""
        return row.count == 1

    def waits(self, row: SampleRow) -> bool:
        """Whether the host must know all tokens before this row's when the choice begins."""
        return row.count > 1 or self._settings(row.sequence.request.params).waits

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Rows[SampleRow]) -> list[Sampled]:
        """See :class:`Sampler`; logits are on the GPU."""
        return self.start(logits, rows).result()

    @torch.no_grad()
    def start(self, logits: Tensor, rows: Rows[SampleRow]) -> PendingTokens:  # type: ignore[override]
        """Launch the choice and return.

        Rows that the kernels do not serve (logits_processors, return_logits, ``count`` above 1, logprobs beyond 512)
        are done before this returns.

        Args:
            logits: ``[N, V]`` on the GPU; may change once later work of the stream runs.
            rows: ``N`` of them. A sequence may end in a reference to a row of the batch before (a negative number)
                instead of its last token.

        Raises:
            ValueError: the shape of the logits is not ``[len(rows), vocab_size]``.
        """
        if tuple(logits.shape) != (len(rows), self._vocab):
            raise ValueError(
                f"logits have the shape {list(logits.shape)}, but {len(rows)} rows of {self._vocab} were expected"
            )
        table, edits, guided, edited = self._pack(rows)
        n = len(rows)
        ids = torch.empty(2, n, dtype=torch.int32, device=self._device)  # ids, then reasons of failure
        masks_at, mask_bytes = table.nbytes + edits.nbytes, 4 * words(self._vocab)
        size = masks_at + len(guided) * mask_bytes
        staging = torch.empty(size, dtype=torch.uint8, pin_memory=ids.is_cuda)
        uploaded = torch.empty(size, dtype=torch.uint8, device=self._device)
        if guided:
            table["mask"][guided] = uploaded.data_ptr() + masks_at + np.arange(len(guided)) * mask_bytes
        packed = staging.numpy()
        packed[: table.nbytes] = table.view(np.uint8)
        packed[table.nbytes : masks_at] = edits.view(np.uint8)
        if guided:
            masks = packed[masks_at:].view(np.int32).reshape(len(guided), -1)
            fill([g for i in guided if (g := rows[i].sequence.guide) is not None], masks)
        uploaded.copy_(staging, non_blocking=True)
        listed = uploaded[table.nbytes : masks_at] if len(edits) else None
        chosen = ids[0]
        self._kernels(logits, uploaded, chosen, edited=edited, edits=listed, reasons=ids[1])
        pending = PendingTokens(self, rows, chosen, table["counter"].copy())
        width = min(self._batch.width, self._vocab)
        if width >= 0:
            values = torch.empty(n, 1 + width, dtype=torch.float32, device=self._device)
            tokens = torch.empty(n, 1 + width, dtype=torch.int32, device=self._device)
            self._kernels.logprobs(logits, uploaded, chosen, values, tokens)
            pending.copy_logprobs(values, tokens)
        pending.copy_ids(ids)
        self._last_ids = chosen
        others = self._batch.others
        if others:
            at = torch.tensor(others, device=self._device)
            sampled = super().__call__(logits[at], [rows[i] for i in others])
            pending.ready = dict(zip(others, sampled, strict=True))
            chosen[at] = torch.tensor(
                [s.token_ids[0] if s.token_ids else -1 for s in sampled], dtype=torch.int32, device=self._device
            )
        return pending

    def _pack(self, rows: Rows[SampleRow]) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void], list[int], bool]:
        """The batch's settings, ``[N]`` of ``ROW``, its edits, ``[M]`` of ``EDIT``, the rows that follow a grammar, and
        whether any row is edited; valid until the next call.
        """
        sequences, draws = [row.sequence for row in rows], [row.count for row in rows]
        if self._batch.sequences != sequences or self._batch.draws != draws:
            self._batch = self._begin(sequences, draws)
        table, fixed = self._batch.table, self._batch.fixed
        table["counter"] = [len(s.token_ids) - s.num_prompt for s in sequences]
        edits: list[npt.NDArray[np.void]] = []
        length, edited = 0, []
        penalized: list[int] = []
        guided: list[int] = []
        for i in self._batch.busy:
            sequence, own = sequences[i], fixed[i]
            banned = self._banned(sequence, own) if own.ends or own.words else []
            if own.penalized:
                penalized.append(i)
            if own.guided and sequence.guide is not None:
                guided.append(i)
            table["edits"][i] = table["bans"][i] = table["edits_end"][i] = table["edited"][i] = 0
            if banned or len(own.bias):
                bans = np.zeros(len(banned), dtype=EDIT)
                bans["id"] = banned
                edits += [own.bias, bans]
                start = length + len(own.bias)
                table["edits"][i], table["bans"][i], table["edits_end"][i] = length, start, start + len(banned)
                length = start + len(banned)
            elif not own.penalized and not own.guided:
                continue
            edited.append(i)
        if penalized:
            table["counts"][penalized] = self._counts.addresses([sequences[i] for i in penalized], self._last_ids)
        if edited:
            table["edited"][edited] = self._scratch.rows(len(edited))
        return table, np.concatenate(edits) if edits else np.zeros(0, dtype=EDIT), guided, bool(edited)

    def _begin(self, sequences: list[Sequence], draws: list[int]) -> _Batch:
        """What stays while the same sequences are sampled step after step."""
        fixed = [self._settings(s.request.params) for s in sequences]
        table = np.zeros(len(sequences), dtype=ROW)
        table.view(np.uint8)[:] = np.frombuffer(bytearray().join(own.row for own in fixed), dtype=np.uint8)
        table["seed"] = [s.request.seed for s in sequences]
        table["stream"] = [s.index for s in sequences]
        table["used"] *= np.array(draws, dtype=np.int32) == 1
        busy = [i for i, own in enumerate(fixed) if own.busy and draws[i] == 1]
        others = [i for i, own in enumerate(fixed) if not own.served or draws[i] > 1]
        width = int(table["logprobs"].max(initial=-1))
        return _Batch(sequences, draws, fixed, table, busy, others, width)

    def _banned(self, sequence: Sequence, own: _Fixed) -> list[int]:
        """Ids that may not come next; ids beyond the vocabulary are left out."""
        banned = set(sequence.request.stop_token_ids) if _held_back(sequence) else set()
        if own.words:
            banned.update(_completing(self._edits._plans(sequence.request.params), sequence))
        return [t for t in banned if t < self._vocab]

    def _prepare(self, p: SamplingParams) -> _Fixed:
        plan = self._edits._plans(p)
        served = not p.logits_processors and not p.returns_generation_logits and plan.error is None
        served = served and (p.logprobs is None or p.logprobs <= MAX_LOGPROBS)
        penalized = _penalized(p)
        row = np.zeros((), dtype=ROW)
        row["used"] = served
        row["temperature"] = 0.0 if p.greedy else min(max(p.temperature, _COLDEST), _HOTTEST)
        row["top_k"] = p.top_k if 0 < p.top_k < self._vocab else 0
        row["top_p"] = max(1, int(p.top_p * 2**53))
        row["range"] = nucleus_range(p.top_p, self._vocab)
        row["least"] = -int(-p.min_p * 2**44 // 1)
        row["repetition"], row["presence"] = p.repetition_penalty, p.presence_penalty
        row["frequency"], row["penalized"] = p.frequency_penalty, penalized
        row["logprobs"] = -1 if p.kept_logprobs is None else p.kept_logprobs
        if not served:
            row["logprobs"] = -1
        bias = np.zeros(0 if plan.bias is None else len(plan.bias[0]), dtype=EDIT)
        if plan.bias is not None:
            bias["id"], bias["value"] = plan.bias[0].numpy(), plan.bias[1].numpy()
        listed, ends, guided = bool(plan.bad_words), p.min_tokens > 0, p.guided_decoding is not None
        busy = served and bool(penalized or listed or ends or guided or len(bias))
        waits = not served or plan.longest > 1 or guided
        return _Fixed(row.tobytes(), bias, served, penalized, listed, ends, guided, busy, waits)

    def _texts(self, params: SamplingParams) -> SamplerTokenizer | None:
        return self._tokenizer if params.detokenize else None


class PendingTokens:
    """A batch's tokens on their way from the GPU.

    Attributes:
        ids: ``[N]`` int32 on the GPU; -1 where a row failed.
        ready: results of rows that needed the host, by place in the batch.
    """

    def __init__(
        self, sampler: CudaSampler, rows: Rows[SampleRow], ids: Tensor, positions: npt.NDArray[np.uint64]
    ) -> None:
        self._sampler = sampler
        self._rows = list(rows)
        self._positions = positions
        self.ids = ids
        self.ready: dict[int, Sampled] = {}
        self._arrived = sampler._gpu.event()
        self._copies: list[Tensor] = []
        self._host = torch.empty(0, dtype=torch.int32)

    def copy_logprobs(self, values: Tensor, tokens: Tensor) -> None:
        """Begin to copy log probabilities to the host."""
        self._copies = [to_host(values), to_host(tokens)]

    def copy_ids(self, ids: Tensor) -> None:
        """Begin to copy ids and reasons to the host; the last copy of the batch."""
        self._host = to_host(ids)
        self._arrived.record()

    def result(self) -> list[Sampled]:
        """Wait, and give the tokens of each row."""
        self._arrived.synchronize()
        ids, reasons = self._host.tolist()
        if not self._copies and not self.ready and min(ids, default=0) >= 0:
            return [Sampled([token]) for token in ids]
        values, tokens = (copy.tolist() for copy in self._copies) if self._copies else ((), ())
        out: list[Sampled] = []
        for i, row in enumerate(self._rows):
            if i in self.ready:
                out.append(self.ready[i])
            elif ids[i] < 0:
                out.append(Sampled([], error=self._error(row.sequence, int(self._positions[i]), reasons[i])))
            else:
                found = Sampled([ids[i]])
                if row.sequence.request.params.kept_logprobs is not None:
                    found.logprobs = [self._logprobs(row.sequence.request.params, ids[i], values[i], tokens[i])]
                out.append(found)
        return out

    def _logprobs(
        self, params: SamplingParams, token: int, values: list[float], tokens: list[int]
    ) -> dict[int, Logprob]:
        tokenizer = self._sampler._texts(params)
        decode = None if tokenizer is None else tokenizer.token_text
        entry = {token: Logprob(values[0], tokens[0], decode(token) if decode else None)}
        k = min(params.logprobs or 0, self._sampler._vocab)
        for other, logprob in _ranked(tokens[1 : 1 + k], values[1 : 1 + k], decode).items():
            entry.setdefault(other, logprob)
        return entry

    def _error(self, sequence: Sequence, position: int, reason: int) -> RequestError:
        """The error of :class:`Sampler` for a row like this one."""
        start = sequence.num_prompt
        then = Sequence(sequence.request, sequence.index, [*sequence.token_ids[:start], *[0] * position], start)
        return failed(reason, self._sampler._vocab, then)
