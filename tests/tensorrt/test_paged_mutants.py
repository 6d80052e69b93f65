"""Mistakes made on purpose on the plugin path's way from a step to its bucket: the loop's text must give each away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from llmapi._build.tensorrt import buckets
from llmapi._runtime import engine_tensorrt_paged, load_tensorrt, padded_step, plan_rows
from llmapi.errors import LLMAPIError
from tests.api.truth import Truth, prompts_of
from tests.tensorrt.fake_paged_runtime import World
from tests.tensorrt.mutants import mutant
from tests.tensorrt.paged_llm import full_tensorrt, make
from tests.tensorrt.paged_models import SIZES
from tests.tiny import tiny_checkpoint

torch.set_num_threads(1)

Expected = tuple[list[torch.Tensor], list[torch.Tensor], list[list[int]]]
PROMPTS = prompts_of([70, 5, 33, 2, 9], seed=12)
FORKED = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True, detokenize=False)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, return_logits="both")
LAST = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, return_logits="generation")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, offline_and_quiet: None) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", **SIZES["llama"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(offline_and_quiet: None) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, full_tensorrt(patch) as found:
        yield found


@pytest.fixture(scope="module")
def expected(model: Path, cache: Path, world: World) -> Expected:
    """Logits and hidden states of transformers, and the forks of the CPU."""
    truth = Truth(model)
    logits = [truth.logits(p + truth.greedy(p, 8)) for p in PROMPTS]
    with LLM(model, cache_dir=cache, backend="cpu") as llm:
        forks = [o.token_ids for o in llm.generate(PROMPTS[0], FORKED).outputs]
    return logits, [truth.states(p) for p in PROMPTS[:3]], forks


def problem(model: Path, cache: Path, expected: Expected) -> str | None:
    """What is wrong with what an LLM gives; None where nothing is."""
    logits, states, forks = expected
    try:
        with make(model, cache) as llm:
            outputs = llm.generate([*PROMPTS[:4], PROMPTS[0]], [GREEDY] * 4 + [FORKED])
            outputs.insert(4, llm.generate(PROMPTS[4], LAST))  # alone: its tokens are one more than a bucket has
            beside = [llm.generate_async(p, LAST) for p in PROMPTS[:2]]
            encoded = llm.encode(PROMPTS[:3])
            outputs += [future.result(60) for future in beside]
    except (
        LLMAPIError,
        AssertionError,
        ValueError,
        RuntimeError,
    ) as error:  # where it is loaded, or all of them failed
        return f"{type(error).__name__}: {error}"
    for prompt, exact, own in zip(PROMPTS, states, encoded, strict=False):
        if not torch.allclose(own, exact, atol=1e-3, rtol=1e-3):
            return f"the hidden states of a prompt of {len(prompt)} are off"
    told = [*zip(PROMPTS, logits, outputs, strict=False), *zip(PROMPTS, logits, outputs[6:], strict=False)]
    for prompt, exact, output in told:
        if output.error is not None:
            return str(output.error)
        found = output.outputs[0].logits
        assert found is not None
        if output.prompt_logits is not None:
            found = torch.cat((output.prompt_logits, found[1:]))
        difference = float((found - exact[:-1][-len(found) :]).abs().max())
        if not difference < 2e-4:
            return f"the logits of a prompt of {len(prompt)} are off by {difference}"
    if outputs[5].error is not None:
        return str(outputs[5].error)
    return None if [o.token_ids for o in outputs[5].outputs] == forks else "the forks differ"


MUTANTS: dict[str, tuple[Any, str, str]] = {
    "padding: sequences of no tokens begin one further": (
        padded_step, '"query_start", batch.query_start, tokens)', '"query_start", batch.query_start, tokens + 1)',
    ),
    "padding: tokens of no sequence have a slot": (padded_step, "NO_SLOT = -1", "NO_SLOT = 0"),
    "padding: one short": (
        padded_step, "        memory[end : at + size] = rest", "        memory[end + 1 : at + size] = rest",
    ),
    "padding: the last of a step's own is overwritten": (
        padded_step, "        memory[end : at + size] = rest", "        memory[end - 1 : at + size] = rest",
    ),
    "a block table of a step before": (
        padded_step, "            tables[row, : len(table)] = table",
        "            old = self.__dict__.setdefault('old', {})\n"
        "            tables[row, : len(table)] = old.setdefault((row, len(table)), [*table])",
    ),
    "a block table without its last block": (
        padded_step, "            tables[row, : len(table)] = table",
        "            tables[row, : len(table) - 1] = table[:-1]",
    ),
    "rows of the neighbours": (
        padded_step, '"logits_indices", batch.logits_indices, 0)',
        '"logits_indices", [max(0, i - 1) for i in batch.logits_indices], 0)',
    ),
    "arrays that overlap": (
        padded_step, "at += -(-math.prod(shape) // step) * step", "at += max(1, math.prod(shape) - 1)",
    ),
    "a bucket of too few tokens": (buckets, "if tokens <= bucket.tokens and", "if tokens <= bucket.tokens + 1 and"),
    "a bucket of too few rows": (buckets, " and rows <= bucket.rows:", ":"),
    "no copy of a shared block": (engine_tensorrt_paged, "        if batch.copies:", "        if False:"),
    "a copy in the other direction": (
        engine_tensorrt_paged, "cache[target] = cache[source]", "cache[source] = cache[target]",
    ),
    "keys alone are copied": (
        engine_tensorrt_paged, "for cache in self._caches.values():", "for cache in list(self._caches.values())[::2]:",
    ),
    "a copy after the step": (
        engine_tensorrt_paged,
        "        if batch.copies:\n            self._copy_blocks(batch.copies)\n"
        "        self._bring(index, batch, sampled)\n        self._run(index, stream)\n",
        "        self._bring(index, batch, sampled)\n        self._run(index, stream)\n"
        "        if batch.copies:\n            self._copy_blocks(batch.copies)\n",
    ),
    "part of a step is not brought over": (
        engine_tensorrt_paged, "self._ints[: step.size].copy_(self._host[: step.size], non_blocking=True)",
        "self._ints[: step.size - 64].copy_(self._host[: step.size - 64], non_blocking=True)",
    ),
    "the host's memory is written while it is copied": (
        engine_tensorrt_paged, "        self._copied.synchronize()", "        pass",
    ),
    "the graph of another bucket": (
        engine_tensorrt_paged, "self._graphs.get(index)", "self._graphs.get(max(self._graphs, default=index))",
    ),
    "a graph of nothing": (
        engine_tensorrt_paged, "                self._graphs[index] = self._gpu.capture(lambda handle: "
        "self._enqueue(index, handle))", "                self._graphs[index] = lambda: None",
    ),
    "other rows of the output": (plan_rows, "self.logits[:count]", "self.logits[1 : count + 1]"),
    "states that are not the rows'": (plan_rows, "self.hidden_states[:count]", "self.hidden_states[1 : count + 1]"),
    "caches without a guard": (engine_tensorrt_paged, "        self._pools.copy_(", "        str("),
}  # fmt: skip


@pytest.mark.parametrize("name", ["none", *MUTANTS])
def test_mistakes_are_noticed(
    name: str, model: Path, cache: Path, world: World, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.reset()
    if name != "none":
        module, old, new = MUTANTS[name]
        made: Any = mutant(module, old, new, monkeypatch)
        if module is padded_step:
            monkeypatch.setattr(engine_tensorrt_paged, "PaddedStep", made.PaddedStep)
        elif module is plan_rows:
            monkeypatch.setattr(engine_tensorrt_paged, "PlanRows", made.PlanRows)
        elif module is buckets:
            monkeypatch.setattr(engine_tensorrt_paged, "choose", made.choose)
        else:
            monkeypatch.setattr(load_tensorrt, "TensorRTPagedEngine", made.TensorRTPagedEngine)
    found = problem(model, cache, expected)
    assert (found is None) == (name == "none"), found


def test_the_mistakes_differ() -> None:
    texts = [(module.__name__, old, new) for module, old, new in MUTANTS.values()]
    assert all(a != b for a, b in itertools.combinations(texts, 2))
