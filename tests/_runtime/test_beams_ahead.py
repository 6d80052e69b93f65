"""Beam searches whose next step is launched before the candidates of this one are known: the same searches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmapi import LLM, RequestError, RequestOutput, SamplingParams
from llmapi._runtime.batch import StepBatch
from llmapi._runtime.beam_found import Found, PendingCandidates
from llmapi._runtime.candidates import Candidates
from tests._runtime.played import PlayedChooser, PlayedEngine, watch_dropped, watch_tables
from tests.api.beam_truth import Counted, by_transformers
from tests.api.truth import Truth, idle, prompts_of, until
from tests.tiny import VOCAB, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Truth:
    return Truth(checkpoint)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where engines are kept; every engine made meanwhile is a played GPU."""
    monkeypatch.setattr("llmapi._runtime.engine_cpu.CpuEngine", PlayedEngine)
    PlayedEngine.moves = 0
    PlayedChooser.edited.clear()
    PlayedChooser.booked.clear()
    yield tmp_path
    PlayedEngine.mask = None


def start(checkpoint: Path, cache: Path, blocks: int = 200, block_size: int = 8, **options: Any) -> LLM:
    kv = {"max_tokens": block_size * blocks, "block_size": block_size}
    limits: dict[str, Any] = {"max_batch_size": 12, "max_num_tokens": 40, "kv_cache_config": kv}
    return LLM(checkpoint, cache_dir=cache, progress=False, backend="cpu", **(limits | options))


def beam(width: int, count: int, **options: Any) -> SamplingParams:
    return SamplingParams(use_beam_search=True, beam_width=width, max_tokens=count, **options)


