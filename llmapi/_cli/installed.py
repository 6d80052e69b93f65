"""Installed: what Python packages are here, and of which version, as checks."""

from __future__ import annotations

import importlib.metadata

from llmapi._cli.check import Check

REQUIRED = {
    "torch": "2.11",
    "transformers": "5.10",
    "huggingface-hub": "1.0",
    "safetensors": "0.5",
    "platformdirs": "4",
    "tqdm": "4.66",
    "filelock": "3.16",
    "numpy": "2",
}
"""Packages without which nothing runs, and their oldest versions, as in pyproject.toml."""


def required(name: str, oldest: str) -> Check:
    """Whether a package is here, of a version that is new enough.

    Args:
        name: of the package.
        oldest: version that will do.
    """
    version = version_of(name)
    remedy = f"pip install '{name}>={oldest}'"
    if version is None:
        return Check(name, False, "not installed", remedy, needed=True)
    if numbers(version) < numbers(oldest):
        return Check(name, False, f"{version} is older than {oldest}", remedy, needed=True)
    return Check(name, True, version, needed=True)


def optional(name: str, parts: tuple[str, ...], remedy: str) -> Check:
    """Whether packages are here that something needs which one can do without.

    Args:
        name: of what needs them.
        parts: the packages.
        remedy: what installs them.
    """
    versions = {part: version_of(part) for part in parts}
    missing = [part for part, version in versions.items() if version is None]
    here = ", ".join(f"{part} {version}" for part, version in versions.items() if version is not None)
    if missing:
        without = f"without {' and '.join(missing)}"
        return Check(name, False, f"{here}, {without}" if here else without, remedy)
    return Check(name, True, here)


def version_of(distribution: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_version(module: str) -> str:
    """Name and version of the package that a module belongs to."""
    names = importlib.metadata.packages_distributions().get(module, [])
    return next((f"{name} {version_of(name)}" for name in names), "installed")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: enough to compare releases.

    >>> numbers("2.11.0+cpu") < numbers("2.9"), numbers("5.10.0.dev0") < numbers("5.10")
    (False, False)
    """
    found = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)
