"""The GPU's engine without a GPU: nodes bound as on one, the project's kernels run by the emulator, the loop over all.

What this cannot see: Hopper's own kernels, CUDA graphs (a step is launched again instead of replayed), streams, time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, SamplingParams
from llmapi._build.graph import Graph
from llmapi._build.tensor_file import TensorFile
from llmapi._runtime.engine_cuda import CudaEngine
from llmapi.config import EngineConfig
from llmapi.models.spec import TransformerSpec
from tests._runtime.played import watch_dropped, watch_tables
from tests.api.beam_truth import by_transformers
from tests.api.truth import Truth, idle, prompts_of, until
from tests.emulator.gpu import EmulatedGpu
from tests.tiny import tiny_checkpoint


class WholeGpu(EmulatedGpu):
    """With what an engine asks of a GPU besides kernels."""

    free = 1 << 24

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        return self.free + (1 << 30), self.free + (1 << 30)

    def peak_of(self, run: Callable[[], None]) -> int:
        run()
        return 0

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A step is launched again wherever its graph would be replayed, and its result goes to the same place."""
        out = run().clone()

        def replay() -> None:
            out.copy_(run())

        return replay, out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    return tiny_checkpoint(folder, hidden_size=256, num_hidden_layers=2)


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Truth:
    return Truth(checkpoint)


@pytest.fixture
def llm(checkpoint: Path, tmp_path: Path, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An LLM whose engine is the GPU's; small limits, so that steps are chunked and batched."""

    def engine(
        graph: Graph,
        weights: TensorFile,
        constants: Mapping[str, torch.Tensor],
        spec: TransformerSpec,
        config: EngineConfig,
        kernels: object = None,
    ) -> CudaEngine:
        gpu: Any = WholeGpu(kernel_folder)
        named = {i.name: weights.read(i.parts) for i in graph.inputs if i.kind == "weight"}
        return CudaEngine(graph, lambda: named, constants, spec, config, gpu=gpu, utilization=0.9)

    monkeypatch.setattr("llmapi._runtime.engine_cpu.CpuEngine", engine)
    kv = {"max_tokens": 16 * 14, "block_size": 16}
    limits: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 24, "max_seq_len": 96, "kv_cache_config": kv}
    with LLM(checkpoint, cache_dir=tmp_path, backend="cpu", progress=False, **limits) as llm:
        yield llm


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def test_tokens_are_those_of_transformers(llm: LLM, truth: Truth) -> None:
    """Chunked prefill beside decoding, batches that shrink and grow, and steps in flight."""
    prompts = prompts_of([30, 3, 17, 1, 9], seed=1)
    counts = [6, 9, 4, 7, 5]
    outputs = llm.generate(prompts, [greedy(n) for n in counts], use_tqdm=False)
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.outputs[0].token_ids == truth.greedy(prompt, count)
    until(lambda: idle(llm))


def test_forks_copy_blocks_and_seeds_do_not_depend_on_company(llm: LLM) -> None:
    [prompt, other] = prompts_of([20, 7], seed=2)
    params = SamplingParams(temperature=0.9, top_k=40, seed=3, n=3, max_tokens=5)
    alone = llm.generate(prompt, params)
    together = llm.generate([prompt, other], [params, greedy(6)], use_tqdm=False)[0]
    assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in together.outputs]
    assert len({tuple(c.token_ids) for c in alone.outputs}) > 1
    until(lambda: idle(llm))


def test_prefixes_preemption_and_log_probabilities(llm: LLM, truth: Truth) -> None:
    prompts = prompts_of([40, 40, 40, 40], seed=4)
    outputs = llm.generate(prompts, greedy(30), use_tqdm=False)  # more than the blocks hold
    assert sum(o.metrics.preemptions for o in outputs if o.metrics) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == truth.greedy(prompt, 30)
    again = llm.generate(prompts[0], SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True))
    assert (again.num_cached_tokens or 0) >= 16
    exact = truth.logprobs(prompts[0] + again.outputs[0].token_ids)
    assert again.outputs[0].logprobs is not None
    for i, (token, told) in enumerate(zip(again.outputs[0].token_ids, again.outputs[0].logprobs, strict=True)):
        assert told[token].logprob == pytest.approx(exact[39 + i, token].item(), abs=1e-4)


def test_scores_and_hidden_states_beside_generation(llm: LLM, truth: Truth) -> None:
    """Steps of logits, of hidden states, and of both mixed."""
    [prompt, text, other] = prompts_of([12, 50, 21], seed=5)
    running = llm.generate_async(prompt, greedy(30))
    truth.check_probes(llm, text, other, 1e-4)
    assert running.result(120).outputs[0].token_ids == truth.greedy(prompt, 30)
    until(lambda: idle(llm))


def test_guided_requests_beside_free_ones(llm: LLM, truth: Truth) -> None:
    """Masks go to the kernel with the step's settings; samples of one prompt fork; the others keep their tokens."""
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    prompts = prompts_of([12, 5, 9, 7], seed=6)
    kind = {"regex": "[a-f]{3}-([0-9]|xy){2,4}!"}
    params = [
        greedy(12),
        SamplingParams(seed=1, max_tokens=20, guided_decoding=kind),
        SamplingParams(seed=2, max_tokens=20, guided_decoding=kind, n=3, top_k=20),
        SamplingParams(temperature=0, max_tokens=20, guided_decoding=kind, repetition_penalty=1.2, min_tokens=2),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == truth.greedy(prompts[0], 12)
    for output in outputs[1:]:
        for one in output.outputs:
            assert one.finish_reason == "stop" and re.fullmatch(kind["regex"], one.text)
    for prompt, own, together in zip(prompts, params, outputs, strict=True):
        alone = llm.generate(prompt, own)
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in together.outputs]


