"""The emulator itself: what it computes, and what it does not let pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi._kernels.nvrtc import CSRC, Unit
from tests.emulator import build, gpu
from tests.emulator.gpu import EmulatedGpu, EmulationError


def launch(
    folder: Path, body: str, *args: Any, threads: int = 32, blocks: int = 1, shared: int = 0, **options: Any
) -> None:
    """Run one kernel; ``args`` are tensors, ``a``, ``b``, ``c`` in the body."""
    names = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.int32: "int"}
    parameters = ", ".join(f"{names[x.dtype]}* {name}" for x, name in zip(args, "abcd", strict=False))
    text = f'#include "common.cuh"\nextern "C" __global__ void k({parameters}) {{ int t = threadIdx.x; {body} }}\n'
    own = EmulatedGpu(folder, sources={**build.sources(), "k.cu": text}, **options)
    own.kernel(Unit.of("k.cu"), "k", "p" * len(args))((blocks, 1, 1), threads, *args, shared=shared)


def test_it_has_every_ptx_function() -> None:
    names = [
        set(re.findall(r"^(?:template <[^>]*> )?DEVICE .*?\b(\w+)\(", path.read_text(), re.MULTILINE))
        for path in (CSRC / "ptx.cuh", build.HERE / "include" / "ptx.cuh")
    ]
    assert len(names[0]) > 15 and names[0] <= names[1]
    with_asm = {path.name for path in CSRC.iterdir() if re.search(r"\basm\b", path.read_text())}
    assert with_asm <= {"ptx.cuh", "wgmma.cuh", "context_attention_sm90.cu", "skinny_linear.cuh"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_are_torchs(kernel_folder: Path, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).short().view(dtype)
    wide = torch.full((1 << 16,), torch.nan)
    launch(kernel_folder, "for (; t < 65536; t += 32) a[t] = to_float(b[t]);", wide, every)
    assert torch.equal(wide.nan_to_num(7.5), every.float().nan_to_num(7.5))
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(1)).int()
    between = torch.cat((bits.view(torch.float32), wide * (1 + 2**-12), wide * (1 + 2**-11), wide * 1.0001))
    narrow = torch.zeros(len(between), dtype=dtype)
    body = "for (; t < SIZE; t += 32) a[t] = from_float<std::remove_reference_t<decltype(*a)>>(b[t]);"
    launch(kernel_folder, body.replace("SIZE", str(len(between))), narrow, between)
    assert torch.equal(narrow.float().nan_to_num(7.5), between.to(dtype).float().nan_to_num(7.5))


@pytest.mark.parametrize(
    ("capability", "dtype"), [((8, 0), torch.bfloat16), ((8, 0), torch.float16), ((7, 5), torch.float16)]
)
def test_matrix_instructions_multiply(kernel_folder: Path, capability: Any, dtype: torch.dtype) -> None:
    """16x16 times 16x8: a through ldmatrix, b through ldmatrix with transposition, as the attention kernels do."""
    body = """
      extern __shared__ uint4 memory[];
      auto* x = reinterpret_cast<decltype(b)>(memory);
      auto* y = x + 256;
      for (int i = t; i < 256; i += 32) x[i] = b[i], y[i] = c[i];
      __syncwarp();
      uint32_t left[4], right[4];
      ldmatrix_x4(left, x + (t & 15) * 16 + (t >> 4) * 8);
      ldmatrix_x4_trans(right, y + (t & 15) * 16 + (t >> 4) * 8);
      for (int half = 0; half < 2; half++) {
        float sum[4] = {};
        mma(sum, left, right[2 * half], right[2 * half + 1], *b);
        for (int i = 0; i < 4; i++) a[(t / 4 + i / 2 * 8) * 16 + half * 8 + t % 4 * 2 + i % 2] = sum[i];
      }"""
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(16, 16, generator=g).to(dtype) for _ in range(2))
    out = torch.full((16, 16), torch.nan)
    launch(kernel_folder, body, out, x, y, shared=1024, capability=capability)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-5)


def test_movmatrix_transposes(kernel_folder: Path) -> None:
    x = torch.arange(64).to(torch.float16).view(8, 8)
    out = torch.zeros_like(x)
    body = "((uint32_t*)a)[t] = ptx::movmatrix_trans(((uint32_t*)b)[t]);"
    launch(kernel_folder, body, out, x)
    assert torch.equal(out, x.T)


def test_warps(kernel_folder: Path) -> None:
    out = torch.zeros(6, 32, dtype=torch.int32)
    body = """
      a[t] = __shfl_xor_sync(0xffffffffu, t, 5);
      a[32 + t] = __shfl_up_sync(0xffffffffu, t, 3);
      a[64 + t] = __shfl_down_sync(0xffffffffu, t, 3, 8);
      a[96 + t] = __ballot_sync(0xffffffffu, t % 3 == 0);
      a[128 + t] = __reduce_max_sync(0xffffffffu, t ^ 9);
      a[160 + t] = t < 8 ? __shfl_sync(0xffu, t, 2) : -1;"""
    launch(kernel_folder, body, out)
    lanes = list(range(32))
    ballot = sum(1 << i for i in lanes if i % 3 == 0)
    assert out[0].tolist() == [i ^ 5 for i in lanes]
    assert out[1].tolist() == [max(i - 3, 0) if i >= 3 else i for i in lanes]
    assert out[2].tolist() == [i + 3 if i % 8 + 3 < 8 else i for i in lanes]
    assert out[3].tolist() == [ballot] * 32 and out[4].tolist() == [31] * 32
    assert out[5].tolist() == [2] * 8 + [-1] * 24


def test_shared_memory_is_poisoned_before_each_block(kernel_folder: Path) -> None:
    out = torch.zeros(4, dtype=torch.float32)
    launch(kernel_folder, "__shared__ float s; if (t == 0) { a[blockIdx.x] = s; s = 1.0f; }", out, blocks=4)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a[t + 1] = 0;", r"argument 0|around argument 0"),
        ("a[t] = a[-1];  a[t] = a[-5000];", r"memory that does not exist.*argument 0, which has 128"),
        ("*(volatile int*)nullptr = 1;", "memory that does not exist"),
        ("if (t < 16) __syncwarp();", "wait for each other forever: thread 0 .*at __syncwarp.* returned"),
        ("if (t < 32) ptx::bar_sync<64>(1); else __syncthreads();", "forever.*barrier 1.*__syncthreads"),
        ("a[0] = t < 16 ? __shfl_sync(~0u, t, 1) : __any_sync(~0u, t);", "lanes of a warp are at"),
        ("a[0] = __shfl_sync(1u, t, 0);", "lacks lane"),
        ("((uint4*)(a + 1))[0] = make_uint4(0, 0, 0, 0);", "not aligned"),
        ("int x[4] = {}; a[0] = x[a[t] + 9];", "outside an array"),
        ("ptx::cp_async16(512, a, 16);", "shared memory at 512"),
        ("for (volatile int i = 0; i < 1;) {}", "no end within the time limit"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setattr(gpu, "_SECONDS", 1)
    threads = 64 if "64" in body else 32
    with pytest.raises(EmulationError, match=message):
        launch(kernel_folder, body, torch.zeros(32, dtype=torch.int32), threads=threads)


def test_a_missing_barrier_shows(kernel_folder: Path) -> None:
    """Each thread reads what its neighbour wrote; without a barrier some read poison."""
    for barrier, right in (("__syncthreads();", True), ("", False)):
        out = torch.zeros(256, dtype=torch.int32)
        launch(kernel_folder, f"__shared__ int s[256]; s[t] = t; {barrier} a[t] = s[(t + 37) % 256];", out, threads=256)
        assert torch.equal(out, ((torch.arange(256) + 37) % 256).int()) == right


def test_a_missing_wait_for_a_copy_shows(kernel_folder: Path) -> None:
    body = """
      extern __shared__ float4 s[];
      ptx::cp_async16(shared_address(s + t), b + 4 * t, 16);
      ptx::cp_async_commit_group();
      {wait}
      for (int i = 0; i < 4; i++) a[4 * t + i] = ((float*)s)[4 * t + i];"""
    x = torch.randn(128)
    for wait, right in (("ptx::cp_async_wait_group<0>();", True), ("ptx::cp_async_wait_group<1>();", False)):
        out = torch.zeros(128)
        launch(kernel_folder, body.replace("{wait}", wait), out, x, shared=512)
        assert torch.equal(out, x) == right


def test_launches_that_cuda_refuses(kernel_folder: Path) -> None:
    kernels = EmulatedGpu(kernel_folder)
    with pytest.raises(EmulationError, match="takes the arguments pppi, not ppp"):
        kernels.kernel(Unit.of("step.cu"), "resolve_ids", "ppp")
    with pytest.raises(EmulationError, match="no kernel resolve"):
        kernels.kernel(Unit.of("step.cu"), "resolve", "ppp")
    with pytest.raises(EmulationError, match="clusters, which sm_80 has not"):
        text = build.sources()["rows.cuh"].replace("&& __CUDA_ARCH__ < 900", "&& 0")
        EmulatedGpu(kernel_folder, sources={**build.sources(), "rows.cuh": text}).kernel(
            Unit.of("sample.cu", SPLIT=2), "sample_rows", "plipppp"
        )
    step = kernels.kernel(Unit.of("step.cu"), "resolve_ids", "pppi")
    ids = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(EmulationError, match="1025 threads"):
        step((1, 1, 1), 1025, ids, ids, ids, 4)
    with pytest.raises(EmulationError, match=r"50000 .* bytes of shared memory, 49152 allowed"):
        step((1, 1, 1), 32, ids, ids, ids, 4, shared=50_000)
