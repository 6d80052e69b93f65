"""Times of the decode attention kernel on this machine's GPU, next to torch's attention over contiguous keys.

    PYTHONPATH=. python3 benchmarks/kernels/decode_attention.py [--sweep] [--cases NAMES] [--json FILE]

Every time is a launch's share of a CUDA graph of many launches, over disjoint parts of a cache larger than the L2,
median of the replays. Rates count keys and values once: bytes = 4 * kv_heads * head_dim * tokens in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.harness import READ_RATE, replay_time
from llmapi._kernels.decode_attention_cuda import DecodeAttention, Form, default_forms, fit, unit
from llmapi._kernels.gpu import Gpu
from llmapi._kernels.nvrtc import compile_unit
from llmapi._kernels.op import relative_error
from llmapi._kernels.paged_attention import paged_attention

BLOCK_SIZE = 16
POOL = 4 * 8960 * 65536  # bytes of keys and values: 2.3 GB
HEAD_DIM = 128

# name: heads, key heads, lengths
CASES: dict[str, tuple[int, int, list[int]]] = {
    "MHA 1x128": (32, 32, [128]),
    "MHA 1x256": (32, 32, [256]),
    "MHA 1x4096": (32, 32, [4096]),
    "MHA 16x192": (32, 32, [192] * 16),
    "MHA 64x192": (32, 32, [192] * 64),
    "MHA 256x192": (32, 32, [192] * 256),
    "MHA 16x4096": (32, 32, [4096] * 16),
    "GQA 1x1088": (32, 8, [1088]),
    "GQA 64x1088": (32, 8, [1088] * 64),
    "GQA 512x1088": (32, 8, [1088] * 512),
    "GQA 1x131072": (32, 8, [131072]),
    "GQA mixed": (32, 8, [65536] + [1 + 37 * i % 2000 for i in range(100)]),
}


class Setting:
    """Inputs of one case: several disjoint sets of blocks of one pool."""

    def __init__(self, pool: torch.Tensor, heads: int, kv_heads: int, lengths: list[int], ordered: bool) -> None:
        self.heads, self.kv_heads, self.lengths = heads, kv_heads, lengths
        shape = (-1, BLOCK_SIZE, kv_heads, HEAD_DIM)
        half = pool.numel() // 2
        self.k, self.v = pool[:half].view(shape), pool[half:].view(shape)
        needed = [-(-n // BLOCK_SIZE) for n in lengths]
        self.bytes = 4 * kv_heads * HEAD_DIM * sum(lengths)
        self.sets = max(1, min(len(self.k) // sum(needed), 64))
        order = torch.arange(len(self.k)) if ordered else torch.randperm(len(self.k))
        order = order.int()[: self.sets * sum(needed)].view(self.sets, -1).cuda()
        self.tables = torch.zeros(self.sets, len(lengths), max(needed), dtype=torch.int32, device="cuda")
        for s in range(self.sets):
            for i, ids in enumerate(torch.split(order[s], needed)):
                self.tables[s, i, : len(ids)] = ids
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.q = torch.randn(len(lengths), heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)

    def attention(self, gpu: Gpu, forms: tuple[Form, Form, Form] | None) -> DecodeAttention:
        return DecodeAttention(
            gpu,
            dtype=torch.bfloat16,
            kv_dtype=torch.bfloat16,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE,
            max_batch_size=len(self.lengths),
            max_seq_len=max(self.lengths),
            forms=forms,
        )

    def call(self, attention: DecodeAttention, i: int) -> None:
        attention(
            self.out,
            self.q,
            self.k,
            self.v,
            self.tables[i % self.sets],
            self.seq_lens,
            None,
            scale=HEAD_DIM**-0.5,
            window=0,
            softcap=0.0,
            alibi_slopes=None,
            sinks=None,
        )

    def error(self) -> float:
        """Of the output for the first set, over at most 8 sequences."""
        few = min(8, len(self.lengths))
        start = torch.arange(few + 1, dtype=torch.int32, device="cuda")
        args = (self.k, self.v, self.tables[0, :few], self.seq_lens[:few], start, HEAD_DIM**-0.5, 0, 0.0, None, None)
        return relative_error(self.out[:few], paged_attention(self.q[:few], *args))

    def torch_call(self, pool: torch.Tensor) -> Callable[[int], None]:
        """torch's attention over contiguous ``[B, K, L, D]`` keys, rotated likewise."""
        batch, length = len(self.lengths), self.lengths[0]
        size = batch * self.kv_heads * length * HEAD_DIM
        half = pool.numel() // 2
        count = max(1, min(half // size, 64))
        shape = (count, batch, self.kv_heads, length, HEAD_DIM)
        k, v = pool[: count * size].view(shape), pool[half : half + count * size].view(shape)
        q = self.q[:, :, None]

        def call(i: int) -> None:
            F.scaled_dot_product_attention(q, k[i % count], v[i % count], enable_gqa=self.heads != self.kv_heads)

        return call


def microseconds(call: Callable[[int], None], launches: int, replays: int) -> float:
    """Of one launch, among others that take turns with the sets of blocks."""
    return 1e6 * replay_time([partial(call, i) for i in range(launches)], replays, queued=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time every layout, not only the chosen one")
    parser.add_argument("--cases", help="names, separated by commas")
    parser.add_argument("--ordered", action="store_true", help="blocks of a sequence lie in a row, not scattered")
    parser.add_argument("--json", help="write the results there")
    arguments = parser.parse_args()
    cases = {n: c for n, c in CASES.items() if not arguments.cases or n in arguments.cases.split(",")}

    device = torch.device("cuda", 0)
    gpu = Gpu(device)
    layouts: dict[tuple[int, int], dict[str, tuple[Form, Form, Form]]] = {}
    for heads, kv_heads, _ in cases.values():
        forms = {"chosen": default_forms(gpu, torch.bfloat16, heads, kv_heads, HEAD_DIM)}
        if arguments.sweep:
            for label, options in SWEEP.items():
                form = fit(torch.bfloat16, heads, kv_heads, HEAD_DIM, gpu.shared_memory, **options)
                forms[label] = (form, form, form)
        layouts[heads, kv_heads] = forms
    units = list(
        {
            unit(torch.bfloat16, heads, kv_heads, HEAD_DIM, BLOCK_SIZE, form): None
            for (heads, kv_heads), forms in layouts.items()
            for layout in forms.values()
            for form in layout
        }
    )
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
        built = dict(zip(units, workers.map(compile_unit, units, [gpu.arch] * len(units)), strict=True))
    gpu = Gpu(device, lambda u, a: built[u])

    pool = torch.randn(POOL // 2, device="cuda", dtype=torch.bfloat16)
    results: list[dict[str, Any]] = []
    for name, (heads, kv_heads, lengths) in cases.items():
        setting = Setting(pool, heads, kv_heads, lengths, arguments.ordered)
        ideal = setting.bytes / READ_RATE
        launches = min(200, max(setting.sets if ideal < 1e-4 else 3, math.ceil(4e-4 / ideal)))
        row: dict[str, Any] = {"case": name, "ideal_us": ideal * 1e6, "us": {}, "error": {}}
        for label, forms_pair in layouts[heads, kv_heads].items():
            attention = setting.attention(gpu, forms_pair)
            setting.out.fill_(float("nan"))
            setting.call(attention, 0)
            row["error"][label] = setting.error()
            row["us"][label] = microseconds(partial(setting.call, attention), launches, 9)
        if len(set(lengths)) == 1:
            try:
                row["us"]["torch"] = microseconds(setting.torch_call(pool), min(launches, 20), 5)
            except RuntimeError as error:
                print(f"{name}: torch's attention failed: {str(error).splitlines()[0]}")
        results.append(row)
        torch.cuda.empty_cache()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))
    print(f"{gpu.name}: microseconds (share of {READ_RATE / 1e12} TB/s)")
    for row in results:
        worst = max(row["error"].values())
        cells = [f"{k} {v:.1f} ({row['ideal_us'] / v:.0%})" for k, v in row["us"].items()]
        print(f"{row['case']:13} ideal {row['ideal_us']:.1f} error {worst:.1e} | " + " ".join(cells))


# Warps of a block x key heads that they serve side by side; hints are to the L2 about how much to fetch.
SWEEP: dict[str, dict[str, Any]] = {
    "4x1": {"across": 1},
    "4x2": {"across": 2},
    "4x4": {"across": 4},
    "8x1": {"across": 1, "warps": 8, "blocks": 1},
    "8x4": {"across": 4, "warps": 8, "blocks": 1},
    "8x8": {"across": 8, "warps": 8, "blocks": 1},
    "4x4 no hint": {"across": 4, "tuning": (("CACHE_HINT", '""'),)},
    "4x4 256B": {"across": 4, "tuning": (("CACHE_HINT", '".L2::256B"'),)},
}

if __name__ == "__main__":
    main()
