"""A soak: random requests at full load for minutes, then every text is checked and nothing may be left behind.

    python benchmarks/soak.py --model SmolLM2-135M-Instruct.Q4_1.gguf --seconds 240

Arrivals, lengths, aborts and sampling settings are random; the KV cache is small, so that sequences are preempted.

What is checked afterwards:

- Texts. The model reads each answer in one piece, alone (``prompt_logprobs``). A greedy token must be the most probable
  one, a ``top_k`` token among the k most probable, a ``min_p`` token probable enough, each up to ``--rounding`` nats;
  what was produced in a batch, in chunks, after a preemption or on shared blocks is thus held against a single pass.
- The same requests run alone give the same tokens, but for the first place where rounding decides; how many is printed.
- Blocks: all are free. Bytes on the GPU and on the host: shown every 30 s, so that growth is seen; only a few
  answers are kept, so that it is the engine's own. None on the GPU after ``close``.
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmapi import LLM, GuidedDecodingParams, SamplingParams

TEXT = (
    "the sea rose over an old stone wall and nobody in town could say why it had never done so before although many "
    "books were written about water winter bread violins and the number seven"
)
WORDS = TEXT.split()


@dataclass(eq=False)
class Sent:
    """One request of the soak."""

    prompt: str
    params: SamplingParams
    future: Any
    abort_at: float | None
    output: Any = None


class Heard:
    """What became of the requests: counts of all, and a random few of those that ran to their end."""

    def __init__(self, rng: random.Random, keep: int) -> None:
        self._rng, self._keep = rng, keep
        self.kept: list[Sent] = []
        self.requests = self.whole = self.tokens = self.preemptions = self.cached = 0
        self.reasons: collections.Counter[str] = collections.Counter()

    def add(self, one: Sent) -> None:
        """Count a finished request."""
        output = one.output
        assert output.error is None, output.error
        reasons = [o.finish_reason for o in output.outputs]
        self.requests += 1
        self.tokens += sum(len(o.token_ids) for o in output.outputs)
        self.reasons.update(reasons)
        self.preemptions += output.metrics.preemptions
        self.cached += output.num_cached_tokens
        if not all(reason in ("length", "stop") for reason in reasons):
            return
        self.whole += 1
        one.future = None
        if len(self.kept) < self._keep:
            self.kept.append(one)
        elif (at := self._rng.randrange(self.whole)) < self._keep:
            self.kept[at] = one


def resident() -> int:
    """MiB of host memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def on_gpu() -> int:
    """MiB that torch has allocated on the GPU now."""
    import torch

    return torch.cuda.memory_allocated() >> 20 if torch.cuda.is_available() else 0


def random_params(rng: random.Random) -> SamplingParams:
    """Settings that touch every part of the sampler."""
    options: dict[str, Any] = {"max_tokens": rng.choice([1, 8, 32, 64, 160]), "seed": rng.randrange(1 << 40)}
    kind = rng.randrange(8)
    if kind <= 2:
        options["temperature"] = 0
    else:
        options["temperature"] = rng.choice([0.3, 0.8, 1.2])
        options |= rng.choice(
            [{"top_k": 5}, {"top_k": 15}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8}]
        )
        options["n"] = rng.choice([1, 1, 1, 2, 4])
    if rng.random() < 0.1:
        options |= {"repetition_penalty": 1.1, "presence_penalty": 0.2}
    if rng.random() < 0.1:
        options["logit_bias"] = {rng.randrange(100, 300): 2.0}
    if rng.random() < 0.1:
        options["logprobs"] = rng.randrange(5)
    if rng.random() < 0.1:
        options["stop"] = ["\n\n", "seven"]
    if rng.random() < 0.1:
        options["bad_words"] = [" the"]
    if rng.random() < 0.1:
        options["min_tokens"] = 1
    if rng.random() < 0.03:
        options["logits_processors"] = [lambda ids, logits: logits]
    if rng.random() < 0.03:
        options["guided_decoding"] = GuidedDecodingParams(regex="[A-Za-z ,.]{1,200}")
    if rng.random() < 0.05:
        shared = ("max_tokens", "repetition_penalty", "presence_penalty", "logit_bias", "min_tokens", "stop")
        kept = {key: options[key] for key in shared if key in options}
        options = kept | {"use_beam_search": True, "beam_width": rng.choice([2, 3, 4, 8]), "temperature": 0}
    return SamplingParams(**options)


def random_prompt(rng: random.Random, words: int) -> str:
    """One word to so many; half of the prompts begin alike, so that blocks are found again."""
    opening = f"Tell me a story that begins like this: {TEXT}, {TEXT}, " if rng.random() < 0.5 else ""
    return opening + " ".join(rng.choices(WORDS, k=min(words, rng.choice([1, 4, 16, 60, 200, words]))))


