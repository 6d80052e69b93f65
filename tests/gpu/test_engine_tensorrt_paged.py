"""The plugin path's engine between CUDA's calls: pinned copies, streams, capture and replay. No TensorRT is needed."""

from __future__ import annotations

import pytest
import torch

from llmapi._runtime.device_tensorrt import TensorRTDevice
from tests.tensorrt.echo import EchoContext, drive, echo_engine, on_gpu

pytestmark = pytest.mark.gpu
CYCLES = 2_000_000  # of a launch that holds up what comes after it; about a millisecond


class StreamContext(EchoContext):
    """Launches on the stream whose handle it is given."""

    def execute_async_v3(self, stream: int) -> bool:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            return super().execute_async_v3(stream)


def test_steps_that_are_queued_keep_their_own_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty steps are launched faster than they run; each must see its own, by launches and by graphs."""
    gpu = TensorRTDevice()
    engine = echo_engine(gpu, lambda: StreamContext(on_gpu, lambda: torch.cuda._sleep(CYCLES)), monkeypatch)
    try:
        drive(engine, 40)
        assert sorted(engine._graphs) == [0, 1, 2], "steps of decoding were captured"
    finally:
        engine.close()


def test_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = TensorRTDevice()
    engine = echo_engine(gpu, lambda: StreamContext(on_gpu, lambda: torch.cuda._sleep(CYCLES)), monkeypatch)
    try:
        engine._captured = 0
        drive(engine, 40)
        assert not engine._graphs
    finally:
        engine.close()


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = TensorRTDevice()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = echo_engine(gpu, lambda: StreamContext(on_gpu, lambda: None), monkeypatch)
    drive(engine, 6)
    engine.close()
    del engine
    assert torch.cuda.memory_allocated() <= before + (1 << 16)
