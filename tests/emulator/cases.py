"""Kernels on an emulated GPU against their references: what the tests run, and what must fail for a wrong kernel."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import torch

from llmapi._kernels import OPS, Op, relative_error
from llmapi._kernels.decode_attention_cuda import Form
from llmapi._kernels.nvrtc import Unit
from llmapi._kernels.paged_attention import PAGED_ATTENTION
from llmapi._kernels.skinny_linear_cuda import SkinnyLinear
from llmapi._kernels.skinny_linear_layout import Variant
from llmapi._runtime.sampler import Sampler
from llmapi.models.activations import ACTIVATIONS
from tests.emulator.gpu import EmulatedGpu
from tests.gpu import test_context_attention as context_tests
from tests.gpu import test_decode_attention as decode_tests
from tests.gpu import test_sample as sample_tests

SEED = 20_240


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """What torch allocates and nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def operator(gpu: EmulatedGpu, op: Op, dtype: torch.dtype) -> None:
    """Every sample of an operator, its outputs and what it writes to; what is not written is NaN."""
    launch = op.cuda
    assert launch is not None
    with filled_memory():
        for sample in op.samples(torch.Generator().manual_seed(SEED), dtype):
            here, there = copy.deepcopy(sample.args), copy.deepcopy(sample.args)
            expected, actual = op.reference(*here), launch(gpu, *there)
            pairs = zip(
                [*(expected if isinstance(expected, tuple) else (expected,)), *(here[i] for i in op.mutates)],
                [*(actual if isinstance(actual, tuple) else (actual,)), *(there[i] for i in op.mutates)],
                strict=True,
            )
            for e, a in pairs:
                assert a.dtype == e.dtype and a.shape == e.shape, sample.label
                error = relative_error(a, e)
                assert error <= op.tolerance[dtype], f"{op.name} {sample.label}: {error}"


def operators(gpu: EmulatedGpu, source: str) -> None:
    """The operators that ``source`` (such as ``"norm.cu"``) serves, in float32 and bfloat16."""
    module = source.removesuffix(".cu") + "_cuda"
    for op in OPS.values():
        if op.cuda is not None and op.cuda.__module__.endswith("." + module):
            for dtype in (torch.float32, torch.bfloat16):
                operator(gpu, op, dtype)


def step_kernels(gpu: EmulatedGpu) -> None:
    """The ids of a step, and copies of whole blocks."""
    source = torch.tensor([7, -1, 0, ~3, 12, ~2] * 50, dtype=torch.int32)[:299]
    sampled = torch.tensor([40, 41, -1, 43], dtype=torch.int32)
    ids = torch.full_like(source, -99)
    gpu.kernel(Unit.of("step.cu"), "resolve_ids", "pppi")((2, 1, 1), 256, source, sampled, ids, 299)
    own = torch.tensor([s if s >= 0 else max(0, int(sampled[~s])) for s in source.tolist()], dtype=torch.int32)
    assert torch.equal(ids, own)

    caches = [torch.randn(6, 16, 2, 40), torch.randn(6, 16, 2, 40)]
    expected = [c.clone() for c in caches]
    pairs = torch.tensor([[1, 4], [0, 5]], dtype=torch.int32)
    for cache in expected:
        cache[4], cache[5] = cache[1].clone(), cache[0].clone()
    addresses = torch.tensor([c.data_ptr() for c in caches])
    size = caches[0][0].nbytes
    kernel = gpu.kernel(Unit.of("step.cu"), "copy_blocks", "ppl")
    kernel((2, 2, 1), 256, addresses, pairs, size)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


VARIANTS = [*decode_tests.VARIANTS, (0, 0.0, False, True), (40, 9.0, True, True)]
"""Window, soft cap, ALiBi, sinks."""

LENGTHS = {
    "one": [193],
    "long": [1500],
    "ones": [1] * 40,
    "edges": [1, 300, 5, 0, 16, 17, 33, 1, 64, 15, 0, 129],
}


