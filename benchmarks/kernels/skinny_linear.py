"""Skinny products beside torch's (cuBLAS): each shape alone, and a decode step's chain of products.

    PYTHONPATH=. python3 benchmarks/kernels/skinny_linear.py [--rows 1 8 16 32 64] [--shapes NAME ...] [--every]

Alone: one shape over rotating weights of more than 600 MB; torch, the kernel's default variant and its best one. The
chain runs the four products of a Llama-2-7B layer for 16 layers with different weights (6.5 GB), each reading what the
one before wrote: torch.mm without activation and residuals, and the kernel with them. All in CUDA graphs. Rates count
the weights only, in percent of 4.5 TB/s, the rate at which an H200 was seen to read.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.kernels.harness import READ_RATE, replay_time
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit, compile_unit
from llmapi._kernels.op import relative_error
from llmapi._kernels.skinny_linear_cuda import SkinnyLinear
from llmapi._kernels.skinny_linear_layout import BUCKETS, GATES, Variant

LAYERS = 16
SHAPES = {  # N, K
    "7B qkv": (12288, 4096),
    "7B out": (4096, 4096),
    "7B gate/up": (22016, 4096),
    "7B down": (4096, 11008),
    "7B head": (32000, 4096),
    "8B qkv": (6144, 4096),
    "8B gate/up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
}
LAYER = [SHAPES[name] for name in ("7B qkv", "7B out", "7B gate/up", "7B down")]


def weight(n: int, k: int) -> torch.Tensor:
    return torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.5 * k**-0.5)


def chain(
    rows: int, layers: list[list[torch.Tensor]], product: SkinnyLinear | None, variants: list[int | None]
) -> float:
    """Seconds of a step of all layers, with these variants for a layer's four products."""
    h = torch.randn(rows, 4096, device="cuda").bfloat16()
    qkv, attended, gate_up, inner = (h.new_zeros(rows, n) for n in (12288, 4096, 22016, 11008))
    inner.normal_()

    def ours() -> None:
        assert product is not None
        for w in layers:
            product(qkv, h, w[0], variant=variants[0])
            product(attended, qkv[:, :4096], w[1], residual=h, variant=variants[1])
            product(inner, attended, w[2], gate="silu", variant=variants[2])
            product(h, inner, w[3], residual=attended, variant=variants[3])

    def theirs() -> None:
        for w in layers:
            torch.mm(h, w[0].T, out=qkv)
            torch.mm(qkv[:, :4096], w[1].T, out=attended)
            torch.mm(attended, w[2].T, out=gate_up)
            torch.mm(inner, w[3].T, out=h)

    return replay_time([ours if product else theirs], 9)


def alone(rows: int, weights: list[torch.Tensor], product: SkinnyLinear | None, variant: int | None) -> float:
    """Seconds of one product."""
    n, k = weights[0].shape
    x, out = torch.randn(rows, k, device="cuda").bfloat16(), torch.empty(rows, n, device="cuda").bfloat16()
    times = max(1, round(2e-3 / (2 * n * k / READ_RATE) / len(weights)))

    def run() -> None:
        for w in weights * times:
            if product:
                product(out, x, w, variant=variant)
            else:
                torch.mm(x, w.T, out=out)

    return replay_time([run], 9) / (len(weights) * times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--every", action="store_true", help="print every variant")
    args = parser.parse_args()

    device = torch.device("cuda")
    cubins: dict[Unit, bytes] = {}
    gpu = Gpu(device, lambda unit, arch: cubins[unit] if unit in cubins else compile_unit(unit, arch))
    product = SkinnyLinear(gpu, dtype=torch.bfloat16, max_rows=BUCKETS[-1])
    wanted = {
        layout.unit("bfloat16", gate)
        for rows in args.rows
        for n, k in (SHAPES[name] for name in args.shapes)
        for code in product.variants(rows, n, k)
        for gate in ((0, GATES["silu"]) if (n, k) == LAYER[2] else (0,))
        if (layout := product.layout(Variant.of(code), rows, n, k))
    }
    with ThreadPoolExecutor() as pool:
        cubins.update(zip(wanted, pool.map(lambda unit: compile_unit(unit, gpu.arch), wanted), strict=True))
    layers = [[weight(n, k) for n, k in LAYER] for _ in range(LAYERS)]

    print(f"{gpu.name}; % of {READ_RATE / 1e12} TB/s; {len(wanted)} specializations")
    best: dict[tuple[int, int, int], int | None] = {}
    for name in args.shapes:
        n, k = SHAPES[name]
        several = [w[LAYER.index((n, k))] for w in layers] if (n, k) in LAYER else []
        several = several or [weight(n, k) for _ in range(max(2, -(-(600 << 20) // (2 * n * k))))]
        for rows in args.rows:
            x = torch.randn(rows, k, device="cuda").bfloat16()
            rates = {}
            for code in product.variants(rows, n, k):
                out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.bfloat16)
                product(out, x, several[0], variant=code)
                error = relative_error(out, x.float() @ several[0].float().T)
                assert error < 5e-3, (name, rows, code, error)
                rates[code] = 2 * n * k / alone(rows, several, product, code) / READ_RATE
            torchs = 2 * n * k / alone(rows, several, None, None) / READ_RATE
            default, top = next(iter(rates)), max(rates, key=lambda code: rates[code])
            best[rows, n, k] = top
            line = f"{name:10} {n:6} x {k:5} M={rows:2}  torch {torchs:6.1%}  default {default:2} {rates[default]:6.1%}"
            every = "  ".join(f"{code}: {rate:.1%}" for code, rate in rates.items()) if args.every else ""
            print(f"{line}  best {top:2} {rates[top]:6.1%}  {every}", flush=True)

    size = sum(2 * w.numel() for w in layers[0])
    for rows in args.rows:
        cells = []
        tuned = [best.get((rows, n, k)) for n, k in LAYER]
        for label, by, variants in (
            ("torch", None, []),
            ("default", product, [None] * 4),
            ("best", product, tuned),
        ):
            t = chain(rows, layers, by, variants) / LAYERS
            cells.append(f"{label} {t * 1e6:6.1f} µs {size / t / READ_RATE:6.1%}")
        print(f"a layer of Llama-2-7B in a chain of {LAYERS}, M={rows:2}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
