"""Beam search as users meet it: beside everything else, with every option, and with its errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import LLM, CapacityError, ConfigError, RequestError, RequestOutput, SamplingParams
from tests.api.beam_truth import by_transformers, ours
from tests.api.truth import Gate, Truth, idle, prompts_of, until
from tests.tiny import VOCAB

CLOSE = 1e-4


def beam(width: int, count: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(use_beam_search=True, beam_width=width, max_tokens=count, **options)


def ids_of(output: RequestOutput) -> list[list[int]]:
    return [o.token_ids for o in output.outputs]


def test_what_an_output_holds(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([9], seed=1)
    stop = truth.greedy(prompt, 5)[3]
    output = llm.generate(prompt, beam(4, n=3, stop_token_ids=[stop]))
    assert [o.index for o in output.outputs] == [0, 1, 2] and output.finished and output.error is None
    scores = [o.score for o in output.outputs]
    assert scores == sorted(scores, reverse=True)
    for one in output.outputs:
        ended = one.token_ids[-1] == stop
        assert one.finish_reason == ("stop" if ended or one.token_ids[-1] == 1 else "length")
        assert one.stop_reason == (stop if ended else None)
        assert one.text == llm.tokenizer.decode(one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids,
                                                skip_special_tokens=True)  # fmt: skip
        assert one.cumulative_logprob is None and one.logprobs is None and one.logits is None
    assert output.metrics is not None and output.metrics.first_token_time is not None
    assert llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2)).outputs[0].score is None


@pytest.mark.parametrize("seed", range(3))
def test_mixed_with_everything(llm: LLM, seed: int) -> None:
    """Greedy, sampled and beam requests of many widths in one batch: each as alone."""
    rng = random.Random(seed)
    prompts = prompts_of([rng.randint(1, 50) for _ in range(20)], seed + 50)
    params = []
    for i in range(20):
        count = rng.randint(1, 20)
        kinds = [
            SamplingParams(temperature=0, max_tokens=count),
            SamplingParams(temperature=1.0, seed=i, max_tokens=count, n=rng.choice([1, 3]), repetition_penalty=1.2),
            beam(rng.choice([1, 2, 3, 5, 8, 16]), count, length_penalty=rng.choice([0.5, 1.0])),
            beam(6, count, num_beam_groups=3, diversity_penalty=0.7, n=6),
        ]
        params.append(rng.choices(kinds, [2, 2, 5, 1])[0])
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        alone = llm.generate(prompt, own)
        assert ids_of(output) == ids_of(alone)
        assert [o.text for o in output.outputs] == [o.text for o in alone.outputs]
        for a, b in zip(output.outputs, alone.outputs, strict=True):
            assert (a.score is None) == (not own.use_beam_search) and a.score == pytest.approx(b.score, abs=CLOSE)
    until(lambda: idle(llm))


def test_blocks_are_shared(llm: LLM) -> None:
    """A prompt of 25 blocks and 16 beams: one prompt, and a few blocks for each beam."""
    [prompt] = prompts_of([200], seed=3)
    output = llm.generate(prompt, beam(16, 12, n=16, ignore_eos=True))
    held = output.metrics.beam_kv_blocks
    assert held is not None and 25 < held <= 25 + 16 * 2
    other = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1))
    assert other.metrics.beam_kv_blocks is None


def test_the_prompt_is_computed_once_and_in_chunks(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, truth: Truth
) -> None:
    kv = {"max_tokens": 1024, "block_size": 8}
    with LLM(
        checkpoint, cache_dir=cache, max_batch_size=8, max_num_tokens=16, kv_cache_config=kv, progress=False
    ) as llm:
        sizes: list[int] = []
        real = llm._loop._engine.step
        monkeypatch.setattr(llm._loop._engine, "step", lambda b, *a: sizes.append(len(b.input_ids)) or real(b, *a))
        [prompt] = prompts_of([70], seed=4)
        output = llm.generate(prompt, beam(8, 6, n=8))
        assert sizes[:5] == [16, 16, 16, 16, 6] and sum(sizes[5:]) <= 8 * 5
        assert ours(output)[0][0] == by_transformers(truth, prompt, 8, count=6, eos=[1], n=1)[0][0]
        sizes.clear()
        again = llm.generate(prompt, beam(8, 6, n=8))
        assert again.num_cached_tokens == 64 and sizes[0] == 6 and ids_of(again) == ids_of(output)


@pytest.mark.parametrize("caching", [True, False])
def test_preemption(checkpoint: Path, cache: Path, llm: LLM, caching: bool) -> None:
    """More beams than the cache holds at once: whole searches give way, and find what they find with room."""
    prompts = prompts_of([17, 30, 9, 25, 12, 40], seed=6)
    params = [beam(4, 40, n=4, ignore_eos=True), beam(6, 30, n=2, ignore_eos=True), beam(3, 40, ignore_eos=True)] * 2
    expected = [llm.generate(p, own) for p, own in zip(prompts, params, strict=True)]
    kv = {"max_tokens": 8 * 34, "block_size": 8}
    with LLM(
        checkpoint,
        cache_dir=cache,
        max_batch_size=16,
        kv_cache_config=kv,
        enable_prefix_caching=caching,
        progress=False,
    ) as small:
        outputs = small.generate(prompts, params, use_tqdm=False)
        assert sum(o.metrics.preemptions for o in outputs) > 3
        for output, wanted in zip(outputs, expected, strict=True):
            assert ids_of(output) == ids_of(wanted)
            for a, b in zip(output.outputs, wanted.outputs, strict=True):
                assert a.score == pytest.approx(b.score, abs=CLOSE)
        until(lambda: idle(small))


def test_logprobs_and_logits_follow_each_beam(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([10], seed=7)
    stop = truth.greedy(prompt, 4)[2]
    params = beam(5, 7, n=5, logprobs=2, prompt_logprobs=1, return_logits="both", stop_token_ids=[stop],
                  repetition_penalty=1.3)  # fmt: skip
    output = llm.generate(prompt, params)
    assert ids_of(output) == ids_of(
        llm.generate(prompt, beam(5, 7, n=5, stop_token_ids=[stop], repetition_penalty=1.3))
    )
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 10
    assert output.prompt_logits is not None and output.prompt_logits.shape == (10, VOCAB)
    for one in output.outputs:
        exact = truth.logits(prompt + one.token_ids)[9:-1]
        torch.testing.assert_close(one.logits, exact, atol=CLOSE, rtol=0)
        logp = exact.double().log_softmax(-1)
        assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
        total = 0.0
        for row, token, told in zip(logp, one.token_ids, one.logprobs, strict=True):
            assert told[token].logprob == pytest.approx(row[token].item(), abs=CLOSE)
            assert told[token].rank == int((row > row[token]).sum()) + 1
            assert {token, *row.topk(2).indices.tolist()} == set(told)
            total += row[token].item()
        assert one.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_stop_texts_end_beams(llm: LLM) -> None:
    [prompt] = prompts_of([12], seed=8)
    plain = llm.generate(prompt, beam(4, 10, n=4))
    text = plain.outputs[0].text
    stop = next(c for c in text[2:] if c.isalnum())
    output = llm.generate(prompt, beam(4, 10, n=4, length_penalty=0.0, stop=[stop]))
    ended = [o for o in output.outputs if o.stop_reason == stop]
    assert ended
    for one in output.outputs:
        assert stop not in one.text
        assert (one.stop_reason == stop) == (stop in llm.tokenizer.decode(one.token_ids))
    kept = llm.generate(prompt, beam(4, 10, n=4, length_penalty=0.0, stop=[stop], include_stop_str_in_output=True))
    assert [o.token_ids for o in kept.outputs] == [o.token_ids for o in output.outputs]
    assert all(o.text.endswith(stop) for o in kept.outputs if o.stop_reason == stop)
    late = llm.generate(prompt, beam(4, 10, n=4, length_penalty=0.0, stop=[stop], min_tokens=6))
    assert all(len(o.token_ids) >= 6 for o in late.outputs)


def test_processors_see_their_own_beam(llm: LLM, truth: Truth) -> None:
    [prompt] = prompts_of([6], seed=9)
    seen: list[list[int]] = []

    def odd(prompt_ids: list[int], output: list[int], scores: torch.Tensor) -> torch.Tensor:
        assert prompt_ids == prompt
        seen.append(list(output))
        assert scores.exp().sum().item() == pytest.approx(1.0, abs=1e-3)  # log probabilities, as in transformers
        scores[::2] = -torch.inf
        return scores

    output = llm.generate(prompt, beam(3, 6, n=3, logits_processors=[odd]))

    class Odd:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, ::2] = -torch.inf
            return scores

    expected = by_transformers(truth, prompt, 3, count=6, eos=[1], n=3, processors=[Odd()])
    assert ids_of(output) == [ids for ids, _ in expected]
    assert [len(s) for s in seen] == [0, *[n for n in range(1, 6) for _ in range(3)]]
    assert all(list(o.token_ids[:3]) in seen for o in output.outputs)


def test_what_nothing_can_follow(llm: LLM) -> None:
    [prompt] = prompts_of([6], seed=10)

    def ends(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        return scores - torch.inf if len(output) == 2 else scores

    prompts = prompts_of([6, 7], seed=10)
    outputs = llm.generate(prompts, [beam(3, 6, logits_processors=[ends]), beam(3, 6)], use_tqdm=False)
    assert "no token is left" in str(outputs[0].error) and outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1].error is None and ids_of(outputs[1]) == ids_of(llm.generate(prompts[1], beam(3, 6)))
    with pytest.raises(RequestError, match="no token is left"):
        llm.generate(prompt, beam(2, logits_processors=[lambda output, x: x - torch.inf]))
    few = llm.generate(prompt, beam(8, 3, n=8, logits_processors=[only(4)]))  # 4 beams, then 16 candidates
    assert len(few.outputs) == 8 and all(t in (10, 11, 12, 13) for o in few.outputs for t in o.token_ids)
    until(lambda: idle(llm))


def only(count: int) -> Any:
    def keep(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        scores[:10] = -torch.inf
        scores[10 + count :] = -torch.inf
        return scores

    return keep


def test_the_leading_beam_is_streamed(llm: LLM) -> None:
    [prompt] = prompts_of([8], seed=11)
    final = llm.generate(prompt, beam(4, 9, n=2))
    states = list(llm.stream(prompt, beam(4, 9, n=2)))
    assert ids_of(states[-1]) == ids_of(final) and states[-1].finished
    lengths = [len(s.outputs[0].token_ids) for s in states[:-1]]
    assert lengths == list(range(1, len(lengths) + 1)) and len(lengths) >= 5
    for state in states[:-1]:
        [one] = state.outputs
        assert one.finish_reason is None and one.score is not None and not state.finished
        whole = llm.tokenizer.decode(one.token_ids, skip_special_tokens=True)
        assert whole.startswith(one.text.rstrip("\ufffd"))
    assert llm.generate_async(prompt, beam(4, 9, n=2)).result(30).outputs[0].token_ids == ids_of(final)[0]


def test_aborts_show_the_best_so_far(llm: LLM) -> None:
    [prompt] = prompts_of([8], seed=12)
    gate = Gate(3)
    future = llm.generate_async(prompt, beam(3, 9, n=3, logits_processors=[gate], ignore_eos=True))
    assert gate.reached.wait(20)
    future.abort()
    gate.opened.set()
    output = future.result(20)
    assert output.finished and [o.finish_reason for o in output.outputs] == ["abort"] * 3
    assert [o.score for o in output.outputs] == sorted((o.score for o in output.outputs), reverse=True)
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    until(lambda: idle(llm))


def test_the_rest_of_a_request(llm: LLM) -> None:
    [prompt] = prompts_of([8], seed=13)
    assert llm.generate(prompt, beam(3, 4, detokenize=False)).text == ""
    cut = llm.generate(prompt, SamplingParams(use_beam_search=True, beam_width=2, max_tokens=None, ignore_eos=True))
    assert len(cut.outputs[0].token_ids) == 512 - 8
    by_n = llm.generate(prompt, SamplingParams(use_beam_search=True, n=3, max_tokens=4))
    assert ids_of(by_n) == ids_of(llm.generate(prompt, beam(3, 4, n=3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "use_beam_search=True needs a width: add beam_width=4"),
        ({"beam_width": 257}, "beam_width=257 is out of range: give a whole number from 1 to 256"),
        ({"beam_width": 0}, "beam_width=0 is out of range"),
        ({"beam_width": 2.0}, "beam_width=2.0: give a whole number"),
        ({"beam_width": 3, "n": 4}, "n=4 is more than beam_width=3"),
        ({"n": 300}, "n=300 without beam_width asks for 300 beams: at most 256"),
        ({"beam_width": 3, "temperature": 0.7}, "temperature=0.7 with use_beam_search=True"),
        ({"beam_width": 3, "top_k": 5}, "top_k=5 with use_beam_search=True"),
        ({"beam_width": 3, "top_p": 0.5}, "top_p=0.5 with use_beam_search=True"),
        ({"beam_width": 3, "min_p": 0.5}, "min_p=0.5 with use_beam_search=True"),
        ({"beam_width": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups=3 does not divide the 4"),
        ({"beam_width": 4, "diversity_penalty": 1.0}, "diversity_penalty=1.0 needs num_beam_groups above 1"),
        ({"beam_width": 4, "num_beam_groups": 2}, "num_beam_groups=2 without diversity_penalty gives 2 equal groups"),
        ({"beam_width": 4, "early_stopping": "newer"}, "unknown early_stopping 'newer'; did you mean 'never'"),
        ({"beam_width": 4, "length_penalty": 40}, "length_penalty=40 is out of range: give a number in"),
        ({"beam_width": 4, "diversity_penalty": -1}, "diversity_penalty=-1 is out of range"),
        ({"beam_width": 4, "use_beam_search": 1}, "use_beam_search=1: give True or False"),
        ({"beam_width": 4, "best_of": 4}, "best_of=4 with use_beam_search=True: beam search draws nothing"),
        ({"use_beam_search": False, "beam_width": 4}, "beam_width=4 means something in beam search only"),
        ({"use_beam_search": False, "length_penalty": 0.5}, "length_penalty=0.5 means something in beam search only"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping=True means something in beam search only"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        SamplingParams(**{"use_beam_search": True, **options})
    assert message in str(told.value)


def test_widths_that_the_engine_cannot_serve(checkpoint: Path, cache: Path, llm: LLM) -> None:
    [prompt] = prompts_of([30], seed=14)
    with pytest.raises(RequestError, match=r"17 beams are more than the 16 sequences of a step: lower beam_width"):
        llm.generate(prompt, beam(17))
    kv = {"max_tokens": 8 * 12, "block_size": 8}
    with LLM(checkpoint, cache_dir=cache, max_batch_size=16, kv_cache_config=kv, progress=False) as small:
        with pytest.raises(
            CapacityError, match=r"8 beams of 30 prompt tokens, which they share, and 12 new ones can never"
        ):
            small.generate(prompt, beam(8))
        assert len(small.generate(prompt, beam(4, 10, ignore_eos=True)).outputs[0].token_ids) == 10
        longest = small.generate(prompt, SamplingParams(use_beam_search=True, n=3, max_tokens=None, ignore_eos=True))
        assert {len(o.token_ids) for o in longest.outputs} == {8 * (3 + 9 // 3) - 30}