class Near:
    """Numbers that equal others but for rounding."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def __eq__(self, other: object) -> bool:
        alike = isinstance(other, Near) and len(self.numbers) == len(other.numbers)
        return alike and bool(np.allclose(self.numbers, other.numbers, rtol=1e-6, atol=2e-5))  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return f"Near{tuple(self.numbers)}"


def told(output: RequestOutput) -> list[tuple[Any, ...]]:
    """What is compared; logits differ by rounding with the size of a batch."""
    out = []
    for o in output.outputs:
        near = [] if o.score is None else [o.score]
        entries = [list(entry.items()) for entry in o.logprobs or ()]
        near += [one.logprob for entry in entries for _, one in entry]
        near += [] if o.logits is None else o.logits.flatten().tolist()
        ranks = [(token, one.rank, one.decoded_token) for entry in entries for token, one in entry]
        out.append((o.token_ids, o.text, o.finish_reason, o.stop_reason, ranks, Near(*near)))
    return out


def mix(rng: random.Random, truth: Truth, prompts: list[list[int]]) -> list[SamplingParams]:
    """Searches of all kinds, most of which can be planned ahead, beside greedy and sampled requests."""
    params = []
    for i, prompt in enumerate(prompts):
        count, width = rng.randint(1, 24), rng.choice([1, 2, 3, 4, 6])
        often = truth.greedy(prompt, 12)
        stops = rng.sample(sorted(set(often)), min(len(set(often)), rng.choice([0, 1, 2])))
        plain: dict[str, Any] = {
            "n": rng.randint(1, width), "stop_token_ids": stops, "ignore_eos": rng.random() < 0.5,
            "length_penalty": rng.choice([1.0, 0.0, 2.0, 0.6]), "early_stopping": rng.choice([True, False, "never"]),
        }  # fmt: skip
        kinds = [
            beam(width, count, **plain),
            SamplingParams(temperature=0, max_tokens=count),
            SamplingParams(temperature=0.9, seed=i, max_tokens=count),
            SamplingParams(temperature=0.9, seed=i, max_tokens=count, n=2, stop=["a"]),
            beam(
                width,
                count,
                **plain,
                stop=rng.sample(["e", "th", "a", "zz", " "], 2),
                min_tokens=min(count, rng.randrange(3)),
            ),
            beam(4, count, num_beam_groups=2, diversity_penalty=0.5),
            beam(
                width, count, **plain, **rng.choice([{"logprobs": 2}, {"logprobs": 0, "return_logits": "generation"}])
            ),
            beam(width, count, **plain, **edits(rng, often, count)),
            beam(width, count, **plain, **host_edits(rng)),
        ]
        params.append(rng.choices(kinds, [7, 3, 2, 0.3, 3, 0.3, 3, 10, 4])[0])
    return params


def edits(rng: random.Random, often: list[int], count: int) -> dict[str, Any]:
    """Changes of logits that hit, some of which the device can make by itself, and some not."""
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": rng.choice([0.8, 1.3])},
        {"presence_penalty": rng.uniform(-1, 1), "frequency_penalty": rng.uniform(-1, 1)},
        {"logit_bias": {token: rng.uniform(-3, 3) for token in rng.sample(range(VOCAB), 20)}},
        {"min_tokens": rng.randint(1, count)},
        {"bad_words": [chr(97 + rng.randrange(26))]},
        {"logit_bias": {often[0]: -100.0}, "repetition_penalty": 1.1, "min_tokens": min(3, count)},
    ]
    return rng.choices(kinds, [3, 3, 2, 3, 1, 2])[0]


def host_edits(rng: random.Random) -> dict[str, Any]:
    """Changes of logits that follow from the tokens before, by ways that only the host knows."""
    shift = rng.randint(1, 9)
    letters = "".join(rng.sample("abcdefghijklmnopqrstuvwxyz", 8))
    kinds: list[dict[str, Any]] = [
        {"logits_processors": [lambda ids, logits: logits.roll(shift + ids[-1] % 3 if ids else shift)]},
        {"guided_decoding": {"regex": f"[{letters}]{{2,7}}"}},
        {"guided_decoding": {"regex": f"([{letters}]+ )*[{letters}]+"}, "logprobs": 1},
        {"guided_decoding": {"choice": [letters[:3], letters[:5], letters[2:], letters[5:]]}},
        {"bad_words": [a + b for a in letters for b in letters], "repetition_penalty": 1.2},
    ]
    return rng.choice(kinds)


@pytest.mark.parametrize("seed", range(6))
def test_searches_are_those_of_the_synchronous_way(seed: int, checkpoint: Path, cache: Path, truth: Truth) -> None:
    """Random mixes, with preemption where the pool is small; device and host hold the same tables after each step."""
    rng = random.Random(seed + 20)
    prompts = prompts_of([rng.randint(1, 30) for _ in range(30)], seed)
    params = mix(rng, truth, prompts)
    small = seed % 2 == 1
    with start(checkpoint, cache, blocks=22 if small else 300, block_size=8 if small else 16) as llm:
        compared = watch_tables(llm, lambda row: llm._loop._engine.tables[row])  # type: ignore[attr-defined]
        ahead = llm.generate(prompts, params, use_tqdm=False)
        until(lambda: idle(llm))
        moved = PlayedEngine.moves
        assert moved > 30 and compared() > 100
        assert PlayedChooser.edited[True] and PlayedChooser.edited[False] > 5
        assert PlayedChooser.booked[True] > 10 and PlayedChooser.booked[False] > 50
        assert (sum(o.metrics.preemptions for o in ahead if o.metrics) > 0) == small
        llm._loop.plans_beams_ahead = False
        plain = llm.generate(prompts, params, use_tqdm=False)
        assert PlayedEngine.moves == moved
        until(lambda: idle(llm))
    for own, one, other in zip(params, ahead, plain, strict=True):
        assert told(one) == told(other), own
        if own.n == 1 and not own.use_beam_search:
            assert one.metrics is not None and len(one.metrics.token_times) == len(one.outputs[0].token_ids)


@pytest.mark.parametrize("seed", range(3))
def test_searches_are_those_of_transformers(seed: int, checkpoint: Path, cache: Path, truth: Truth) -> None:
    rng = random.Random(100 + seed)
    prompts = prompts_of([rng.randint(1, 40) for _ in range(12)], seed)
    params = []
    for prompt in prompts:
        often = sorted(set(truth.greedy(prompt, 12)))
        width, count = rng.choice([2, 3, 4, 8]), rng.randint(1, 30)
        edits: list[dict[str, Any]] = [
            {}, {"repetition_penalty": 1.3}, {"min_tokens": rng.randint(1, count)}, {"logit_bias": {often[0]: -100.0}},
            {"presence_penalty": rng.uniform(-1, 1), "frequency_penalty": rng.uniform(-1, 1)},
        ]  # fmt: skip
        params.append(
            beam(
                width, count, n=rng.randint(1, width), ignore_eos=rng.random() < 0.3,
                stop_token_ids=rng.sample(often, min(len(often), rng.choice([0, 1, 2]))),
                early_stopping=rng.choice([True, False, "never"]), length_penalty=rng.choice([1.0, 0.0, 2.0]),
                **rng.choice(edits),
            )
        )  # fmt: skip
    with start(checkpoint, cache, max_batch_size=16) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        until(lambda: idle(llm))
    assert PlayedEngine.moves > 50 and PlayedChooser.edited[False] > 5
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        assert own.max_tokens is not None and own.beam_width is not None
        ends = sorted({*(own.stop_token_ids or ()), *([] if own.ignore_eos else [1])})
        expected = by_transformers(
            truth, prompt, own.beam_width, own.max_tokens, ends, own.n,
            length_penalty=own.length_penalty, early_stopping=own.early_stopping, min_new_tokens=own.min_tokens,
            repetition_penalty=own.repetition_penalty,
            sequence_bias=[[[token], value] for token, value in (own.logit_bias or {}).items()] or None,
            processors=[Counted(len(prompt), own.presence_penalty, own.frequency_penalty)],
        )  # fmt: skip
        assert [o.token_ids for o in output.outputs] == [ids for ids, _ in expected]
        assert [o.score for o in output.outputs] == pytest.approx([s for _, s in expected], abs=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logprobs": 1, "return_logits": "generation"},
        {"stop": ["no such text"]},
        {"repetition_penalty": 1.2},
        {"logits_processors": [lambda ids, logits: logits.roll(1)]},
        {"bad_words": ["some words"], "frequency_penalty": 0.1},
        {"guided_decoding": {"regex": "[a-z ]*"}},
        {"width": 1, "logits_processors": [lambda ids, logits: logits.roll(1)]},
    ],
    ids=lambda more: next(iter(more), "plain"),
)
def test_the_next_step_is_launched_before_the_last_ones_candidates_are_asked_for(
    more: dict[str, Any], checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the prompt's own step is waited for; and no step is computed for nothing. Where the host must know all
    tokens, the choice waits for it, while the step that comes before the choice runs."""
    events: list[str] = []
    result, step, choose = PendingCandidates.result, PlayedEngine.step, Candidates.start

    def watched_result(self: PendingCandidates) -> list[Found]:
        events.append("asked")
        return result(self)

    def watched_step(self: PlayedEngine, batch: StepBatch, sampled: torch.Tensor | None = None) -> torch.Tensor:
        events.append("step")
        return step(self, batch, sampled)

    def watched_choice(self: Candidates, *given: Any) -> PendingCandidates:
        events.append("choice")
        return choose(self, *given)

    monkeypatch.setattr(PendingCandidates, "result", watched_result)
    monkeypatch.setattr(PlayedEngine, "step", watched_step)
    monkeypatch.setattr(Candidates, "start", watched_choice)
    params = beam(**{"width": 4, "count": 20, "ignore_eos": True, **more})
    waits = not more.keys().isdisjoint({"logits_processors", "bad_words", "guided_decoding"})
    alone, turn = ["step", "choice", "asked"], ["step", "asked", "choice"] if waits else ["step", "choice", "asked"]
    with start(checkpoint, cache) as llm:
        llm.generate(prompts_of([7])[0], params)
        first = ["step", "choice"] if params.beam_width == 1 else [*alone, "step", "choice"]
        assert events == [*first, *turn * (19 if params.beam_width == 1 else 18), "asked"]
        events.clear()
        llm._loop.plans_beams_ahead = False
        llm.generate(prompts_of([7])[0], params)
        assert events == alone * 20


