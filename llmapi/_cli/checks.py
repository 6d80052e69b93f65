"""The checks of ``llmapi doctor``: each looks at one thing and says what it found, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from llmapi._cli import installed, machine
from llmapi._cli.check import Check
from llmapi.errors import CacheError, ConfigError

_LEAST_CACHE = 1_000_000_000
_LATER = "the cpu backend does not need it"
_LOAD_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0].strip("\\0 "))
"""


def groups(root: Path, *, network: bool) -> list[tuple[str, Callable[[], Iterable[Check]]]]:
    """Titles, and the checks under each; a group is looked at when it is called.

    Args:
        root: of the build cache.
        network: whether the hub may be asked.
    """
    return [
        ("System", system),
        ("Packages", packages),
        ("NVIDIA GPUs", gpus),
        ("Build cache", lambda: cache(root)),
        ("Hugging Face hub", lambda: hub(network=network)),
        ("Backends", backends),
    ]


def system() -> list[Check]:
    """Python, operating system, processor and memory."""
    python = f"{platform.python_version()} ({sys.executable})"
    posix = sys.platform.startswith(("linux", "darwin"))
    found = [
        Check("Python", sys.version_info >= (3, 11), python, "install Python 3.11 or newer", needed=True),
        Check("operating system", posix, platform.platform(), "use Linux, or WSL on Windows", needed=True),
        Check("processor", True, f"{machine.processor()}, {machine.cores()} cores for this process"),
    ]
    held = machine.memory()
    if held is None:
        remedy = "give kv_cache_config a size (--kv-max-tokens or --kv-memory-bytes)"
        return [*found, Check("memory", False, "the system does not say how much there is", remedy)]
    return [*found, Check("memory", True, f"{_size(held[0])}, {_size(held[1])} of it free")]


def packages() -> list[Check]:
    """What is installed beside llmapi."""
    found = [installed.required(name, oldest) for name, oldest in installed.REQUIRED.items()]
    if found[0].ok:
        found[0] = _torch(found[0])
    found += [
        _compiler(),
        installed.optional("GGUF files", ("gguf", "sentencepiece"), "pip install 'llmapi[gguf]'"),
        installed.optional("notebook bars", ("ipywidgets", "ipykernel"), "pip install ipywidgets ipykernel"),
        _mpi(),
    ]
    return found


def gpus() -> list[Check]:
    """GPUs and what drives them."""
    seen = machine.gpus()
    if isinstance(seen, str):
        found = [Check("GPU", False, seen, f"to use one, install NVIDIA's driver; {_LATER}")]
    else:
        found = [
            Check(
                f"GPU {i}", True, f"{g.name}, compute capability {g.compute_capability}, {g.memory}, driver {g.driver}"
            )
            for i, g in enumerate(seen)
        ]
    cuda = _torch_sees_cuda()
    found.append(Check("torch with CUDA", cuda is None, cuda or "works", f"install a CUDA build of torch; {_LATER}"))
    later = f"pip install 'llmapi[cuda]'; {_LATER}"
    found.append(
        installed.optional("CUDA for Python", ("cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"), later)
    )
    found.append(_nvrtc(later))
    for name, module, extra in (("TensorRT", "tensorrt", "tensorrt"), ("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx")):
        here = importlib.util.find_spec(module) is not None
        what = installed.module_version(module) if here else "not installed"
        remedy = f"pip install 'llmapi[{extra}]'; {_LATER}"
        found.append(Check(name, here, what, remedy))
    return found


def cache(root: Path) -> list[Check]:
    """Whether builds can be kept in ``root``. What does not exist is not made."""
    from llmapi._build.store import lock as store_lock

    elsewhere = "point LLMAPI_CACHE_DIR, or --cache-dir, to a folder you may write"
    place = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    there = str(root) if place == root.absolute() else f"{root} (made when it is first needed)"
    found = [Check("folder", place.is_dir(), there, f"{place} is no folder; {elsewhere}", needed=True)]
    if not place.is_dir():
        return found
    free = shutil.disk_usage(place).free
    room = "free some space, run llmapi cache prune, or " + elsewhere
    found.append(Check("free space", free >= _LEAST_CACHE, _size(free), room))
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".llmapi-doctor-") as folder:
            found.append(Check("writable", True, "yes"))
            store_lock.check_locks(Path(folder))
            found.append(Check("locks", True, "work on this file system"))
    except CacheError as error:
        found.append(Check("locks", False, str(error), elsewhere, needed=True))
    except OSError as error:
        found.append(Check("writable", False, f"{place}: {error.strerror}; hits still work", elsewhere, needed=True))
    return found