def decode_attention(gpu: EmulatedGpu, shape: Any, form: int, lengths: dict[str, list[int]] | None = None) -> None:
    """All variants over sequences of several lengths; twice, as the counters must be left as they were found.

    Args:
        gpu: where.
        shape: dtype, heads, key heads, head size, tokens of a block.
        form: 0 single, 1 narrow, 2 wide.
        lengths: tokens of each sequence, by a label.
    """
    dtype, heads, kv_heads, head_dim, block_size = decode_tests.DTYPES[shape[0]], *shape[1:]
    layout: Form = decode_tests._forms(dtype, heads, kv_heads, head_dim, gpu.shared_memory)[form]
    attention = decode_tests._attention(gpu, shape, (layout, layout, layout))  # type: ignore[arg-type]
    for name, tokens in (lengths or LENGTHS).items():
        case = decode_tests.Case(SEED, dtype, heads, kv_heads, head_dim, block_size, tokens, "cpu")
        live = case.lengths > 0
        for window, softcap, alibi, sink in VARIANTS:
            slopes, sinks = case.slopes if alibi else None, case.sinks if sink else None
            expected = case.expected(window, softcap, slopes, sinks)
            for attempt in range(2):
                out = torch.full_like(case.q, float("nan"))
                attention(
                    out, case.q, case.k, case.v, case.tables, case.lengths, None,
                    scale=case.scale, window=window, softcap=softcap, alibi_slopes=slopes, sinks=sinks,
                )  # fmt: skip
                message = f"{name} window {window} cap {softcap} alibi {alibi} sink {sink} call {attempt}"
                error = relative_error(out[live], expected)
                assert error <= PAGED_ATTENTION.tolerance[dtype], f"{error} {message}"
                assert out[~live].isnan().all(), message


STEPS = [
    ([(1, 40), (1, 1), (63, 63), (64, 64), (1, 130), (33, 97), (2, 2)], 2),
    ([(130, 130), (16, 81)], 0),
]
"""(new tokens, all tokens) of each sequence, and how many of them decode."""


def context_attention(
    gpu: EmulatedGpu, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int, steps: Any = None
) -> None:
    """All variants over steps of ragged prompts."""
    for lengths, decoding in steps or STEPS:
        step = context_tests.Step(lengths, decoding, heads, kv_heads, head_dim, block_size, dtype, SEED, device="cpu")
        attention = step.attention(gpu, portable=True)  # type: ignore[arg-type]
        for name, variant in context_tests.VARIANTS.items():
            options = step.options(**variant)
            step.check(step.run(attention, options), options, name)


def sampling(
    gpu: EmulatedGpu,
    vocab: int,
    n: int,
    dtype: torch.dtype,
    *,
    edits: bool,
    scale: float = 1.0,
    shift: float = 0.0,
    seed: int = SEED,
) -> None:
    """Tokens of rows of random settings, against the sampler of the CPU.

    Args:
        gpu: where.
        vocab, n: sizes.
        dtype: of the logits.
        edits: whether rows have penalties, biases and bans.
        scale, shift: what logits are multiplied with, and what is added.
        seed: of the logits and settings.
    """
    x = sample_tests.noise(n, vocab, seed, dtype, gpu.device) * scale + shift
    before = x.clone()
    rows = sample_tests.random_rows(n, vocab, random.Random(seed), edits=edits)
    expected = Sampler(vocab, sample_tests.Words())(x, rows)
    got = sample_tests.make(gpu, vocab, dtype)(x, rows)  # type: ignore[arg-type]
    flips = sample_tests.compare(x, rows, expected, got, f"seed {seed}")
    assert flips <= 1, f"{flips} of {n} rows differ within rounding"
    assert torch.equal(x, before)


