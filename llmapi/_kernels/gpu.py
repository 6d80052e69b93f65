"""Gpu: one CUDA device, its kernels compiled and loaded once, launched with little ceremony.

Kernels run on torch's current stream, so that they order with torch's own and can be captured into CUDA graphs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from llmapi._kernels.compiling import FEW, THREADS, Compiling
from llmapi._kernels.nvrtc import DTYPE_MACRO, Unit, architecture, compile_unit
from llmapi.errors import BuildError

CubinSource = Callable[[Unit, str], bytes]
"""Gives the machine code of a unit for an architecture: :func:`compile_unit`, or a cache before it."""

_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "u": ctypes.c_uint32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
}


def dtype_macro(dtype: torch.dtype) -> str:
    """Value of ``LLM_DTYPE`` for a type of torch; see :data:`~llmapi._kernels.nvrtc.DTYPE_MACRO`."""
    return DTYPE_MACRO[str(dtype).removeprefix("torch.")]


class Kernel:
    """One entry point, ready to launch. Not for use from several threads at once.

    Args:
        function: ``CUfunction``.
        signature: one letter per argument: ``p`` pointer or tensor (None is a null pointer), ``i`` int32, ``u`` uint32,
            ``l`` int64, ``f`` float; ``t`` a 128-byte tensor map (``CUtensorMap``), passed by value.
        overlap: launch with programmatic stream serialization: the kernel may start while its predecessor drains, and
            waits in ``pdl_wait()`` (see ``csrc/common.cuh``). Only for kernels that call it.
    """

    def __init__(self, function: Any, signature: str, *, overlap: bool = False) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._function = function
        self._signature = signature
        self._values = [_TYPES[t]() if t != "t" else (ctypes.c_uint64 * 16)() for t in signature]
        self._pointers = (ctypes.c_void_p * max(1, len(signature)))(*[ctypes.addressof(v) for v in self._values])
        self._config = driver.CUlaunchConfig()
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs = [attribute]
            self._config.numAttrs = 1

    def __call__(self, grid: tuple[int, int, int], block: int, *args: Any, shared: int = 0) -> None:
        """Launch on torch's current stream.

        Args:
            grid: blocks in x, y, z.
            block: threads in a block.
            args: as the signature says.
            shared: bytes of dynamic shared memory, at most what :meth:`Gpu.kernel` was given.

        Raises:
            BuildError: CUDA refused the launch.
        """
        for value, kind, arg in zip(self._values, self._signature, args, strict=True):
            if kind == "p":
                value.value = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
            elif kind == "t":
                ctypes.memmove(value, arg, 128)
            else:
                value.value = arg
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        (error,) = self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(self._pointers), 0)
        if int(error) != 0:
            raise BuildError(f"CUDA refused to launch a kernel (grid {grid}, {block} threads, {shared} bytes): {error}")


class Gpu:
    """One device.

    Args:
        device: a CUDA device; its context is made if there is none.
        cubins: where machine code comes from.

    Attributes:
        name, arch: such as ``"NVIDIA H200"`` and ``"sm_90a"``.
        sms: multiprocessors.
        shared_memory: bytes of shared memory that one block may have.
        l2_bytes: bytes of the L2 cache.
        capability: such as ``(9, 0)``.
        overlap: whether programmatic dependent launch is supported (compute capability 9.0 and newer).
    """

    def __init__(self, device: torch.device, cubins: CubinSource = compile_unit) -> None:
        self.device = device
        properties: Any = torch.cuda.get_device_properties(device)
        self.name: str = properties.name
        self.capability = (properties.major, properties.minor)
        self.arch = architecture(*self.capability)
        self.sms: int = properties.multi_processor_count
        self.shared_memory: int = properties.shared_memory_per_block_optin
        self.l2_bytes: int = properties.L2_cache_size
        self.overlap = self.capability >= (9, 0)
        self._pool: Any = None
        self._compiling = Compiling(lambda unit: cubins(unit, self.arch))
        self._modules: dict[Unit, Any] = {}
        self._kernels: dict[tuple[Unit, str], Kernel] = {}
        torch.zeros(1, device=device)  # makes the context that modules are loaded into

    def kernel(self, unit: Unit, entry: str, signature: str, *, shared: int = 0, overlap: bool = False) -> Kernel:
        """An entry point of a unit; compiled and loaded at the first call, looked up at later ones.

        Args:
            unit: the specialization.
            entry: name of an ``extern "C" __global__`` function.
            signature: see :class:`Kernel`.
            shared: most dynamic shared memory that a launch will ask for, in bytes.
            overlap: see :class:`Kernel`; ignored where the GPU cannot.

        Raises:
            BuildError: the unit does not compile, or the GPU refuses it.
        """
        found = self._kernels.get((unit, entry))
        if found is None:
            found = self._kernels[unit, entry] = self._load(unit, entry, signature, shared, overlap and self.overlap)
        return found

    def current(self) -> AbstractContextManager[None]:
        """Make this the device that torch allocates on and launches to."""
        return torch.cuda.device(self.device)

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize(self.device)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free now, once torch has given back what it keeps for later, and bytes in all."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)

    def peak_of(self, run: Callable[[], None]) -> int:
        """Bytes that running this takes at most, beyond what is allocated before."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A CUDA graph of what this launches: what replays it, and the result that it writes.

        Graphs of one Gpu share their memory: none may be replayed while another one's result is still needed.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        if self._pool is None:
            self._pool = graph.pool()
        return graph.replay, out

    def event(self) -> torch.cuda.Event:
        """A new event, to wait for what is on the stream."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def expect(self, units: Iterable[Unit], *, calmly: bool = False) -> None:
        """Begin to compile what will be needed, and return.

        Args:
            units: those that may be asked for; repeated and loaded ones cost nothing.
            calmly: on few cores, as there is other work to do meanwhile.
        """
        self._compiling.begin(self._missing(units), threads=FEW if calmly else THREADS)

    def prefetch(self, units: Iterable[Unit]) -> None:
        """Get the machine code of units ahead of their first use, several at a time: NVRTC compiles on one core each.

        Args:
            units: those that will be asked for; repeated and loaded ones cost nothing.

        Raises:
            BuildError: one does not compile.
        """
        for future in self._compiling.begin(self._missing(units)):
            future.result()

    def _missing(self, units: Iterable[Unit]) -> list[Unit]:
        return [unit for unit in units if unit not in self._modules]

    def _load(self, unit: Unit, entry: str, signature: str, shared: int, overlap: bool) -> Kernel:
        from cuda.bindings import driver

        with torch.cuda.device(self.device):
            module = self._modules.get(unit)
            if module is None:
                error, module = driver.cuModuleLoadData(self._compiling.take(unit))
                _check(error, f"loading {unit.label} on {self.name}")
                self._modules[unit] = module
            error, function = driver.cuModuleGetFunction(module, entry.encode())
            _check(error, f"finding {entry} in {unit.label}")
            if shared > 48 << 10:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (error,) = driver.cuFuncSetAttribute(function, attribute, shared)
                _check(error, f"giving {entry} {shared} bytes of shared memory")
        return Kernel(function, signature, overlap=overlap)

    def close(self) -> None:
        """Unload the modules, and give back what torch and cuBLAS keep for later. Nothing that launches or replays may
        run any more, and no tensor should be left.
        """
        from cuda.bindings import driver

        self._compiling.close()
        self._kernels.clear()
        self._pool = None
        while self._modules:
            driver.cuModuleUnload(self._modules.popitem()[1])
        clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()


def _check(error: Any, what: str) -> None:
    if int(error) != 0:
        raise BuildError(f"CUDA failed at {what}: {error}")
