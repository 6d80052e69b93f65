"""Weights on the GPU: from the mapped file through a few pinned buffers, or random ones made there."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmapi._build.graph import Graph, Input
from llmapi._build.tensor_file import TensorFile
from llmapi._build.weights import tensor_seed

_CHUNK = 32 << 20  # bytes of one pinned buffer
_READERS = 4  # threads that read the file, each with two buffers
_ALIGNMENT = 16  # bytes; what the kernels' accesses need


def read_weights(
    graph: Graph,
    file: TensorFile,
    device: torch.device,
    progress: Callable[[int], None],
    alignment: int = _ALIGNMENT,
) -> dict[str, torch.Tensor]:
    """The graph's weights by input name: views of one copy of the file on the GPU.

    Args:
        graph: the step.
        file: its weights.
        device: the GPU.
        progress: called with the bytes of each part that has arrived, from any thread.
        alignment: bytes that every address is to be a multiple of; a tensor that lies otherwise is copied.
    """
    data = torch.empty(file.nbytes, dtype=torch.uint8, device=device)
    copy_file(file.path, data, progress)
    views = file.moved(data)
    return {i.name: _aligned(views.read(i.parts), alignment) for i in graph.inputs if i.kind == "weight"}


def copy_file(path: Path, target: torch.Tensor, progress: Callable[[int], None]) -> None:
    """Copy a file to the GPU; at most 256 MB of pinned memory are used.

    Args:
        path: of the file.
        target: ``[bytes]`` uint8 on the GPU, as long as the file.
        progress: called with the bytes of each part that has arrived.
    """
    total = target.numel()
    descriptor = os.open(path, os.O_RDONLY)

    def reader(number: int) -> None:
        with torch.cuda.device(target.device):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            buffers = [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            events = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
            for turn, start in enumerate(range(number * _CHUNK, total, _READERS * _CHUNK)):
                buffer, event, size = buffers[turn % 2], events[turn % 2], min(_CHUNK, total - start)
                event.synchronize()
                view, done = memoryview(buffer.numpy().data), 0
                while done < size:
                    read = os.preadv(descriptor, [view[done:size]], start + done)
                    if not read:
                        raise OSError(f"{path} ended at byte {start + done} of {total}")
                    done += read
                with torch.cuda.stream(stream):
                    target[start : start + size].copy_(buffer[:size], non_blocking=True)
                    event.record()
                progress(size)
            stream.synchronize()

    torch.cuda.synchronize(target.device)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            for future in [pool.submit(reader, number) for number in range(_READERS)]:
                future.result()
    finally:
        os.close(descriptor)


def random_weights(
    graph: Graph, seed: int, dtype: torch.dtype, device: torch.device, progress: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Random weights of the same distribution as those of :func:`llmapi._build.weights.dummy`, made on the GPU.

    Args:
        graph: the step.
        seed: of the random numbers; each tensor depends on it and on its own name alone.
        dtype: of the weights.
        device: the GPU.
        progress: called with the bytes of each tensor.
    """
    out = {}
    for entry in graph.inputs:
        if entry.kind == "weight":
            out[entry.name] = _random(entry, seed, dtype, device)
            progress(out[entry.name].nbytes)
    return out


def _random(entry: Input, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    shape = [int(size) for size in entry.shape]
    if entry.name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(tensor_seed(seed, entry.name))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)


def _aligned(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % alignment else tensor
