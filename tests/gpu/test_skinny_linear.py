"""Skinny products against torch in float64: every bucket, variant, epilogue and odd size; independence of rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit, compile_unit
from llmapi._kernels.op import relative_error
from llmapi._kernels.skinny_linear_cuda import SkinnyLinear
from llmapi._kernels.skinny_linear_layout import BUCKETS, SCALES, WRITES, Variant
from llmapi.models.activations import ACTIVATIONS

pytestmark = pytest.mark.gpu

SIZES = ((1536, 576), (200, 1544), (2064, 520), (4096, 1024), (12296, 512), (40008, 136))
"""N and K: from one 8-row tile a block to several tiles of every height a block."""
DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""One rounding to the output's type; the sums are in float32."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no NVIDIA GPU that torch can use")
    cubins: dict[Unit, bytes] = {}
    gpu = Gpu(torch.device("cuda"), lambda unit, arch: cubins[unit] if unit in cubins else compile_unit(unit, arch))
    product = SkinnyLinear(gpu, dtype=torch.bfloat16)
    wanted = {  # most of what the tests need, compiled side by side
        layout.unit(dtype, gate)
        for dtype in ("bfloat16", "float16")
        for n, k in SIZES
        for bucket in BUCKETS
        for code in product.variants(bucket, n, k)
        for gate in (range(5) if bucket in (8, 16, 64, 128) and n == 2064 else [0])
        if (layout := product.layout(Variant.of(code), bucket, n, k))
    }
    for bucket in BUCKETS:
        for n1, k1, n2 in (
            (1536, 576, 640),
            (200, 1544, 2064),
            (2064, 520, 208),
            (4096, 264, 12304),
            (2048, 1024, 4096),
        ):
            for n, k, norm in ((n1, k1, WRITES), (n2, n1, SCALES)):
                layouts = [
                    product.layout(Variant.of(code), bucket, n, k, norm) for code in product.variants(bucket, n, k)
                ]
                gates = (0, 1) if norm == SCALES else (0,)
                wanted |= {layout.unit("bfloat16", gate) for layout in layouts if layout for gate in gates}
    with ThreadPoolExecutor() as pool:
        cubins.update(zip(wanted, pool.map(lambda unit: compile_unit(unit, gpu.arch), wanted), strict=True))
    yield gpu
    torch.cuda.synchronize()
    gpu.close()


@pytest.fixture(scope="module")
def products(gpu: Gpu) -> dict[torch.dtype, SkinnyLinear]:
    return {dtype: SkinnyLinear(gpu, dtype=dtype) for dtype in DTYPES}


def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(random.SystemRandom().randrange(1 << 40))


def matrix(g: torch.Generator, rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=g, device="cuda").mul_(scale).to(dtype)


def expected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: str | None = None,
) -> torch.Tensor:
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    if gate:
        first, second = y.chunk(2, -1)
        y = ACTIVATIONS[gate](first) * second
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_variant(products: dict[torch.dtype, SkinnyLinear], dtype: torch.dtype, bucket: int) -> None:
    g, product = generator(), products[dtype]
    for n, k in SIZES:
        for rows in {1, max(1, bucket - 3), bucket}:
            x, weight = matrix(g, rows, k, dtype), matrix(g, n, k, dtype, k**-0.5)
            out = torch.full((rows, n), float("nan"), dtype=dtype, device="cuda")
            assert product.supports(rows, n, k)
            for variant in product.variants(bucket, n, k):
                product(out.fill_(float("nan")), x, weight, variant=variant)
                error = relative_error(out, expected(x, weight))
                assert error <= TOLERANCE[dtype], (g.initial_seed(), rows, n, k, variant, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n,k", [(8, 8), (64, 4096), (576, 576), (192, 576), (576, 1536), (3072, 576), (4104, 72), (24, 11008)]
)
def test_odd_sizes(products: dict[torch.dtype, SkinnyLinear], dtype: torch.dtype, n: int, k: int) -> None:
    g, product = generator(), products[dtype]
    for rows in (1, 2, 7, 13, 33, 61, 70, 125):
        x, weight = matrix(g, rows, k, dtype), matrix(g, n, k, dtype, k**-0.5)
        out = torch.full((rows, n), float("nan"), dtype=dtype, device="cuda")
        for variant in product.variants(rows, n, k):
            product(out.fill_(float("nan")), x, weight, variant=variant)
            error = relative_error(out, expected(x, weight))
            assert error <= TOLERANCE[dtype], (g.initial_seed(), rows, n, k, variant, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, *ACTIVATIONS])
def test_epilogues(products: dict[torch.dtype, SkinnyLinear], dtype: torch.dtype, gate: str | None) -> None:
    g, product = generator(), products[dtype]
    for rows, n, k in ((1, 2064, 520), (16, 2064, 520), (50, 2064, 520), (3, 30000, 264), (100, 2064, 520)):
        columns = n // 2 if gate else n
        x, weight = matrix(g, rows, k, dtype), matrix(g, n, k, dtype, k**-0.5)
        bias, residual = matrix(g, 1, n, dtype)[0], matrix(g, rows, columns, dtype)
        for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
            for variant in product.variants(rows, n, k):
                out = torch.full((rows, columns), float("nan"), dtype=dtype, device="cuda")
                product(out, x, weight, b, residual=r, gate=gate, variant=variant)
                error = relative_error(out, expected(x, weight, b, r, gate))
                assert error <= TOLERANCE[dtype], (g.initial_seed(), rows, n, k, variant, error)


def test_strided_rows_and_a_residual_in_place(products: dict[torch.dtype, SkinnyLinear]) -> None:
    g, product = generator(), products[torch.bfloat16]
    for rows in (1, 5, 40, 90):
        wide, weight = matrix(g, rows, 1536, torch.bfloat16), matrix(g, 640, 512, torch.bfloat16, 0.05)
        x, sums = wide[:, 512:1024], matrix(g, rows, 1280, torch.bfloat16)
        before = sums.clone()
        for variant in product.variants(rows, 640, 512):
            sums.copy_(before)
            product(sums[:, 320:960], x, weight, residual=sums[:, 320:960], variant=variant)
            error = relative_error(sums[:, 320:960], expected(x, weight, residual=before[:, 320:960]))
            assert error <= TOLERANCE[torch.bfloat16], (g.initial_seed(), rows, variant, error)
            assert torch.equal(sums[:, :320], before[:, :320]) and torch.equal(sums[:, 960:], before[:, 960:])


def test_a_row_does_not_depend_on_the_others_nor_on_the_moment(products: dict[torch.dtype, SkinnyLinear]) -> None:
    g, product = generator(), products[torch.bfloat16]
    x, weight = matrix(g, 128, 2048, torch.bfloat16), matrix(g, 4096, 2048, torch.bfloat16)
    for variant in product.variants(128, 4096, 2048):
        whole = torch.empty(128, 4096, dtype=torch.bfloat16, device="cuda")
        product(whole, x, weight, variant=variant)
        for rows in (1, 3, 8, 16, 24, 32, 48, 64, 96, 128):
            for _ in range(5):
                out = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda")
                product(out, x[:rows], weight, variant=variant)
                assert torch.equal(out, whole[:rows]), (g.initial_seed(), variant, rows)


def test_a_chain_in_a_graph(products: dict[torch.dtype, SkinnyLinear]) -> None:
    """Products that read each other's results, launched so that they overlap; replayed with new inputs."""
    g, product = generator(), products[torch.bfloat16]
    weights = [
        (matrix(g, 3072, 1024, torch.bfloat16, 0.03), matrix(g, 1024, 1536, torch.bfloat16, 0.03)) for _ in range(6)
    ]
    for rows in (1, 16, 64, 128):
        x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
        inner, outer = x.new_empty(rows, 1536), x.new_empty(rows, 1024)

        def chain(x: torch.Tensor = x, inner: torch.Tensor = inner, outer: torch.Tensor = outer) -> None:
            outer.copy_(x)
            for up, down in weights:
                product(inner, outer, up, gate="silu")
                product(outer, inner, down, residual=outer)

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(10):
            x.copy_(matrix(g, rows, 1024, torch.bfloat16))
            graph.replay()
            y = x
            for up, down in weights:
                y = expected(expected(y, up, gate="silu").bfloat16(), down, residual=y).bfloat16()
            error = relative_error(outer, y)
            assert error <= 2e-2, (g.initial_seed(), rows, error)


