"""llmapi: run large language models from one Python class. Weights are fetched, converted, built and cached by it.

>>> from llmapi import LLM, SamplingParams  # doctest: +SKIP
>>> llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
>>> llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2)).text  # doctest: +SKIP
' Paris.'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmapi._build.report import BuildReport
    from llmapi._runtime.results import RequestFuture
    from llmapi.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from llmapi.config import KvCacheConfig
    from llmapi.errors import (
        BuildError,
        CacheError,
        CapacityError,
        CheckpointError,
        ConfigError,
        EngineClosedError,
        GatedModelError,
        LLMAPIError,
        ModelNotFoundError,
        OfflineError,
        PromptTooLongError,
        RequestError,
        SourceError,
        UnsupportedModelError,
    )
    from llmapi.guided import GuidedDecodingParams
    from llmapi.llm import LLM
    from llmapi.outputs import CompletionOutput, Logprob, Perplexity, RequestMetrics, RequestOutput, Score
    from llmapi.sampling import SamplingParams

__version__ = "0.1.0"

# Where each public name lives: modules are loaded on first use, so importing llmapi costs nothing.
_HOMES = {
    "BeamSearchOutput": "beam_search",
    "BeamSearchParams": "beam_search",
    "BeamSearchSequence": "beam_search",
    "BuildError": "errors",
    "BuildReport": "_build.report",
    "CacheError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "CompletionOutput": "outputs",
    "ConfigError": "errors",
    "EngineClosedError": "errors",
    "GatedModelError": "errors",
    "GuidedDecodingParams": "guided",
    "KvCacheConfig": "config",
    "LLM": "llm",
    "LLMAPIError": "errors",
    "Logprob": "outputs",
    "ModelNotFoundError": "errors",
    "OfflineError": "errors",
    "Perplexity": "outputs",
    "PromptTooLongError": "errors",
    "RequestError": "errors",
    "RequestFuture": "_runtime.results",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling",
    "Score": "outputs",
    "SourceError": "errors",
    "UnsupportedModelError": "errors",
}

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "BuildError",
    "BuildReport",
    "CacheError",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineClosedError",
    "GatedModelError",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "LLMAPIError",
    "Logprob",
    "ModelNotFoundError",
    "OfflineError",
    "Perplexity",
    "PromptTooLongError",
    "RequestError",
    "RequestFuture",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "SourceError",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmapi' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"llmapi.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
