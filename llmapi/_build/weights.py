"""Weights: checkpoint to canonical tensors. Tensor by tensor, so a model of any size converts in little memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from llmapi._build.tensor_file import SupportsWrite, TensorSpec, Value, write_tensors
from llmapi.errors import CheckpointError
from llmapi.models.family import Family, Take
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import Transformer

if TYPE_CHECKING:
    from llmapi._build.checkpoint import Checkpoint

_SHOWN = 8  # names listed in an error before "... and n more"


def tensor_specs(spec: TransformerSpec, dtype: str) -> list[TensorSpec]:
    """The canonical tensors of a model in the order of the weights file.

    Matrices first, then vectors, each in the order of the module tree: what the rewrites merge (q/k/v, gate/up, and
    their biases) then lies side by side.

    Args:
        spec: the architecture.
        dtype: type they are stored in.
    """
    with torch.device("meta"):
        model = Transformer(spec)
    specs = [TensorSpec(name, dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    return sorted(specs, key=lambda s: len(s.shape) == 1)


Values = Callable[[TensorSpec], Value]
"""Gives the value of a canonical tensor."""


def write_weights(
    out: SupportsWrite, specs: Sequence[TensorSpec], value: Values, progress: Callable[[int], None]
) -> None:
    """Write the weights file.

    Args:
        out: where to.
        specs: as :func:`tensor_specs` gave them.
        value: from :func:`converted` or :func:`dummy`.
        progress: called with the bytes of each tensor.
    """

    def counted(spec: TensorSpec) -> Value:
        progress(spec.nbytes)
        return value(spec)

    write_tensors(out, specs, counted)


def converted(checkpoint: Checkpoint, family: Family, spec: TransformerSpec, specs: Sequence[TensorSpec]) -> Values:
    """Values of the canonical tensors, read from a checkpoint when asked for.

    Args:
        checkpoint: the open files.
        family: whose names they carry.
        spec: the architecture.
        specs: all tensors of the model.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape; all of them are named at once.
    """
    table = family.weights(spec)
    sources = {family.plain_name(name): name for name in checkpoint.tensors}
    _check(checkpoint, family, spec, table, sources, specs)

    def value(target: TensorSpec) -> Value:
        take = table[target.name]
        span = None if take.transpose else checkpoint.span(sources[take.name])
        if span is not None:
            return span if take.rows is None else span.rows(*take.rows)
        return _take(checkpoint.read(sources[take.name]), take)

    return value


def dummy(seed: int) -> Values:
    """Random weights: norm weights are one, biases and matrices normal with a deviation of 0.02. Each tensor depends on
    the seed and its own name alone.

    Args:
        seed: of the random numbers.
    """

    def value(target: TensorSpec) -> torch.Tensor:
        if target.name.endswith("norm.weight"):
            return torch.ones(target.shape)
        generator = torch.Generator().manual_seed(tensor_seed(seed, target.name))
        return torch.empty(target.shape).normal_(0.0, 0.02, generator=generator)

    return value


def tensor_seed(seed: int, name: str) -> int:
    """Seed of one tensor's random numbers: it depends on the model's seed and the tensor's name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _take(tensor: torch.Tensor, take: Take) -> torch.Tensor:
    if take.transpose:
        tensor = tensor.t()
    return tensor if take.rows is None else tensor[take.rows[0] : take.rows[1]]


def _taken_shape(shape: Sequence[int], take: Take) -> tuple[int, ...]:
    sizes = tuple(reversed(shape)) if take.transpose else tuple(shape)
    if take.rows is None:
        return sizes
    return (max(0, min(take.rows[1], sizes[0]) - take.rows[0]), *sizes[1:])


def _check(
    checkpoint: Checkpoint,
    family: Family,
    spec: TransformerSpec,
    table: Mapping[str, Take],
    sources: Mapping[str, str],
    specs: Sequence[TensorSpec],
) -> None:
    wanted = {take.name for take in table.values()}
    missing = sorted(wanted - sources.keys())
    extra = sorted(name for name in sources.keys() - wanted if not family.ignores(name))
    if spec.tie_word_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    wrong = []
    for target in specs:
        take = table[target.name]
        if take.name in sources:
            shape = _taken_shape(checkpoint.tensors[sources[take.name]].shape, take)
            if shape != target.shape:
                wrong.append(f"{sources[take.name]} gives {list(shape)}, config.json wants {list(target.shape)}")
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}" + (f", ... and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint's tensors are not those of a {family.name} model with this config.json: "
            f"{'; '.join(problems)}. Check that config.json and the weight files belong together"
        )