def load(llm: LLM, seconds: float, rng: random.Random, in_flight: int, words: int, keep: int) -> Heard:
    """Keep about this many requests in flight for so long; those of the end run to theirs."""
    heard = Heard(rng, keep)
    live: list[Sent] = []
    end = time.perf_counter() + seconds
    report = time.perf_counter() + 30
    while live or time.perf_counter() < end:
        now = time.perf_counter()
        while now < end and len(live) < in_flight:
            prompt, params = random_prompt(rng, words), random_params(rng)
            abort_at = now + rng.uniform(0, 1.0) if rng.random() < 0.08 else None
            live.append(Sent(prompt, params, llm.generate_async(prompt, params), abort_at))
            if rng.random() < 0.2:
                break  # arrivals come in bursts
        for one in live:
            if one.abort_at is not None and now > one.abort_at:
                one.future.abort()
        running = []
        for one in live:
            try:
                one.output = one.future.result(0)
                heard.add(one)
            except TimeoutError:
                running.append(one)
        live = running
        if now > report:
            held = f"{on_gpu()} MiB on the GPU, {resident()} on the host"
            print(f"  {heard.requests} requests, {heard.tokens} tokens, {len(live)} in flight; {held}", flush=True)
            report = now + 30
        time.sleep(rng.uniform(0, 0.02))
    return heard


def plain(params: SamplingParams) -> bool:
    """Whether a token's place among the model's own probabilities says that it was allowed."""
    edited = params.repetition_penalty != 1 or params.logit_bias or params.bad_words or params.min_tokens
    return not (edited or params.guided_decoding or params.use_beam_search)


def wrong_tokens(llm: LLM, one: Sent, rounding: float) -> list[str]:
    """Tokens of an answer that the settings do not allow when the model reads it in one piece."""
    found = []
    for completion in one.output.outputs:
        ids = one.output.prompt_token_ids + completion.token_ids
        if not completion.token_ids or not plain(one.params):
            continue
        read = llm.generate(ids, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20, detokenize=False))
        told = read.prompt_logprobs[len(one.output.prompt_token_ids) :]
        for at, (token, entry) in enumerate(zip(completion.token_ids, told, strict=True)):
            ranked = sorted((e.logprob for e in entry.values()), reverse=True)
            own = entry[token].logprob
            p = one.params
            least = -1e9
            if p.temperature == 0:
                least = ranked[0]
            elif p.top_k:
                least = ranked[min(p.top_k, 20) - 1]
            elif p.min_p:
                least = ranked[0] - 2.4 * p.temperature  # log 0.1 = -2.3, at this temperature
            if own < least - rounding:
                found.append(f"token {at} of {completion.token_ids}: {own:.3f}, allowed from {least:.3f}: {one.params}")
                break
    return found


def main() -> None:
    """Run, check, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--in-flight", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--kv-tokens", type=int, default=60_000)
    parser.add_argument("--check", type=int, default=300, help="answers to read in one piece")
    parser.add_argument("--alone", type=int, default=60, help="requests to run again alone")
    parser.add_argument("--rounding", type=float, default=0.25, help="nats; logits in bfloat16 are this coarse")
    parser.add_argument("--words", type=int, default=800, help="of the longest prompts")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch

    rng = random.Random(asked.seed)
    gpu = asked.backend != "cpu" and torch.cuda.is_available()
    before = torch.cuda.mem_get_info()[0] if gpu else 0
    llm = LLM(
        asked.model, backend=asked.backend, dtype=asked.dtype, max_seq_len=2048, max_batch_size=asked.batch,
        kv_cache_config={"max_tokens": asked.kv_tokens}, progress=False,
    )  # fmt: skip
    with llm:
        pool = llm._loop._scheduler.pool
        keep = asked.check + asked.alone
        load(
            llm, min(10.0, asked.seconds / 4), rng, asked.in_flight, asked.words, keep
        )  # graphs of every size are captured
        held, then = on_gpu(), resident()
        start = time.perf_counter()
        heard = load(llm, asked.seconds, rng, asked.in_flight, asked.words, keep)
        seconds = time.perf_counter() - start
        rate = f"{heard.tokens} tokens ({heard.tokens / seconds:,.0f}/s)"
        print(f"{heard.requests} requests in {seconds:.0f} s, {rate}; {dict(heard.reasons)}")
        print(f"preemptions {heard.preemptions}, prompt tokens found in the cache {heard.cached}")
        assert pool.num_free == pool.num_blocks, f"{pool.num_blocks - pool.num_free} blocks were not given back"
        more = f"{on_gpu() - held} MiB more on the GPU, {resident() - then} on the host"
        print(f"blocks left: 0 of {pool.num_blocks}; {more}")
        whole = heard.kept
        wrong = [
            w for s in rng.sample(whole, min(asked.check, len(whole))) for w in wrong_tokens(llm, s, asked.rounding)
        ]
        print(f"answers read in one piece: {min(asked.check, len(whole))}, wrong: {len(wrong)}")
        assert not wrong, wrong[:3]
        again = rng.sample(whole, min(asked.alone, len(whole)))
        same = 0
        for one in again:
            output = llm.generate(one.prompt, one.params)
            same += [o.token_ids for o in output.outputs] == [o.token_ids for o in one.output.outputs]
        print(f"requests run again alone: {len(again)}, of which every token is the same: {same}")
        assert asked.dtype != "float32" or same >= 0.95 * len(again)
    if gpu:
        torch.cuda.empty_cache()
        after = torch.cuda.mem_get_info()[0]
        print(f"bytes on the GPU after close: {before - after} more than before (CUDA's own context included)")


if __name__ == "__main__":
    main()
