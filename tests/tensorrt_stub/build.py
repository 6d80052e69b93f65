"""Libraries without content for the bindings, and the package ``tensorrt`` that only the whole of TensorRT brings."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("g++")
DISTRIBUTION = "tensorrt-cu13-bindings"

_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def problem() -> str | None:
    """Why the bindings cannot be used here, with the remedy; None where they can."""
    if COMPILER is None:
        return "empty libraries for TensorRT's bindings need g++, and there is none: install it (apt-get install g++)"
    try:
        importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f'{DISTRIBUTION} is not installed: pip install -e ".[dev]"'
    return None


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process in which ``import tensorrt`` finds the bindings.

    Args:
        folder: where libraries and package are made; empty.
    """
    assert COMPILER is not None
    major = importlib.metadata.version(DISTRIBUTION).split(".")[0]
    source = folder / "empty.cpp"
    source.write_text("".join(f'extern "C" void* {name}(...) {{ return nullptr; }}\n' for name in _FUNCTIONS))
    for library in _LIBRARIES:
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", str(source), "-o", str(folder / f"lib{library}.so.{major}")], check=True
        )
    for package, bindings in (("tensorrt", "tensorrt_bindings"), ("tensorrt/plugin", "tensorrt_bindings.plugin")):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(f"from {bindings} import *\n")
    with (folder / "tensorrt/__init__.py").open("a") as file:
        file.write("from tensorrt_bindings import __version__\n")
    paths = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    return {**os.environ, **{name: os.pathsep.join(filter(None, (str(folder), old))) for name, old in paths.items()}}
