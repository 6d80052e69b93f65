"""Context attention beside torch's scaled_dot_product_attention: checked, then timed.

Every shape is timed by replaying a CUDA graph of calls over buffers that together exceed the GPU's cache, median of
replays. Operations are counted as 4 * H * D for every query and key of which the key is not later.

    PYTHONPATH=. python3 benchmarks/kernels/context_attention.py [--tiles 2,128,2,2 ...] [--cases prompt,batch]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.kernels.harness import replay_time
from llmapi._kernels import context_attention_cuda
from llmapi._kernels.context_attention_cuda import ContextAttention
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.op import relative_error

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Case:
    batch: int
    new: int
    total: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16

    @property
    def operations(self) -> float:
        return 4.0 * self.batch * self.heads * self.head_dim * (self.new * self.total - self.new * self.new / 2)

    @property
    def bytes(self) -> int:
        rows = 2 * self.new * self.heads + 2 * self.total * self.kv_heads
        return self.batch * rows * self.head_dim * self.dtype.itemsize


CASES = {
    "long": Case(4, 4096, 4096, 32, 32),
    "long block 64": Case(4, 4096, 4096, 32, 32, block_size=64),
    "prompt": Case(1, 128, 128, 32, 32),
    "batch": Case(64, 128, 128, 32, 32),
    "grouped": Case(8, 1024, 1024, 32, 8),
    "1 x 512": Case(1, 512, 512, 32, 32),
    "1 x 1024": Case(1, 1024, 1024, 32, 32),
    "1 x 2048": Case(1, 2048, 2048, 32, 32),
    "1 x 32768": Case(1, 32768, 32768, 32, 8),
    "chunk": Case(1, 512, 8704, 32, 32),
    "tail": Case(1, 32, 8224, 32, 32),
    "grouped tail": Case(1, 32, 8224, 32, 8),
    "grouped chunk": Case(1, 512, 8704, 32, 8),
    "long fp16": Case(4, 4096, 4096, 32, 32, dtype=torch.float16),
    "head 64": Case(4, 4096, 4096, 32, 32, head_dim=64),
    "head 80": Case(4, 4096, 4096, 32, 32, head_dim=80),
    "head 96": Case(4, 4096, 4096, 32, 32, head_dim=96),
    "head 112": Case(4, 4096, 4096, 32, 32, head_dim=112),
    "head 112 block 64": Case(4, 4096, 4096, 32, 32, head_dim=112, block_size=64),
    "head 192": Case(4, 4096, 4096, 16, 16, head_dim=192),
    "head 256": Case(4, 4096, 4096, 16, 16, head_dim=256),
}


class Inputs:
    def __init__(self, case: Case) -> None:
        self.case = case
        tokens, heads, dim = case.batch * case.new, case.heads, case.head_dim
        packed = torch.randn(tokens, (heads + 2 * case.kv_heads) * dim, device="cuda", dtype=case.dtype)
        self.q = packed[:, : heads * dim].view(tokens, heads, dim)
        each = -(-case.total // case.block_size)
        shape = (case.batch * each, case.block_size, case.kv_heads, dim)
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=case.dtype) for _ in range(2))
        self.tables = torch.randperm(shape[0], device="cuda").to(torch.int32).view(case.batch, each)
        self.out = torch.full((tokens, heads, dim), float("nan"), device="cuda", dtype=case.dtype)

    def dense(self) -> tuple[torch.Tensor, ...]:
        case = self.case
        q = self.q.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2).contiguous()
        kv = [
            cache[self.tables.long()].flatten(1, 2)[:, : case.total].transpose(1, 2).contiguous()
            for cache in (self.k, self.v)
        ]
        return (q, *kv)


def sdpa(case: Case, backend: SDPBackend, dense: tuple[torch.Tensor, ...]) -> torch.Tensor:
    causal = case.new == case.total
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(
            *dense,
            attn_mask=None if causal else causal_lower_right(case.new, case.total),
            is_causal=causal,
            enable_gqa=case.heads != case.kv_heads,
        )


def measure(gpu: Gpu, name: str, case: Case, tiles: list[tuple[int, int, int, int]], portable: bool) -> None:
    sets = max(1, -(-200_000_000 // case.bytes))
    inputs = [Inputs(case) for _ in range(sets)]
    per_graph = max(sets, 1 if case.operations > 1e11 else 24)
    repeats = 10
    lengths = torch.full((case.batch,), case.total, dtype=torch.int32, device="cuda")
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.new
    counts = torch.tensor([0, case.batch], dtype=torch.int32, device="cuda")
    rows: list[tuple[str, float, float]] = []
    expected: torch.Tensor | None = None
    dense = [one.dense() for one in inputs]
    for label, backend in BACKENDS.items():
        try:
            result = sdpa(case, backend, dense[0])
            expected = result if expected is None else expected
            time = replay_time(
                [lambda i=i, b=backend: sdpa(case, b, dense[i % sets]) for i in range(per_graph)], repeats
            )
            rows.append((label, time, 0.0))
        except RuntimeError as error:
            print(f"{name}: {label}: {str(error).splitlines()[0]}")
    best = min((time for _, time, _ in rows), default=float("nan"))
    variants: list[tuple[str, tuple[int, int, int, int] | None]] = [("own", None)]
    variants += [("own " + ",".join(map(str, shape)), shape) for shape in tiles]
    if portable:
        variants.append(("portable", None))
    default = context_attention_cuda._HOPPER[case.head_dim]
    for label, shape in variants:
        context_attention_cuda._HOPPER[case.head_dim] = shape or default
        attention = ContextAttention(
            gpu,
            dtype=case.dtype,
            kv_dtype=case.dtype,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            block_size=case.block_size,
            max_num_tokens=case.batch * case.new,
            max_batch_size=256,
            max_seq_len=case.total,
            portable=label == "portable",
        )
        attention.plan(lengths, starts, counts)

        def call(i: int, attention: ContextAttention = attention) -> None:
            one = inputs[i % sets]
            attention(
                one.out,
                one.q,
                one.k,
                one.v,
                one.tables,
                lengths,
                starts,
                counts,
                scale=case.head_dim**-0.5,
                window=0,
                softcap=0.0,
                alibi_slopes=None,
                sinks=None,
                planned=True,
            )

        inputs[0].out.fill_(float("nan"))
        call(0)
        error = float("nan")
        if expected is not None:
            own = inputs[0].out.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2)
            error = relative_error(own, expected)
        rows.append((label, replay_time([lambda i=i: call(i) for i in range(per_graph)], repeats), error))  # type: ignore[misc]
        if label == "own":
            steps = [lambda a=attention: a.plan(lengths, starts, counts)] * 20
            print(f"{name}: plan {replay_time(steps, 5) * 1e6:.2f} us")
    context_attention_cuda._HOPPER[case.head_dim] = default
    for label, time, error in rows:
        print(
            f"{name:14} {label:16} {time * 1e6:9.1f} us {case.operations / time / 1e12:6.0f} TFLOP/s "
            f"{case.bytes / time / 1e12:5.2f} TB/s  best torch / this {best / time:5.2f}  error {error:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiles", nargs="*", default=[], help="as in context_attention_cuda._HOPPER: also timed")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--portable", action="store_true", help="also time the kernel for every architecture")
    options = parser.parse_args()
    gpu = Gpu(torch.device("cuda", 0))
    print(gpu.name)
    torch.manual_seed(torch.seed() % (1 << 31))
    tiles: list[Any] = [tuple(map(int, text.split(","))) for text in options.tiles]
    for name in options.cases.split(","):
        measure(gpu, name, CASES[name], tiles, options.portable)


if __name__ == "__main__":
    main()
