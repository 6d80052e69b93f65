"""NativeKernels: the compiled functions of ``csrc_cpu/``, on the threads that torch itself uses.

They take contiguous float32 tensors on the CPU (int32 indices). What they do not cover stays with torch; the module of
each operator decides that.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

LANES = 16
"""Heads are read this many channels at a time: other sizes stay with torch."""

MAX_HEAD_DIM = 256
MAX_GROUP = 96
"""Limits of the attention kernel: channels of a head, query heads of a key head."""

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[type]] = {
    "pack_linear": [_P] * 2 + [_I] * 2 + [_N],
    "linear": [_P] * 4 + [_I] * 3 + [_N],
    "rms_norm": [_P] * 5 + [_I] * 2 + [_F, _N],
    "add_layer_norm": [_P] * 6 + [_I] * 2 + [_F, _N],
    "gated_activation": [_P] * 2 + [_I] * 2 + [_N, _N],
    "rotary_kv_write": [_P] * 6 + [_I] * 5 + [_N, _N],
    "paged_attention": [_P] * 9 + [_I] * 7 + [_F, _F, _N],
}


class NativeKernels:
    """The compiled library.

    Args:
        path: the shared object. It is executed: only load what this user compiled.

    Attributes:
        path: as given.
        packed_size, pack_linear, linear, rms_norm, add_layer_norm, gated_activation, rotary_kv_write, paged_attention:
            the C functions of ``csrc_cpu/kernels.cpp``, which take addresses and sizes; the GIL is free meanwhile.

    Raises:
        OSError: it cannot be loaded, or torch's OpenMP runtime cannot be found in this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        run = _torch_pool()
        library = ctypes.CDLL(str(path))
        try:
            for name, arguments in _SIGNATURES.items():
                function = getattr(library, f"llmapi_{name}")
                function.argtypes, function.restype = arguments, None
                setattr(self, name, function)
            self.packed_size = library.llmapi_packed_size
            self.packed_size.argtypes, self.packed_size.restype = [_I, _I], _I
            library.llmapi_use_pool.argtypes = [ctypes.c_void_p]
            library.llmapi_use_pool(run)
        except AttributeError as error:
            raise OSError(f"{path} does not hold the kernels of this llmapi: {error}") from error

    pack_linear: ctypes._NamedFuncPointer
    linear: ctypes._NamedFuncPointer
    rms_norm: ctypes._NamedFuncPointer
    add_layer_norm: ctypes._NamedFuncPointer
    gated_activation: ctypes._NamedFuncPointer
    rotary_kv_write: ctypes._NamedFuncPointer
    paged_attention: ctypes._NamedFuncPointer


def _torch_pool() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded.

    Two pools of threads on the same cores would wait for each other, so the library links none of its own.
    """
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    paths = sorted(set(re.findall(r"/\S[^\n]*/lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*", text)))
    home = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda p: not p.startswith(home)):
        try:
            found = ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if found:
            return found
    raise OSError("torch's OpenMP runtime was not found in this process")