@pytest.mark.parametrize("regex", ["([a-e]{2,5}|[f-z]{7,9})", "[a-z]{3,4}[ ,][a-f]{2,3}"])
def test_a_grammar_that_ends_takes_back_the_step_that_was_ahead(regex: str, checkpoint: Path, cache: Path) -> None:
    prompts = prompts_of([6, 11, 17], seed=9)
    params = beam(4, 24, n=4, early_stopping="never", guided_decoding={"regex": regex}, length_penalty=2.0)
    with start(checkpoint, cache) as llm:
        compared, dropped = (
            watch_tables(llm, lambda row: llm._loop._engine.tables[row]),  # type: ignore[attr-defined]
            watch_dropped(llm),
        )
        ahead = llm.generate(prompts, params, use_tqdm=False)
        until(lambda: idle(llm))
        assert dropped and compared() > 10
        assert all(o.finish_reason == "stop" for output in ahead for o in output.outputs)
        llm._loop.plans_beams_ahead = False
        for one, other in zip(llm.generate(prompts, params, use_tqdm=False), ahead, strict=True):
            assert told(one) == told(other)


def test_a_search_that_loses_beams_goes_on_without_the_step_that_was_ahead(checkpoint: Path, cache: Path) -> None:
    """Half of the beams may only end, the others have one way to go on: fewer continue than the device can know."""

    def narrow(batch: StepBatch, logits: torch.Tensor) -> None:
        for row, at in enumerate(batch.logits_indices):
            if len(batch.logits_indices) > 1 and batch.positions[at] % 5 == 3:
                allowed = [1] if row % 2 else [30 + row]
                logits[row, [t for t in range(VOCAB) if t not in allowed]] = -torch.inf

    PlayedEngine.mask = narrow
    [prompt] = prompts_of([6])
    for size in (8, 16):
        params = beam(4, 22, n=4, early_stopping="never", length_penalty=3.0)
        with start(checkpoint, cache, block_size=size) as llm:
            compared = watch_tables(llm, lambda row, llm=llm: llm._loop._engine.tables[row])  # type: ignore[misc]
            dropped = watch_dropped(llm)
            ahead = llm.generate(prompt, params)
            assert len(dropped) >= 2 and compared() > 20
            until(lambda: idle(llm))
            llm._loop.plans_beams_ahead = False
            assert told(llm.generate(prompt, params)) == told(ahead)


