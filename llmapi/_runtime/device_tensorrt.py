"""TensorRTDevice: what engines of TensorRT ask of torch's current GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._runtime.fit import RESERVE
from llmapi._runtime.padded_step import ALIGNMENT
from llmapi._runtime.weights_cuda import read_weights


class TensorRTDevice:
    """A GPU, and a stream on it that plans run on."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name()
        self.driver = int(getattr(torch._C, "_cuda_getDriverVersion", int)())
        self._own: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def read_weights(self, graph: Graph, file: TensorFile, done: Callable[[int], None]) -> Mapping[str, torch.Tensor]:
        """The graph's weights by name, on the device, at addresses that TensorRT takes."""
        return read_weights(graph, file, self.device, done, ALIGNMENT)

    def free_bytes(self, utilization: float) -> int:
        """Bytes that the cache may take: of the share that may be used, what is not used yet."""
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, int(total * utilization) - (total - free) - RESERVE)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A stream of our own, in order with the one that the caller works on; its handle."""
        caller: Any = torch.cuda.current_stream(self.device)
        self._own.wait_stream(caller)
        with torch.cuda.stream(self._own):
            yield int(self._own.cuda_stream)
        caller.wait_stream(self._own)

    def pinned(self, count: int) -> torch.Tensor:
        """``[count]`` int32 of the host's memory that the GPU copies from while the host goes on."""
        return torch.empty(count, dtype=torch.int32, pin_memory=True)

    def event(self) -> Any:
        """A new event: ``record()`` marks a place in the current stream, and ``synchronize()`` waits for it."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[int], None]) -> Callable[[], None]:
        """A CUDA graph of what is launched, and not run; what is returned runs it on the current stream.

        Args:
            run: launches on the stream whose handle it is given, and neither allocates nor waits.

        Raises:
            RuntimeError: CUDA cannot capture it.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run(int(torch.cuda.current_stream(self.device).cuda_stream))
        return graph.replay

    def synchronize(self) -> None:
        """Wait until nothing runs any more."""
        torch.cuda.synchronize(self.device)
