"""Context attention on a GPU against its reference: ragged prompts, prefixes in the cache, every variant."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llmapi._kernels.context_attention_cuda import ContextAttention
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.op import relative_error
from llmapi._kernels.paged_attention import PAGED_ATTENTION, paged_attention
from llmapi.errors import BuildError

pytestmark = pytest.mark.gpu

MAX_TOKENS, MAX_BATCH = 4096, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 77},
    "narrow": {"window": 3},
    "softcap": {"softcap": 20.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 150, "softcap": 15.0, "alibi": True, "sinks": True},
}


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no NVIDIA GPU that torch can use")
    return Gpu(torch.device("cuda", 0))


@dataclass
class Step:
    """Sequences as (new tokens, all tokens); the first ``decoding`` of them decode."""

    lengths: list[tuple[int, int]]
    decoding: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    seed: int
    padding: int = 3
    """Rows and sequences of no meaning at the end, as a graph's batch has."""
    idle_rows: int = 0
    """More rows of no meaning."""
    device: str = "cuda"

    def __post_init__(self) -> None:
        generator = torch.Generator(device=self.device).manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

        needed = [-(-length // self.block_size) for _, length in self.lengths]
        blocks = sum(needed) + 2
        order = torch.randperm(blocks, generator=generator, device=self.device).to(torch.int32)
        batch = len(self.lengths) + self.padding
        # Table entries past a sequence's end lead to a block of NaN, and so do the rest of its last block's tokens.
        self.tables = torch.full((batch, max(needed) + 5), int(order[-1]), dtype=torch.int32, device=self.device)
        row = 3 * self.kv_heads * self.head_dim
        self.k, self.v = (normal(blocks, self.block_size, self.kv_heads, self.head_dim) for _ in range(2))
        self.k[int(order[-1])], self.v[int(order[-1])] = float("nan"), float("nan")
        at = 0
        for i, ((_, length), count) in enumerate(zip(self.lengths, needed, strict=True)):
            self.tables[i, :count] = order[at : at + count]
            rest = length % self.block_size
            if rest:
                self.k[int(order[at + count - 1]), rest:] = float("nan")
                self.v[int(order[at + count - 1]), rest:] = float("nan")
            at += count
        starts = [0]
        for new, _ in self.lengths:
            starts.append(starts[-1] + new)
        self.rows, self.first = starts[-1], starts[self.decoding]
        self.starts = torch.tensor(starts + [starts[-1]] * self.padding, dtype=torch.int32, device=self.device)
        self.totals = torch.tensor(
            [n for _, n in self.lengths] + [0] * self.padding, dtype=torch.int32, device=self.device
        )
        self.counts = torch.tensor([self.decoding, len(self.lengths)], dtype=torch.int32, device=self.device)
        packed = normal(self.rows + self.padding + self.idle_rows, self.heads * self.head_dim + row)
        self.q = packed[:, : self.heads * self.head_dim].view(-1, self.heads, self.head_dim)
        self.slopes = torch.rand(self.heads, generator=generator, device=self.device)
        self.sink_logits = torch.randn(self.heads, generator=generator, device=self.device)

    def attention(self, gpu: Gpu, portable: bool) -> ContextAttention:
        return ContextAttention(
            gpu,
            dtype=self.dtype,
            kv_dtype=self.dtype,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            max_num_tokens=MAX_TOKENS,
            max_batch_size=MAX_BATCH,
            max_seq_len=1 << 17,
            portable=portable,
        )

    def options(self, window: int = 0, softcap: float = 0.0, alibi: bool = False, sinks: bool = False) -> list[Any]:
        scale = self.head_dim**-0.5 * 1.3
        return [scale, window, softcap, self.slopes if alibi else None, self.sink_logits if sinks else None]

    def run(self, attention: ContextAttention, options: list[Any], planned: bool = False) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"), dtype=self.dtype, device=self.device)
        names = ("scale", "window", "softcap", "alibi_slopes", "sinks")
        step = (self.tables, self.totals, self.starts, self.counts)
        attention(out, self.q, self.k, self.v, *step, **dict(zip(names, options, strict=True)), planned=planned)
        return out

    def check(self, out: torch.Tensor, options: list[Any], label: str) -> None:
        real = slice(self.decoding, len(self.lengths))
        expected = paged_attention(
            self.q[self.first : self.rows].contiguous(),
            self.k,
            self.v,
            self.tables[real],
            self.totals[real],
            self.starts[self.decoding : len(self.lengths) + 1] - self.first,
            *options,
        )
        message = f"{label}: {self}"
        assert torch.isnan(out[: self.first]).all(), "rows that decode were written: " + message
        assert torch.isnan(out[self.rows :]).all(), "padding was written: " + message
        for (start, stop), length in zip(
            [(int(a) - self.first, int(b) - self.first) for a, b in zip(self.starts, self.starts[1:], strict=False)][
                real
            ],
            self.lengths[real],
            strict=True,
        ):
            error = relative_error(out[self.first + start : self.first + stop], expected[start:stop])
            assert error <= PAGED_ATTENTION.tolerance[self.dtype], f"error {error} at {length} of {message}"


def ragged(seed: int, decoding: int) -> list[tuple[int, int]]:
    """Prompts around the tiles' edges, chunks behind prefixes, single tokens."""
    draw = random.Random(seed)
    prompts = [(n, n) for n in (1, draw.randint(2, 63), 64, 128, draw.randint(129, 300), draw.choice([127, 255, 257]))]
    chunks = [(n, n + draw.randint(1, 500)) for n in (1, 128, draw.randint(2, 200), draw.randint(2, 200))]
    rest = prompts + chunks
    draw.shuffle(rest)
    return [(1, draw.randint(1, 300)) for _ in range(decoding)] + rest


def fresh_seed() -> int:
    return random.SystemRandom().randrange(1 << 31)


@pytest.mark.parametrize("portable", [False, True], ids=["best", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_variants(gpu: Gpu, head_dim: int, dtype: torch.dtype, portable: bool) -> None:
    if dtype == torch.float32 and not portable:
        pytest.skip("float32 has one kernel")
    for heads, kv_heads, decoding in ((6, 2, 2), (4, 4, 0), (8, 1, 1)):
        seed = fresh_seed()
        step = Step(ragged(seed, decoding), decoding, heads, kv_heads, head_dim, 16, dtype, seed)
        attention = step.attention(gpu, portable)
        for name, variant in VARIANTS.items():
            options = step.options(**variant)
            step.check(step.run(attention, options), options, name)


@pytest.mark.parametrize("portable", [False, True], ids=["best", "portable"])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_block_sizes(gpu: Gpu, block_size: int, head_dim: int, portable: bool) -> None:
    seed = fresh_seed()
    step = Step(ragged(seed, 1), 1, 4, 2, head_dim, block_size, torch.bfloat16, seed)
    attention = step.attention(gpu, portable)
    for name in ("plain", "all"):
        options = step.options(**VARIANTS[name])
        step.check(step.run(attention, options), options, name)


@pytest.mark.parametrize("portable", [False, True], ids=["best", "portable"])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(4096, 4096)],
        [(512, 8704)],
        [(1, 131072)],
        [(1, 1)] * 32,
        [(70, 70)] * 32,
        [(33, 8200), (5, 700), (200, 3001)],
    ],
    ids=str,
)
def test_extremes(gpu: Gpu, lengths: list[tuple[int, int]], portable: bool) -> None:
    """Few query tiles: keys are split among blocks. The second call finds what the first left behind."""
    seed = fresh_seed()
    for head_dim in (64, 80, 128, 256):
        step = Step(lengths, 0, 4, 2, head_dim, 16, torch.bfloat16, seed, padding=0)
        attention = step.attention(gpu, portable)
        for variant in ({}, {}, {"window": 2500, "sinks": True}, {"softcap": 20.0, "alibi": True}):
            options = step.options(**variant)  # type: ignore[arg-type]
            step.check(step.run(attention, options), options, str(variant))


@pytest.mark.parametrize("portable", [False, True], ids=["best", "portable"])
@pytest.mark.parametrize("idle_rows", [0, 1000, 3000])
def test_few_tiles_among_many_rows(gpu: Gpu, idle_rows: int, portable: bool) -> None:
    """The plan splits keys by what there is to do, a call chooses its kernel by the rows: they need not agree."""
    seed = fresh_seed()
    lengths = [(33, 8200), (5, 700), (130, 3001)]
    step = Step(lengths, 0, 4, 2, 128, 16, torch.bfloat16, seed, idle_rows=idle_rows)
    attention = step.attention(gpu, portable)
    for variant in ({}, {"window": 2500, "sinks": True}, {"softcap": 20.0, "alibi": True}):
        options = step.options(**variant)  # type: ignore[arg-type]
        step.check(step.run(attention, options), options, str(variant))


@pytest.mark.parametrize("portable", [False, True], ids=["best", "portable"])
def test_graph_is_replayed_with_other_lengths(gpu: Gpu, portable: bool) -> None:
    """One plan serves several calls; lengths, counts, tables and contents change under the graph."""
    seed = fresh_seed()
    lengths = [(1, 40), (300, 300), (50, 400), (1, 700), (148, 148)]
    step = Step(lengths, 1, 4, 2, 128, 16, torch.bfloat16, seed)
    attention, options = step.attention(gpu, portable), step.options()
    step.run(attention, options)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        attention.plan(step.totals, step.starts, step.counts)
        outs = [step.run(attention, options, planned=True) for _ in range(3)]
    for decoding in (1, 4, 0):
        other = Step(
            [(1, 70)] * decoding + [(120, 130), (380 - decoding, 500)],
            decoding,
            4,
            2,
            128,
            16,
            torch.bfloat16,
            seed + 1,
        )
        assert other.rows == step.rows
        other.lengths += [(0, 0)] * (len(lengths) - len(other.lengths))
        for mine, its in ((step.q, other.q), (step.totals, other.totals), (step.starts, other.starts)):
            mine.fill_(0 if mine.dtype == torch.int32 else float("nan"))
            mine[: len(its)] = its[: len(mine)]
        step.starts[len(other.starts) :] = other.rows
        step.counts.copy_(torch.tensor([decoding, decoding + 2]))
        step.tables.fill_(0)
        count = min(step.tables.shape[0], other.tables.shape[0])
        step.tables[:count, : other.tables.shape[1]] = other.tables[:count]
        step.k[: len(other.k)] = other.k
        step.v[: len(other.v)] = other.v
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        other.lengths = other.lengths[: decoding + 2]
        for out in outs:
            other.check(out, options, f"replay with {decoding} decoding")


def test_refusals(gpu: Gpu) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "max_num_tokens": 64, "max_batch_size": 4, "max_seq_len": 64}
    for wrong, message in (
        ({"head_dim": 72}, "head_dim=72"),
        ({"block_size": 24}, "block_size=24"),
        ({"kv_dtype": torch.float16}, "kv_dtype"),
        ({"heads": 5}, "5 query heads"),
    ):
        given: dict[str, Any] = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "head_dim": 64, "block_size": 16}
        with pytest.raises(BuildError, match=message):
            ContextAttention(gpu, **{**sizes, **given, **wrong})
