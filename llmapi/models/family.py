"""Family: what turns one kind of Hugging Face checkpoint into a TransformerSpec and named tensors."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmapi.errors import UnsupportedModelError, unknown_name
from llmapi.models.spec import TransformerSpec


@dataclass(frozen=True)
class Take:
    """Where a canonical tensor comes from.

    Attributes:
        name: tensor of the checkpoint, without the family's prefix.
        transpose: the checkpoint stores it as ``[in, out]``.
        rows: after transposing, the half-open range of output rows to take; None for all.
    """

    name: str
    transpose: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: the family's name, for messages.
        architectures: values of ``architectures[0]`` in config.json that belong to it.
        spec: config.json to spec; raises UnsupportedModelError for options that would change the mathematics.
        weights: spec to the table from canonical tensor name to its origin.
        prefix: what checkpoints of whole models put before the names of the table.
        ignore: patterns of checkpoint tensors that hold nothing to load (masks, cached tables).
    """

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[Mapping[str, Any]], TransformerSpec]
    weights: Callable[[TransformerSpec], dict[str, Take]]
    prefix: str = ""
    ignore: tuple[str, ...] = ()

    def plain_name(self, name: str) -> str:
        """A checkpoint's tensor name as the table spells it."""
        return name.removeprefix(self.prefix)

    def ignores(self, name: str) -> bool:
        """Whether this tensor (plain name) holds nothing to load."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)


@cache
def families() -> dict[str, Family]:
    """Every known architecture name and its family: one module each in ``llmapi/models/families``."""
    from llmapi.models import families as package

    found: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        family: Family = importlib.import_module(f"{package.__name__}.{info.name}").FAMILY
        found.update(dict.fromkeys(family.architectures, family))
    return found


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to.

    Args:
        config: parsed config.json.

    Raises:
        UnsupportedModelError: it names no architecture, or one that no family claims.
    """
    names = config.get("architectures") or []
    if not names:
        raise UnsupportedModelError(
            'config.json names no architecture: it needs a field like "architectures": ["LlamaForCausalLM"]'
        )
    family = families().get(names[0])
    if family is None:
        raise UnsupportedModelError(unknown_name("architecture", names[0], families()))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"the checkpoint is already quantized ({method}): use the original checkpoint of this model instead"
        )
    return family


def spec_of(config: Mapping[str, Any]) -> TransformerSpec:
    """The architecture that a config.json describes.

    Args:
        config: parsed config.json.

    Raises:
        UnsupportedModelError: unknown architecture, missing field or an option that is not supported.
    """
    family = family_of(config)
    try:
        return family.spec(config)
    except KeyError as missing:
        raise UnsupportedModelError(f"config.json of this {family.name} model lacks the field {missing}") from None