def test_beams_are_those_of_transformers(llm: LLM, truth: Truth) -> None:
    """Beside greedy and sampled requests; blocks are copied and shared, and whole searches are preempted."""
    prompts = prompts_of([30, 3, 17, 9, 21], seed=5)
    stop = truth.greedy(prompts[2], 4)[1]
    params = [
        SamplingParams(use_beam_search=True, beam_width=4, n=4, max_tokens=8),
        greedy(9),
        SamplingParams(use_beam_search=True, beam_width=2, max_tokens=12, stop_token_ids=[stop]),
        SamplingParams(temperature=0.9, seed=2, max_tokens=6),
        SamplingParams(use_beam_search=True, beam_width=3, n=2, max_tokens=9, repetition_penalty=1.3),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for i, (width, count, eos, more) in {
        0: (4, 8, [1], {}), 2: (2, 12, [1, stop], {}), 4: (3, 9, [1], {"repetition_penalty": 1.3})
    }.items():  # fmt: skip
        expected = by_transformers(truth, prompts[i], width, count=count, eos=eos, n=params[i].n, **more)
        assert [o.token_ids for o in outputs[i].outputs] == [ids for ids, _ in expected]
        assert [o.score for o in outputs[i].outputs] == pytest.approx([s for _, s in expected], abs=1e-4)
    assert outputs[1].outputs[0].token_ids == truth.greedy(prompts[1], 9)
    assert llm._loop._sampler.candidates._select.launches > 10  # type: ignore[attr-defined]
    until(lambda: idle(llm))


def test_beams_that_are_planned_ahead(llm: LLM) -> None:
    """The kernels' tables are the host's after each launch; texts, scores and log probabilities are those of the
    synchronous way."""
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    prompts = prompts_of([30, 3, 17, 9, 14, 12, 7], seed=8)
    search: dict[str, Any] = {"use_beam_search": True}
    params = [
        SamplingParams(beam_width=4, n=4, max_tokens=22, **search),
        SamplingParams(beam_width=3, n=3, max_tokens=18, length_penalty=2.0, early_stopping="never", **search),
        greedy(20),
        SamplingParams(beam_width=2, max_tokens=25, ignore_eos=True, **search),
        SamplingParams(beam_width=1, max_tokens=9, **search),
        SamplingParams(beam_width=3, n=3, max_tokens=20, repetition_penalty=1.4, min_tokens=12, **search),
        SamplingParams(beam_width=2, max_tokens=20, frequency_penalty=0.8, logit_bias={9: 2.0}, **search),
    ]
    first: dict[str, Any] = {"beam_width": 4, "n": 4, "max_tokens": 24, "early_stopping": "never", **search}
    text = llm.generate(prompts[3], SamplingParams(ignore_eos=True, **first)).outputs[2].text
    prompts += [prompts[3], *prompts_of([10, 6, 13], seed=9)]
    params += [
        SamplingParams(ignore_eos=True, stop=[text[4:6], text[9:12]], **first),
        SamplingParams(beam_width=3, n=3, max_tokens=9, logprobs=2, return_logits="generation", **search),
        SamplingParams(
            beam_width=4, n=4, max_tokens=12, guided_decoding={"regex": "([a-e]{2,5}|[f-z]{7,9})"}, **search
        ),
        SamplingParams(beam_width=2, max_tokens=9, logits_processors=[lambda ids, x: x.roll(len(ids))], **search),
    ]
    engine: Any = llm._loop._engine
    dropped = watch_dropped(llm)
    compared = watch_tables(llm, lambda row: engine._buffers.tables[row].tolist())
    ahead = llm.generate(prompts, params, use_tqdm=False)
    until(lambda: idle(llm))
    moved = engine._mover.launches
    assert moved > 30 and compared() > 80
    assert len(dropped) >= 1 and "stop" in [o.finish_reason for o in ahead[7].outputs]
    llm._loop.plans_beams_ahead = False
    plain = llm.generate(prompts, params, use_tqdm=False)
    assert engine._mover.launches == moved
    for one, other in zip(ahead, plain, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert a.finish_reason == b.finish_reason
            assert a.score == (None if b.score is None else pytest.approx(b.score, abs=1e-4))
            for told, other_told in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert [(t, one.rank) for t, one in told.items()] == [(t, one.rank) for t, one in other_told.items()]
                near = [pytest.approx(one.logprob, abs=1e-4) for one in other_told.values()]
                assert [one.logprob for one in told.values()] == near
            if a.logits is not None:
                assert b.logits is not None
                torch.testing.assert_close(a.logits, b.logits, atol=1e-3, rtol=1e-4)
    assert len(ahead[8].outputs[0].logprobs or ()) == 9 and ahead[8].outputs[2].logits is not None
    until(lambda: idle(llm))


def test_guided_beams_beside_others(llm: LLM, truth: Truth) -> None:
    """Masked rows of a search are found by torch's operators, those of another by the kernels."""
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    prompts = prompts_of([12, 5, 9], seed=7)
    texts = ["abba", "cab", "bcb", "faced"]
    params = [
        SamplingParams(use_beam_search=True, beam_width=4, n=4, max_tokens=9, guided_decoding={"choice": texts}),
        SamplingParams(use_beam_search=True, beam_width=2, max_tokens=6, ignore_eos=True),
        greedy(8),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sorted(o.text for o in outputs[0].outputs) == sorted(texts)
    alone = llm.generate(prompts[1], params[1])
    assert outputs[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert outputs[2].outputs[0].token_ids == truth.greedy(prompts[2], 8)
    until(lambda: idle(llm))