def flat_rows(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    """Where many tokens may be drawn, and each edit shows."""
    sampling(gpu, 1000, 60, dtype, edits=False, scale=0.02)
    sampling(gpu, 11, 150, dtype, edits=True, scale=0.2, shift=-3.0)


def greedy_ties(gpu: EmulatedGpu) -> None:
    """The lowest id of the largest logits."""
    for vocab in (9, 1003, 5003):
        x = torch.randint(0, 3, (6, vocab), generator=torch.Generator().manual_seed(SEED)).float()
        x[:, : vocab // 2] -= 1
        got = sample_tests.make(gpu, vocab, torch.float32)(x, [sample_tests.row(temperature=0)] * 6)  # type: ignore[arg-type]
        assert [s.token_ids for s in got] == [[int(row.argmax())] for row in x]


def _skinny_inputs(rows: int, n: int, k: int, dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(SEED + rows)
    x, weight = torch.randn(rows, k, generator=g).to(dtype), (torch.randn(n, k, generator=g) * k**-0.5).to(dtype)
    return x, weight, torch.randn(n, generator=g).to(dtype), torch.randn(rows, columns, generator=g).to(dtype)


def skinny_product(
    product: SkinnyLinear, rows: int, n: int, k: int, dtype: torch.dtype, variant: int, gate: str | None = None
) -> None:
    """One variant with bias and residual, called twice: what a call leaves must not harm the next one."""
    columns = n // 2 if gate else n
    x, weight, bias, residual = _skinny_inputs(rows, n, k, dtype, columns)
    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    product(out, x, weight, bias, residual=residual, gate=gate, variant=variant)
    product._workspace.fill_(float("nan"))
    product(out.fill_(float("nan")), x, weight, bias, residual=residual, gate=gate, variant=variant)
    y = x.double() @ weight.double().T + bias.double()
    if gate:
        first, second = y.chunk(2, -1)
        y = ACTIVATIONS[gate](first) * second
    error = relative_error(out, y + residual.double())
    assert error <= (4e-3 if dtype == torch.bfloat16 else 5e-4), (rows, n, k, variant, gate, error)


def skinny_copy(gpu: EmulatedGpu) -> None:
    """The kernel with ``cp.async``: tiles shared by several blocks, whole ones, a gate, odd sizes."""
    dtype = torch.bfloat16 if gpu.capability >= (8, 0) else torch.float16
    product = SkinnyLinear(gpu, dtype=dtype)
    skinny_product(product, 3, 200, 520, dtype, 1)
    skinny_product(product, 13, 1096, 72, dtype, 1)
    skinny_product(product, 6, 272, 264, dtype, 1, "silu")


def skinny_bulk(gpu: EmulatedGpu, rows: int) -> None:
    """The kernel with bulk copies: one block a tile and two, several tiles a block, stages of every depth, gates."""
    product = SkinnyLinear(gpu, dtype=torch.bfloat16)
    for n, k, variants in ((72, 328, (11, 24)), (408, 136, (12, 21, 111))):
        for variant in variants:
            if product.layout(Variant.of(variant), rows, n, k) is not None:
                skinny_product(product, rows, n, k, torch.bfloat16, variant)
    gpu.sms = 2  # several tiles a block
    skinny_product(SkinnyLinear(gpu, dtype=torch.bfloat16), rows, 1048, 72, torch.bfloat16, 11)
    gpu.sms = 4
    half = SkinnyLinear(gpu, dtype=torch.float16)
    for gate, variant in (("silu", 11), ("gelu", 21), ("gelu_tanh", 12), ("relu", 22 if rows <= 64 else 21)):
        skinny_product(half, rows, 272, 200, torch.float16, variant, gate)


def skinny_norm(gpu: EmulatedGpu, rows: int) -> None:
    """An RMSNorm between two products; one block a tile and two, in either."""
    deep = 22 if rows <= 64 else 21
    for n1, n2, first, second, gate in (
        (200, 272, 11, 21, "silu"),
        (456, 88, deep, 12, None),
        (264, 200, 21, 11, None),
    ):
        skinny_norm_between(gpu, rows, n1, n2, first, second, gate)


def skinny_norm_between(
    gpu: EmulatedGpu, rows: int, n1: int, n2: int, first: int, second: int, gate: str | None
) -> None:
    """Two products with a norm between them; rows of very different sizes."""
    product, eps = SkinnyLinear(gpu, dtype=torch.bfloat16), 0.5
    x, w1, bias, residual = _skinny_inputs(rows, n1, 136, torch.bfloat16, n1)
    w2, gain = _skinny_inputs(rows, n2, n1, torch.bfloat16, n2)[1], bias.flip(0).abs() + 0.5
    residual *= torch.logspace(-3, 3, rows)[:, None].bfloat16()
    total = torch.full((rows, n1), float("nan"), dtype=torch.bfloat16)
    with filled_memory():
        unscaled = product.before_norm(total, x, w1, bias, residual, gain, eps, first)
    assert relative_error(total, x.double() @ w1.double().T + bias.double() + residual.double()) <= 4e-3
    out = torch.full((rows, n2 // 2 if gate else n2), float("nan"), dtype=torch.bfloat16)
    product(out, unscaled, w2, gate=gate, variant=second)
    h = total.double()
    y = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * gain.double()) @ w2.double().T
    if gate:
        left, right = y.chunk(2, -1)
        y = ACTIVATIONS[gate](left) * right
    scale = y.square().mean(-1, keepdim=True).sqrt()  # every row counts as much
    error = relative_error(out.double() / scale, y / scale)
    assert error <= 8e-3, (rows, n1, n2, first, second, error)