def rms_norm(h: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    wide = h.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.double()


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_norm_between_two_products(products: dict[torch.dtype, SkinnyLinear], bucket: int, gate: str | None) -> None:
    """Every variant of the first product with every one of the second; rows of very different sizes."""
    g, product = generator(), products[torch.bfloat16]
    cases = {1, bucket - 3, bucket}
    for (n1, k1), n2 in ((SIZES[0], 640), (SIZES[1], 2064), (SIZES[2], 208), ((4096, 264), 12304)):
        first = [v for v in product.variants(bucket, n1, k1) if product.norms(bucket, n1, k1, v, WRITES)]
        second = [v for v in product.variants(bucket, n2, n1) if product.norms(bucket, n2, n1, v, SCALES)]
        assert len(first) > 1 and len(second) > 1
        for rows in cases:
            x, w1 = matrix(g, rows, k1, torch.bfloat16), matrix(g, n1, k1, torch.bfloat16, k1**-0.5)
            w2 = matrix(g, n2, n1, torch.bfloat16, n1**-0.5)
            bias, residual = matrix(g, 1, n1, torch.bfloat16)[0], matrix(g, rows, n1, torch.bfloat16)
            residual *= torch.logspace(-3, 3, rows, device="cuda")[:, None].bfloat16()
            gain = matrix(g, 1, n1, torch.bfloat16)[0].abs() + 0.5
            true_sum = expected(x, w1, bias, residual)
            pairs = [(a, second[i % len(second)]) for i, a in enumerate(first)]
            pairs += [(first[i % len(first)], b) for i, b in enumerate(second)]
            for a, b in pairs:
                total = torch.full((rows, n1), float("nan"), dtype=torch.bfloat16, device="cuda")
                unscaled = product.before_norm(total, x, w1, bias, residual, gain, 1e-3, a)
                out = torch.full((rows, n2 // 2 if gate else n2), float("nan"), dtype=torch.bfloat16, device="cuda")
                product(out, unscaled, w2, gate=gate, variant=b)
                where = (g.initial_seed(), rows, (n1, k1), n2, a, b)
                assert relative_error(total, true_sum) <= TOLERANCE[torch.bfloat16], where
                true = expected(rms_norm(total, gain, 1e-3), w2, gate=gate)
                scale = true.square().mean(-1, keepdim=True).sqrt()
                error = relative_error(out.double() / scale, true / scale)  # every row counts as much
                assert error <= 2 * TOLERANCE[torch.bfloat16], (*where, error)


def test_a_norm_does_not_depend_on_other_rows_nor_on_the_moment(products: dict[torch.dtype, SkinnyLinear]) -> None:
    g, product = generator(), products[torch.bfloat16]
    x, w1 = matrix(g, 128, 1024, torch.bfloat16), matrix(g, 2048, 1024, torch.bfloat16, 0.03)
    w2, residual = matrix(g, 4096, 2048, torch.bfloat16, 0.02), matrix(g, 128, 2048, torch.bfloat16)
    gain = matrix(g, 1, 2048, torch.bfloat16)[0]

    def run(rows: int, a: int, b: int) -> torch.Tensor:
        total, out = x.new_empty(rows, 2048), x.new_empty(rows, 4096)
        product(out, product.before_norm(total, x[:rows], w1, None, residual[:rows], gain, 1e-5, a), w2, variant=b)
        return out

    for a in product.variants(128, 2048, 1024):
        for b in product.variants(128, 4096, 2048)[:2]:
            if not product.norms(128, 2048, 1024, a, WRITES) or not product.norms(128, 4096, 2048, b, SCALES):
                continue
            whole = run(128, a, b)
            for rows in (1, 3, 8, 16, 24, 32, 48, 64, 96, 128):
                for _ in range(3):
                    assert torch.equal(run(rows, a, b), whole[:rows]), (g.initial_seed(), a, b, rows)


def test_norms_in_a_chain_in_a_graph(products: dict[torch.dtype, SkinnyLinear]) -> None:
    """What a model's layers do, overlapping, replayed with new inputs."""
    g, product = generator(), products[torch.bfloat16]
    width, eps = 1024, 1e-5
    layers = [
        (
            matrix(g, 3072, width, torch.bfloat16, 0.03),
            matrix(g, width, 1536, torch.bfloat16, 0.03),
            matrix(g, 1, width, torch.bfloat16)[0] + 1,
        )
        for _ in range(6)
    ]
    for rows in (1, 16, 64, 128):
        x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
        inner, last = x.new_empty(rows, 1536), x.new_empty(rows, 3072)
        down = next(v for v in product.variants(rows, width, 1536) if product.norms(rows, width, 1536, v, WRITES))
        up = next(v for v in product.variants(rows, 3072, width) if product.norms(rows, 3072, width, v, SCALES))

        def chain(
            x: torch.Tensor = x,
            inner: torch.Tensor = inner,
            last: torch.Tensor = last,
            up: int = up,
            down: int = down,
        ) -> torch.Tensor:
            product(inner, x, layers[0][0], gate="silu")
            total = x
            for i, (_, w, gain) in enumerate(layers):
                before, total = total, torch.empty_like(x)
                unscaled = product.before_norm(total, inner, w, None, before, gain, eps, down)
                if i + 1 < len(layers):
                    product(inner, unscaled, layers[i + 1][0], gate="silu", variant=up)
                else:
                    product(last, unscaled, layers[0][0], variant=up)
            return total

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total = chain()
        for _ in range(10):
            x.copy_(matrix(g, rows, width, torch.bfloat16))
            graph.replay()
            h, z = x, expected(x, layers[0][0], gate="silu")
            for i, (_, w, gain) in enumerate(layers):
                h = expected(z.bfloat16(), w, residual=h).bfloat16()
                normed = rms_norm(h, gain, eps)
                if i + 1 < len(layers):
                    z = expected(normed, layers[i + 1][0], gate="silu")
            assert relative_error(total, h) <= 2e-2, (g.initial_seed(), rows)
            assert relative_error(last, expected(normed, layers[0][0])) <= 3e-2, (g.initial_seed(), rows)


def test_refusals(products: dict[torch.dtype, SkinnyLinear], gpu: Gpu) -> None:
    product = products[torch.bfloat16]
    # A sum times the norm's weight may be too large for float16.
    assert not any(products[torch.float16].norms(8, 64, 64, v, WRITES) for v in product.variants(8, 64, 64))
    assert not product.supports(129, 64, 64) and not product.supports(1, 64, 63) and not product.supports(0, 64, 64)
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    weight, out = x.new_zeros(32, 64), x.new_zeros(2, 32)
    for call in (
        lambda: product(out, x[:, :60], weight[:, :60].contiguous()),
        lambda: product(out, x, weight.T.contiguous().T),
        lambda: product(out[:, :16], x, weight),
        lambda: product(out.half(), x, weight),
        lambda: product(out, x.new_zeros(129)[1:].view(2, 64), weight),
        lambda: SkinnyLinear(gpu, dtype=torch.float32),
        lambda: SkinnyLinear(gpu, dtype=torch.float16, max_rows=129),
    ):
        with pytest.raises(ValueError):
            call()
