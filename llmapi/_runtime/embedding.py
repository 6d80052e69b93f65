"""Embedding: final hidden states of texts, whole or pooled."""

from __future__ import annotations

from typing import Any

import torch

from llmapi._runtime.inputs import RequestMaker, listed, naming
from llmapi._runtime.probe import HiddenProbe, MeanProbe, Probe
from llmapi._runtime.request import Request
from llmapi._runtime.scoring import Run
from llmapi.errors import ConfigError, unknown_name

POOLINGS = ("last", "mean", "cls")


def embed(maker: RequestMaker, texts: Any, pooling: str, normalize: bool, run: Run, bar: bool) -> torch.Tensor:
    """See :meth:`llmapi.LLM.embed`."""
    if pooling not in POOLINGS:
        raise ConfigError(unknown_name("pooling", pooling, POOLINGS))
    if not isinstance(normalize, bool):
        raise ConfigError(f"normalize={normalize!r}: give True or False")
    items, single = listed(texts, "texts")
    requests: list[Request] = []
    for index, item in enumerate(items):
        with naming(index, texts=not single):
            ids = maker.ids(item)[1]
            if pooling == "cls":
                ids = ids[:1]  # no later token has a part in the first one's state
            probe: Probe = MeanProbe() if pooling == "mean" else HiddenProbe(len(ids) - 1)
            requests.append(maker.probing(ids, probe, "a text"))
    run(requests, bar)
    rows = [request.probe.result for request in requests if request.probe is not None]
    out = torch.cat(rows) if rows else torch.empty(0, 0)
    if normalize:
        out = torch.nn.functional.normalize(out, dim=1)
    return out[0] if single else out


def encode(maker: RequestMaker, texts: Any, run: Run, bar: bool) -> torch.Tensor | list[torch.Tensor]:
    """See :meth:`llmapi.LLM.encode`."""
    items, single = listed(texts, "texts")
    requests: list[Request] = []
    for index, item in enumerate(items):
        with naming(index, texts=not single):
            requests.append(maker.probing(maker.ids(item)[1], HiddenProbe(), "a text"))
    run(requests, bar)
    out = [request.probe.result for request in requests if request.probe is not None]
    return out[0] if single else out
