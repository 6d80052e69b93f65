"""Skinny products beside torch's (cuBLAS): a decode step's chain of products, and each shape alone.

    python benchmarks/kernels/skinny_linear.py [--rows 1 8 16 32 64] [--variants CODE ...] [--alone]

The chain runs the four products of a Llama-2-7B layer for 16 layers with different weights (6.5 GB), each reading the
result of the one before: as torch.mm does them (no activation, no residual) and as the kernel does them (activation and
residuals included), in a CUDA graph. Alone: one shape over rotating weights of more than 600 MB. Rates count the
weights only, in percent of 4.5 TB/s, the rate at which an H200 was seen to read.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import Unit, compile_unit
from llmapi._kernels.op import relative_error
from llmapi._kernels.skinny_linear_cuda import GATES, SkinnyLinear, Variant, bucket_of

READ_RATE = 4.5e12
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


def seconds(run: Callable[[], None], replays: int = 9) -> float:
    """Median time of a CUDA graph of ``run``."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def weight(n: int, k: int) -> torch.Tensor:
    return torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.5 * k**-0.5)


def chain(rows: int, layers: list[list[torch.Tensor]], product: SkinnyLinear | None, variant: int | None) -> float:
    """Seconds of a step of all layers."""
    h = torch.randn(rows, 4096, device="cuda").bfloat16()
    qkv, attended, gate_up, inner = (h.new_zeros(rows, n) for n in (12288, 4096, 22016, 11008))
    inner.normal_()

    def ours() -> None:
        assert product is not None
        for w in layers:
            product(qkv, h, w[0], variant=variant)
            product(attended, qkv[:, :4096], w[1], residual=h, variant=variant)
            product(inner, attended, w[2], gate="silu", variant=variant)
            product(h, inner, w[3], residual=attended, variant=variant)

    def theirs() -> None:
        for w in layers:
            torch.mm(h, w[0].T, out=qkv)
            torch.mm(qkv[:, :4096], w[1].T, out=attended)
            torch.mm(attended, w[2].T, out=gate_up)
            torch.mm(inner, w[3].T, out=h)

    return seconds(ours if product else theirs)


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

    return seconds(run) / (len(weights) * times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--variants", type=int, nargs="+", help="instead of those that the kernel names")
    parser.add_argument("--alone", action="store_true", help="also each shape alone")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()

    device = torch.device("cuda")
    cubins: dict[Unit, bytes] = {}
    gpu = Gpu(device, lambda unit, arch: cubins[unit] if unit in cubins else compile_unit(unit, arch))
    product = SkinnyLinear(gpu, dtype=torch.bfloat16)

    def variants(rows: int, n: int, k: int) -> list[int]:
        given = args.variants or product.variants(rows, n, k)
        return [v for v in given if Variant.of(v).shared(bucket_of(rows)) <= gpu.shared_memory]

    wanted = {
        Variant.of(v).unit("bfloat16", bucket_of(rows), gate)
        for rows in args.rows
        for v in variants(rows, 4096, 4096)
        for gate in (0, GATES["silu"])
    }
    with ThreadPoolExecutor() as pool:
        cubins.update(zip(wanted, pool.map(lambda unit: compile_unit(unit, gpu.arch), wanted), strict=True))

    layers = [[weight(*SHAPES[s]) for s in ("7B qkv", "7B out", "7B gate/up", "7B down")] for _ in range(LAYERS)]
    for rows in args.rows:
        for w in layers[0]:
            x, out = torch.randn(rows, w.shape[1], device="cuda").bfloat16(), torch.empty(rows, w.shape[0]).cuda()
            for v in variants(rows, *w.shape):
                out = torch.full((rows, w.shape[0]), float("nan"), device="cuda", dtype=torch.bfloat16)
                product(out, x, w, variant=v)
                error = relative_error(out, x.float() @ w.float().T)
                assert error < 5e-3, (rows, tuple(w.shape), v, error)

    print(f"{gpu.name}: {LAYERS} layers of Llama-2-7B, µs per layer and % of {READ_RATE / 1e12} TB/s")
    size = sum(2 * w.numel() for w in layers[0])
    for rows in args.rows:
        cells = []
        for v in [None, *variants(rows, 4096, 4096)]:
            t = chain(rows, layers, product if v else None, v) / LAYERS
            cells.append(f"{v or 'torch'}: {t * 1e6:.1f} {size / t / READ_RATE:.1%}")
        print(f"M={rows:2}  " + "  ".join(cells), flush=True)

    if args.alone:
        print(f"each alone, % of {READ_RATE / 1e12} TB/s; N x K")
        for name in args.shapes:
            n, k = SHAPES[name]
            kept = list(SHAPES).index(name)
            several = (
                [w[kept] for w in layers] if kept < 4 else [weight(n, k) for _ in range(-(-(600 << 20) // (2 * n * k)))]
            )
            for rows in args.rows:
                cells = []
                for v in [None, *variants(rows, n, k)]:
                    t = alone(rows, several, product if v else None, v)
                    cells.append(f"{v or 'torch'}: {2 * n * k / t / READ_RATE:.1%}")
                print(f"{name:10} {n}x{k} M={rows:2}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
