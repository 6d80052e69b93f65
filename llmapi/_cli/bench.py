"""``llmapi bench``: how fast a model is on this machine, in a minute or so."""

from __future__ import annotations

import json
import random
import statistics
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llmapi._cli import machine, values
from llmapi._cli.options import add_model_verb, engine_arguments
from llmapi._cli.parser import Parser, Verbs
from llmapi._cli.text import columns
from llmapi.errors import ConfigError
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    from llmapi.llm import LLM


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        batch: prompts that were sent at once.
        first_token: median seconds to the first token.
        per_token: median seconds for each token after it.
        output_rate, all_rate: output tokens, and prompt and output tokens together, for each second.
    """

    batch: int
    first_token: float
    per_token: float
    output_rate: float
    all_rate: float


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb."""
    parser = add_model_verb(
        verbs,
        "bench",
        run,
        help="measure a model on this machine",
        description="Measure first token, time per token and throughput, with random prompts of equal length.",
    )
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--batch-sizes", type=values.positives, default=[1, 4, 16], metavar="N,N", help="prompts at once (1,4,16)"
    )
    group.add_argument("--input-len", type=values.positive, default=128, metavar="N", help="tokens a prompt (128)")
    group.add_argument("--output-len", type=values.positive, default=32, metavar="N", help="tokens an answer (32)")
    group.add_argument("--json", action="store_true", help="print JSON")
    return [parser]


def run(args: Namespace) -> int:
    """Do it."""
    engine = {"enable_prefix_caching": False, **engine_arguments(args), "skip_tokenizer_init": True}
    if max(args.batch_sizes) > 64:
        engine.setdefault("max_batch_size", max(args.batch_sizes))
    from llmapi.llm import LLM

    with LLM(args.model, **engine) as llm:
        config = llm._prepared.config
        _check(args, config.max_seq_len, config.max_batch_size)
        _measure(llm, 1, args.input_len, min(args.output_len, 4))  # the first steps pay for what later ones find ready
        rows = [_measure(llm, batch, args.input_len, args.output_len) for batch in args.batch_sizes]
        described = f"{llm.model}, {config.backend} backend, {config.dtype}"
    lengths = f"{args.input_len} tokens in, {args.output_len} out"
    if args.json:
        found = {
            "model": described,
            "machine": machine.summary(),
            "lengths": lengths,
            "rows": [asdict(r) for r in rows],
        }
        print(json.dumps(found))
        return 0
    print(f"{described}; {lengths}\n{machine.summary()}\n")
    head = ("batch", "first token", "per token", "output tokens/s", "all tokens/s")
    print(columns([head, *map(_cells, rows)], right=range(5)))
    return 0


def _check(args: Namespace, max_seq_len: int, max_batch_size: int) -> None:
    if args.input_len + args.output_len > max_seq_len:
        raise ConfigError(
            f"--input-len {args.input_len} and --output-len {args.output_len} need sequences of "
            f"{args.input_len + args.output_len} tokens, and max_seq_len is {max_seq_len}: lower one of them"
        )
    if max(args.batch_sizes) > max_batch_size:
        raise ConfigError(
            f"--batch-sizes asks for {max(args.batch_sizes)}, and max_batch_size is {max_batch_size}: raise "
            "--max-batch-size, or measure smaller batches"
        )


def _measure(llm: LLM, batch: int, input_len: int, output_len: int) -> Row:
    draw = random.Random(batch)
    vocab = range(llm._prepared.spec.vocab_size)
    prompts = [draw.choices(vocab, k=input_len) for _ in range(batch)]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_len, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([*prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    metrics = [o.metrics for o in outputs if o.metrics is not None]
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    return Row(
        batch,
        statistics.median(m.first_token_time or 0.0 for m in metrics),
        statistics.median(m.time_per_output_token or 0.0 for m in metrics),
        made / seconds,
        (made + batch * input_len) / seconds,
    )


def _cells(row: Row) -> tuple[str, ...]:
    first, each = f"{row.first_token * 1e3:.0f} ms", f"{row.per_token * 1e3:.1f} ms"
    return str(row.batch), first, each, f"{row.output_rate:.1f}", f"{row.all_rate:.1f}"
