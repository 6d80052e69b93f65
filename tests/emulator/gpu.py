"""EmulatedGpu: takes the place of :class:`llmapi._kernels.gpu.Gpu`, with tensors on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmapi._kernels.gpu import _TYPES
from llmapi._kernels.nvrtc import Unit, architecture
from tests.emulator import build
from tests.emulator.tensor_map import BYTES, EmulatedTensorMap

_USUAL_SHARED = 48 << 10  # bytes that a block gets without being asked for before
_SECONDS = 60  # of processor time that a launch may take
_SECONDS_OF_HASTY = 10  # where kernels run on little


class EmulationError(Exception):
    """A kernel did what it must not do; the message says what, and which thread."""


class NoEvent:
    """Stands for ``torch.cuda.Event``: every launch is over when it returns."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class EmulatedGpu:
    """A GPU of a few multiprocessors that is no GPU.

    Args:
        folder: where compiled kernels are kept.
        capability: whose code runs: what ``__CUDA_ARCH__`` is. Clusters from (9, 0) on.
        sms: multiprocessors, by which launches are sized.
        shared_memory: bytes of shared memory that a block may have.
        sources: texts of the kernels, if not the project's own.
        hasty: for kernels that run a few times, on little: they are compiled where they are launched first, are not
            optimized, and are soon given up.

    Attributes:
        seed: of the order in which threads run; goes up by one with each launch.
    """

    def __init__(
        self,
        folder: Path,
        *,
        capability: tuple[int, int] = (8, 0),
        sms: int = 4,
        shared_memory: int = 99 << 10,
        sources: build.Sources | None = None,
        hasty: bool = False,
    ) -> None:
        self.device = torch.device("cpu")
        self.capability, self.sms, self.shared_memory = capability, sms, shared_memory
        self.arch = architecture(*capability)
        self.name = f"emulated {self.arch}"
        self.overlap = capability >= (9, 0)
        self.l2_bytes = 1 << 20
        self.seed = 0
        self.hasty, self._folder = hasty, folder
        self._sources = build.sources() if sources is None else sources
        self._runtime = _load_runtime(folder)
        self._kernels: dict[tuple[Unit, str], EmulatedKernel] = {}

    def event(self) -> NoEvent:
        """See :meth:`llmapi._kernels.gpu.Gpu.event`."""
        return NoEvent()

    def kernel(
        self, unit: Unit, entry: str, signature: str, *, shared: int = 0, overlap: bool = False
    ) -> EmulatedKernel:
        """See :meth:`llmapi._kernels.gpu.Gpu.kernel`; ``overlap`` has no meaning here.

        Raises:
            BuildFailure: the unit does not compile.
            EmulationError: there is no such kernel, or it has other parameters.
        """
        found = self._kernels.get((unit, entry))
        if found is None:
            found = EmulatedKernel(self, unit, entry, signature, shared)
            if not self.hasty:
                found.load()
            self._kernels[unit, entry] = found
        return found

    def compiled(self, unit: Unit) -> Path:
        """The shared object of a unit."""
        return build.shared_object(unit, self.arch, self._folder, self._sources, optimize=not self.hasty)

    def prefetch(self, units: Iterable[Unit]) -> None:
        """Compile units, two at a time."""
        if not self.hasty:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(self.compiled, dict.fromkeys(units)))

    def close(self) -> None:
        """See :meth:`llmapi._kernels.gpu.Gpu.close`."""
        self._kernels.clear()


