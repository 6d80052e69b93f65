"""Independent truth: the same checkpoint run by transformers in float32."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmapi import LLM, SamplingParams
from tests.tiny import VOCAB

FIRST_PLAIN = 5  # ids below are special


class Truth:
    """A checkpoint in transformers.

    Args:
        folder: the checkpoint.
        load: arguments of ``from_pretrained``.
    """

    def __init__(self, folder: Path, **load: Any) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **load)
        self.model = model.eval()
        self._seen: dict[Any, list[int]] = {}

    def greedy(self, ids: Sequence[int], count: int, eos: int | list[int] | None = None, **options: Any) -> list[int]:
        """What greedy ``generate`` appends to ``ids``; ``eos=None`` never ends early."""
        key = (tuple(ids), count, str(eos), str(options))
        if key not in self._seen:
            given = torch.tensor([list(ids)])
            config = transformers.GenerationConfig(
                do_sample=False, max_new_tokens=count, eos_token_id=eos, pad_token_id=0, bos_token_id=0, **options
            )
            with torch.no_grad():
                self.model.generation_config = config
                out = self.model.generate(given, attention_mask=torch.ones_like(given))
            self._seen[key] = out[0, len(ids) :].tolist()
        return self._seen[key]

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """``[len(ids), V]``: row ``t`` predicts token ``t + 1``."""
        return self.model(torch.tensor([list(ids)])).logits[0].float()

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-softmax of :meth:`logits` in float64."""
        return self.logits(ids).double().log_softmax(-1)

    @torch.no_grad()
    def states(self, ids: Sequence[int]) -> torch.Tensor:
        """``[len(ids), hidden_size]`` hidden states after the last norm."""
        return self.model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]

    def check_probes(self, llm: LLM, text: list[int], other: list[int], tolerance: float) -> None:
        """Compare what the LLM says of the last third of ``text``, and the hidden states of both."""
        states = [self.states(ids) for ids in (text, other)]
        for found, exact in zip(llm.encode([text, other], use_tqdm=False), states, strict=True):
            torch.testing.assert_close(found, exact, atol=tolerance, rtol=tolerance)
        mean = llm.embed([text, other], "mean", normalize=False, use_tqdm=False)
        torch.testing.assert_close(mean, torch.stack([s.mean(0) for s in states]), atol=tolerance, rtol=tolerance)
        cut = 2 * len(text) // 3
        [score] = llm.score([text[:cut]], [text[cut:]], use_tqdm=False)  # type: ignore[misc]
        expected = [row[token].item() for row, token in zip(self.logprobs(text)[cut - 1 : -1], text[cut:], strict=True)]
        assert score.logprobs == pytest.approx(expected, abs=tolerance)


def check_half(llm: LLM, folder: Path, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    """Logits of prompts and of greedy texts are as near to those of float32 as transformers' own of 16 bits.

    Args:
        llm: computes in 16 bits.
        folder: its checkpoint.
        prompts: token ids.
        dtype: its type.
    """
    exact, half = Truth(folder), Truth(folder)
    half.model = half.model.to(dtype)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, return_logits="both")
    for prompt, output in zip(prompts, llm.generate([list(p) for p in prompts], params), strict=True):
        [completion] = output.outputs
        assert output.prompt_logits is not None and completion.logits is not None
        ids = [*prompt, *completion.token_ids]
        found, truth = torch.cat([output.prompt_logits, completion.logits[1:]]).float(), exact.logits(ids)
        allowed = float((half.logits(ids) - truth).square().mean().sqrt())
        assert 0 < float((found - truth[:-1]).square().mean().sqrt()) < 1.5 * allowed


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(FIRST_PLAIN, VOCAB) for _ in range(length)] for length in lengths]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition; fail when it does not come true in time."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not come true in time"
        time.sleep(0.002)


def idle(llm: LLM) -> bool:
    """Whether nothing runs and every KV block is free, with the pool's own account in order."""
    pool = llm._loop._scheduler.pool
    if llm._loop._jobs or llm._loop._scheduler.has_work or pool.num_free != pool.num_blocks:
        return False
    pool.check([])
    return True


@contextmanager
def together(llm: LLM, count: int) -> Iterator[None]:
    """Holds the loop until ``count`` requests have arrived: however slow the caller is, they begin in one step."""
    loop = llm._loop
    admit, arrived = loop._admit, threading.Event()

    def held() -> None:
        if not arrived.is_set():
            until(lambda: len(loop._arriving) >= count)
            arrived.set()
        admit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_admit", held)
        yield


@contextmanager
def mixed_steps(llm: LLM, count: int) -> Iterator[list[int]]:
    """Collects, of steps in which some rows are hidden states and others logits, how many are logits.

    Args:
        llm: whose steps.
        count: requests that begin together; see :func:`together`.
    """
    found: list[int] = []
    engine = llm._loop._engine
    original = engine.step_hidden

    def watched(batch: Any, sampled: Any, projected: list[int]) -> Any:
        if 0 < len(projected) < len(batch.logits_indices):
            found.append(len(projected))
        return original(batch, sampled, projected)

    with pytest.MonkeyPatch.context() as patch, together(llm, count):
        patch.setattr(engine, "step_hidden", watched)
        yield found


def forced(ids: Sequence[int]) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
    """A logits processor that makes the model say ``ids``, and then id 1."""

    def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        wanted = ids[len(output)] if len(output) < len(ids) else 1
        only = torch.full_like(logits, -torch.inf)
        only[wanted] = 0.0
        return only

    return force


class Gate:
    """A logits processor that lets so many tokens pass and holds the next until opened."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) >= self.free:
            self.reached.set()
            assert self.opened.wait(30), "nobody opened the gate"
        return logits