def test_a_stop_text_takes_back_the_step_that_was_ahead(checkpoint: Path, cache: Path, truth: Truth) -> None:
    prompts = prompts_of([6, 11, 17, 23], seed=9)
    free = {"early_stopping": "never", "length_penalty": 2.0, "ignore_eos": True}
    with start(checkpoint, cache) as llm:
        found = [llm.generate(prompt, beam(4, 24, n=4, **free)) for prompt in prompts]
        texts = [output.outputs[2].text for output in found]
        params = [beam(4, 24, n=4, stop=[text[4:6], text[9:12]], **free) for text in texts]
        compared, dropped, moves = (
            watch_tables(llm, lambda row: llm._loop._engine.tables[row]),  # type: ignore[attr-defined]
            watch_dropped(llm),
            PlayedEngine.moves,
        )
        ahead = llm.generate(prompts, params, use_tqdm=False)
        until(lambda: idle(llm))
        assert len(dropped) >= 3 and compared() > 40 and PlayedEngine.moves - moves > 10
        stopped = [o.stop_reason for output in ahead for o in output.outputs if o.finish_reason == "stop"]
        assert len(stopped) >= 4
        llm._loop.plans_beams_ahead = False
        for one, other in zip(llm.generate(prompts, params, use_tqdm=False), ahead, strict=True):
            assert told(one) == told(other)