def hub(*, network: bool) -> list[Check]:
    """Whether models can be fetched. The network is left alone unless ``network``."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return [Check("huggingface-hub", False, "not installed")]
    from huggingface_hub import constants, get_token

    found = [Check("models are kept in", True, constants.HF_HUB_CACHE)]
    if constants.is_offline_mode():
        found.append(Check("online", False, "HF_HUB_OFFLINE is set: only what is on this disk is used", "unset it"))
    elif not network:
        found.append(Check("endpoint", True, f"{constants.ENDPOINT} (not contacted; --network tries it)"))
    else:
        reached = _reach(constants.ENDPOINT)
        remedy = "check the network, the proxy and HF_ENDPOINT"
        found.append(Check("endpoint", reached is None, f"{constants.ENDPOINT} {reached or 'answers'}", remedy))
    has_token = get_token() is not None
    what = "there is one" if has_token else "none; gated and private models need one"
    return [*found, Check("token", has_token, what, "set HF_TOKEN, or run 'hf auth login'")]


def backends() -> list[Check]:
    """What this release can run at all."""
    from llmapi.config import BACKENDS, _backend

    found = []
    for name in BACKENDS:
        if name == "tensorrt":
            found.append(_tensorrt())
            continue
        try:
            _backend(name)
            found.append(Check(name, True, "runs"))
        except ConfigError as error:
            found.append(Check(name, False, str(error)))
    return found


def _tensorrt() -> Check:
    """Whether TensorRT builds plans here, and whether it can run them."""
    from llmapi import _device
    from llmapi._build.tensorrt.package import load_package
    from llmapi._runtime.tensorrt_plan import gpu_problem

    try:
        package = load_package()
        problem = _device.cuda_problem() if not _device.cuda_visible() else gpu_problem(package)
    except (ConfigError, ImportError) as error:
        return Check("tensorrt", False, str(error))
    builds = f"builds plans with {package.name} {package.version}"
    if problem is None:
        return Check("tensorrt", True, f"{builds}, and should run them here: none was ever executed on a GPU")
    return Check("tensorrt", False, f"{builds}, and runs none: {problem}", _LATER)


def _compiler() -> Check:
    """Whether the CPU kernels can be compiled; nothing is compiled here."""
    from llmapi import _env
    from llmapi._build.cpu_kernels import NoKernels, find_compiler

    name, without = "compiled CPU kernels", "the cpu backend runs on torch's operators, more slowly"
    if not _env.cpu_kernels():
        return Check(name, False, f"LLMAPI_CPU_KERNELS is 0: {without}", "unset it")
    try:
        path, version = find_compiler()
    except NoKernels as error:
        return Check(name, False, f"{error}: {without}", "install g++ or clang++")
    return Check(name, True, f"by {path}, {version}")


def _torch(check: Check) -> Check:
    """Whether torch can be loaded, and how it was built."""
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        return Check("torch", False, f"{check.found} cannot be loaded: {error}", "install torch again", needed=True)
    cuda = torch.version.cuda
    threads = torch.get_num_threads()
    return Check(
        "torch", True, f"{check.found}, {f'CUDA {cuda}' if cuda else 'CPU'} build, {threads} threads", needed=True
    )


def _torch_sees_cuda() -> str | None:
    """Why torch cannot use a GPU; None where it can."""
    try:
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        return None if torch.cuda.is_available() else "torch sees no GPU"
    except Exception as error:
        return f"torch cannot be loaded ({type(error).__name__})"


def _mpi() -> Check:
    """Whether mpi4py finds an MPI library; in a process of its own, for some libraries end the one that loads them."""
    if installed.version_of("mpi4py") is None:
        return Check("MPI", False, "mpi4py is not installed", f"pip install mpi4py; {_LATER}")
    remedy = f"install an MPI library, such as Open MPI or MPICH; {_LATER}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD_MPI], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("MPI", False, f"mpi4py cannot be tried ({type(error).__name__})", remedy)
    if done.returncode:
        return Check("MPI", False, f"mpi4py {installed.version_of('mpi4py')} finds no MPI library it can load", remedy)
    return Check("MPI", True, f"mpi4py {installed.version_of('mpi4py')}, {done.stdout.strip()}")


def _nvrtc(remedy: str) -> Check:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # not installed, or the library under it is not
        return Check("NVRTC", False, f"cannot be loaded ({type(error).__name__})", remedy)
    return Check("NVRTC", int(status) == 0, f"{major}.{minor}", remedy)


def _reach(endpoint: str) -> str | None:
    """Why the hub cannot be reached; None where it answers."""
    from huggingface_hub import get_session

    try:
        status: int = get_session().head(endpoint, timeout=10).status_code
    except Exception as error:  # of whichever HTTP library is under it
        return f"cannot be reached ({type(error).__name__})"
    return f"answers with status {status}" if status >= 500 else None


def _size(size: int) -> str:
    from llmapi._build.store.disk import size_text

    return size_text(size)