class EmulatedKernel:
    """One entry point; see :class:`llmapi._kernels.gpu.Kernel`."""

    def __init__(self, gpu: EmulatedGpu, unit: Unit, entry: str, signature: str, shared: int) -> None:
        self._gpu, self._unit, self._entry, self._signature, self._shared = gpu, unit, entry, signature, shared
        self._label, self._runtime = f"{entry} of {unit.label}", gpu._runtime
        self._loaded = False

    def load(self) -> None:
        """Compile it, if nobody has, and see that it is what was asked for."""
        gpu, unit, entry, signature, runtime = self._gpu, self._unit, self._entry, self._signature, self._runtime
        path = gpu.compiled(unit)
        first = _load_unit(path)
        found = runtime.emulated_entry(first, entry.encode())
        if not found:
            raise EmulationError(f"{unit.label} has no kernel {entry}")
        theirs = runtime.emulated_signature(found).decode()
        if theirs != signature:
            raise EmulationError(f"{self._label} takes the arguments {theirs}, not {signature}")
        self._cluster: int = runtime.emulated_cluster_size(found)
        if self._cluster > 1 and not gpu.overlap:
            raise EmulationError(f"{self._label} runs in clusters, which {gpu.arch} has not")
        copies = [first]
        for rank in range(1, self._cluster):  # each block of a cluster has __shared__ variables of its own
            copy = path.with_suffix(f".{rank}.so")
            if not copy.exists():
                own = copy.with_suffix(f".{os.getpid()}.part")
                shutil.copy(path, own)
                own.replace(copy)
            copies.append(_load_unit(copy))
        self._units = (ctypes.c_void_p * len(copies))(*copies)
        self._static: int = runtime.emulated_static_shared(first)
        # Gpu asks for more than the usual 48 KiB only where the dynamic part alone is larger.
        self._most = min(
            gpu.shared_memory, self._shared + self._static if self._shared > _USUAL_SHARED else _USUAL_SHARED
        )
        self._loaded = True

    def __call__(self, grid: tuple[int, int, int], block: int, *args: Any, shared: int = 0) -> None:
        """Run a launch to its end.

        Kernels get copies of tensors that lie between memory which cannot be touched; they are then copied back.

        Raises:
            EmulationError: the launch is one that CUDA refuses, or the kernel is wrong.
        """
        if not self._loaded:
            self.load()
        x, y, z = grid
        if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16 and 0 < block <= 1024) or x % self._cluster:
            raise EmulationError(
                f"CUDA refuses {self._label} with grid {grid}, {block} threads, {self._cluster} a cluster"
            )
        if shared and shared + self._static > self._most:  # the compiler sees to what is static alone
            raise EmulationError(
                f"CUDA refuses {self._label}: {shared} + {self._static} bytes of shared memory, {self._most} allowed"
            )
        guarded: dict[int, _Guarded] = {}
        values: list[Any] = []
        try:
            for kind, arg in zip(self._signature, args, strict=True):
                if kind == "p" and isinstance(arg, torch.Tensor):
                    assert arg.device.type == "cpu"
                    arg = self._copy_of(arg, guarded, len(values))
                if kind == "t":
                    values.append(self._map(arg, guarded, len(values)))
                else:
                    values.append(_TYPES[kind](arg))
            pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(v) for v in values])
            self._gpu.seed += 1
            wrong = self._runtime.emulated_launch(
                self._units, self._entry.encode(), (ctypes.c_uint32 * 3)(*grid), block, shared, pointers,
                self._gpu.seed, min(_SECONDS, _SECONDS_OF_HASTY) if self._gpu.hasty else _SECONDS,
            )  # fmt: skip
            message = wrong.decode() if wrong else ""
            address = self._runtime.emulated_fault_address()
            for memory in guarded.values():
                message += memory.copy_back(address)
            if message:
                raise EmulationError(f"{self._label}: {message}")
        finally:
            for memory in guarded.values():
                memory.free()

    def _copy_of(self, tensor: torch.Tensor, guarded: dict[int, _Guarded], argument: int) -> int:
        """Where the first element of a tensor lies in the guarded copy of its storage, made if there is none."""
        storage = tensor.untyped_storage()
        memory = guarded.get(storage.data_ptr())
        if memory is None:
            memory = guarded[storage.data_ptr()] = _Guarded(self._runtime, storage, argument)
        return memory.at + tensor.data_ptr() - storage.data_ptr()

    def _map(self, address: int, guarded: dict[int, _Guarded], argument: int) -> Any:
        """A tensor map, of the copy of its tensor; in memory that is aligned as a kernel's parameters are."""
        made = EmulatedTensorMap.made[address]
        space = (ctypes.c_char * (BYTES + 64))()
        aligned = (ctypes.c_char * BYTES).from_buffer(space, -ctypes.addressof(space) % 64)
        aligned[:] = made.bytes_at(self._copy_of(made.tensor, guarded, argument))
        return aligned


class _Guarded:
    """A storage's bytes between memory that cannot be touched."""

    def __init__(self, runtime: Any, storage: torch.UntypedStorage, argument: int) -> None:
        self._runtime, self._storage, self._argument = runtime, storage, argument
        self._base, self._whole = ctypes.c_void_p(), ctypes.c_size_t()
        self.at: int = runtime.emulated_guarded(
            storage.nbytes(), storage.data_ptr() % 16, ctypes.byref(self._base), ctypes.byref(self._whole)
        )
        ctypes.memmove(self.at, storage.data_ptr(), storage.nbytes())

    def copy_back(self, fault: int | None) -> str:
        """What was written, to the storage; and what is to be said about this argument."""
        size, base = self._storage.nbytes(), self._base.value or 0
        ctypes.memmove(self._storage.data_ptr(), self.at, size)
        if fault and base <= fault < base + self._whole.value:
            return f"; {fault - self.at} bytes from the start of argument {self._argument}, which has {size}"
        if not self._runtime.emulated_unharmed(self.at, size, self._base, self._whole):
            return f"; bytes around argument {self._argument} were written"
        return ""

    def free(self) -> None:
        self._runtime.emulated_free(self._base, self._whole)


_runtimes: dict[Path, Any] = {}
_units: dict[Path, int] = {}


def _load_runtime(folder: Path) -> Any:
    path = build.runtime(folder)
    if path not in _runtimes:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        p, i, size, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
        for name, result, *arguments in (
            ("emulated_entry", p, p, text),
            ("emulated_signature", text, p),
            ("emulated_cluster_size", i, p),
            ("emulated_static_shared", ctypes.c_long, p),
            ("emulated_fault_address", p),
            ("emulated_launch", text, p, text, p, i, ctypes.c_long, p, ctypes.c_uint64, ctypes.c_long),
            ("emulated_guarded", p, size, size, p, p),
            ("emulated_unharmed", ctypes.c_bool, p, size, p, size),
            ("emulated_free", None, p, size),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _runtimes[path] = library
    return _runtimes[path]


def _load_unit(path: Path) -> int:
    """Address of the description of a unit."""
    if path not in _units:
        function = ctypes.CDLL(str(path)).emulated_unit
        function.restype = ctypes.c_void_p
        _units[path] = function()
    return _units[path]