def test_a_search_that_fails_fails_alone(checkpoint: Path, cache: Path) -> None:
    def broken(batch: StepBatch, logits: torch.Tensor) -> None:
        for row, at in enumerate(batch.logits_indices):
            if batch.positions[at] == 12:  # only the first prompt is as long
                logits[row, 5] = torch.nan

    first, second = prompts_of([9, 40])
    PlayedEngine.mask = broken
    with start(checkpoint, cache) as llm:
        good = llm.generate(second, beam(3, 15, ignore_eos=True))
        both = [llm.generate_async(p, beam(3, 15, ignore_eos=True)) for p in (first, second)]
        with pytest.raises(Exception, match=r"output token 4: 1 of .* logits are NaN"):
            both[0].result(60)
        assert told(both[1].result(60)) == told(good)
        until(lambda: idle(llm))


def test_a_search_whose_edits_leave_no_token_says_so(checkpoint: Path, cache: Path) -> None:
    """At the fifth token the model allows nothing but the end, which ``min_tokens`` forbids."""

    def ended(batch: StepBatch, logits: torch.Tensor) -> None:
        for row, at in enumerate(batch.logits_indices):
            if batch.positions[at] == 12:  # only the first prompt is as long
                logits[row, 2:], logits[row, 0] = -torch.inf, -torch.inf

    first, second = prompts_of([9, 40])
    PlayedEngine.mask = ended
    with start(checkpoint, cache) as llm:
        both = [llm.generate_async(p, beam(3, 15, min_tokens=9)) for p in (first, second)]
        with pytest.raises(RequestError, match=r"output token 4: no token is left of 300: .*min_tokens.*Loosen one"):
            both[0].result(60)
        assert both[1].result(60).finished and PlayedChooser.edited[False] > 5
        until(lambda: idle(llm))


def test_streams_and_aborts(checkpoint: Path, cache: Path) -> None:
    """What is shown is always a beam without references; what is left is the others' own."""
    prompts = prompts_of([7, 12, 5], seed=3)
    params = beam(4, 40, n=4, ignore_eos=True)
    with start(checkpoint, cache) as llm:
        expected = [told(llm.generate(p, params)) for p in prompts]
        for leave in (0, 1, 9):
            others = [llm.generate_async(p, params) for p in prompts[1:]]
            lengths = []
            for seen, output in enumerate(llm.stream(prompts[0], params)):
                lengths.append(len(output.outputs[0].token_ids))
                assert all(t >= 0 for o in output.outputs for t in o.token_ids)
                if seen == leave:
                    llm.abort(output.request_id)
            assert lengths[: leave + 1] == list(range(1, leave + 2))
            assert [o.finish_reason for o in output.outputs] == ["abort"] * 4
            for one in output.outputs:
                assert one.score is not None and len(one.token_ids) >= leave + 1
            assert [told(o.result(60)) for o in others] == expected[1:]
        states = list(llm.stream(prompts[0], params))
        assert told(states[-1]) == expected[0] and len(states) == 40
        until(lambda: idle(llm))


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_and_aborts_at_random(seed: int, checkpoint: Path, cache: Path, truth: Truth) -> None:
    rng = random.Random(seed)
    prompts = prompts_of([rng.randint(1, 24) for _ in range(24)], seed + 7)
    params = mix(rng, truth, prompts)
    with start(checkpoint, cache, blocks=48) as llm:
        compared = watch_tables(llm, lambda row: llm._loop._engine.tables[row])  # type: ignore[attr-defined]
        llm._loop.plans_beams_ahead = False
        expected = llm.generate(prompts, params, use_tqdm=False)
        llm._loop.plans_beams_ahead = True
        running = []
        for prompt, own in zip(prompts, params, strict=True):
            running.append(llm.generate_async(prompt, own))
            enough = llm._loop.steps + rng.randint(0, 3)
            until(lambda enough=enough: llm._loop.steps >= enough or not llm._loop._jobs)  # type: ignore[misc]
        doomed = rng.sample(range(24), 6)
        for i in doomed:
            running[i].abort()
        for i, future in enumerate(running):
            output = future.result(60)
            if i not in doomed:
                assert told(output) == told(expected[i]), params[i]
        assert PlayedEngine.moves > 10 and compared() > 40
        until(lambda: idle(llm))
