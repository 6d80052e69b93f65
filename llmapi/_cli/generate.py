"""``llmapi generate``: answer prompts, all in flight together."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from llmapi._cli.options import add_engine, add_sampling, engine_arguments, sampling_arguments
from llmapi._cli.parser import Parser, UsageError, Verbs
from llmapi._cli.prompts import Asked, read_prompts
from llmapi.errors import RequestError
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    from llmapi.llm import LLM
    from llmapi.outputs import CompletionOutput, Logprob, RequestOutput

_EPILOG = """\
examples:
  llmapi generate HuggingFaceTB/SmolLM2-135M "The capital of France is" --temperature 0
  llmapi generate MODEL --stream "Once upon a time"
  llmapi generate MODEL --file prompts.jsonl --json > outputs.jsonl

a JSON line is a text, a list of token ids, or an object: "prompt", "prompt_token_ids" or "messages"; and, if you like,
"id", which comes back with the output, and "sampling_params" of this prompt alone
"""


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb."""
    parser = verbs.add_parser(
        "generate",
        usage="llmapi generate [options] MODEL [PROMPT ...]",
        help="answer prompts",
        description="Answer prompts: words, the lines of --file, or the lines of stdin.",
        epilog=_EPILOG,
        formatter_class=_formatter(),
        intermixed=True,
    )
    add_sampling(parser)
    add_engine(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", default=[], help="text to continue")
    parser.add_argument("--file", metavar="FILE", help="read prompts from a file, one a line; - is stdin")
    parser.add_argument("--jsonl", action="store_true", help="each line read is JSON (so in a file called .jsonl)")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message; answer as a chat model")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each prompt")
    parser.add_argument("--stream", action="store_true", help="print the text as it grows; for one prompt")
    parser.set_defaults(run=run)
    return [parser]


def _formatter() -> Any:
    from argparse import RawDescriptionHelpFormatter

    return RawDescriptionHelpFormatter


def run(args: Namespace) -> int:
    """Do it."""
    arguments = sampling_arguments(args)
    if not args.json and not arguments.keys().isdisjoint({"logprobs", "prompt_logprobs"}):
        raise UsageError("--logprobs and --prompt-logprobs are shown by --json only: add it")
    if args.stream and (args.json or arguments.get("n", 1) > 1):
        raise UsageError("--stream prints one text as it grows: leave out " + ("--json" if args.json else "--n"))
    SamplingParams(**arguments)
    engine = engine_arguments(args)
    asked = read_prompts(args.prompts, args.file, jsonl=args.jsonl)
    if args.chat:
        asked = [_as_chat(a) for a in asked]
    if len({a.chat for a in asked}) > 1:
        raise RequestError("some lines are conversations and some are plain prompts: answer them in two runs")
    if args.stream and len(asked) > 1:
        raise UsageError(f"--stream is for one prompt, and there are {len(asked)}")
    params = [SamplingParams(**{**arguments, **a.own}) for a in asked]

    from llmapi.llm import LLM

    with LLM(args.model, **engine) as llm:
        if args.stream:
            return _stream(llm, asked[0], params[0])
        call: Any = llm.chat if asked[0].chat else llm.generate
        outputs = call([a.prompt for a in asked], params, use_tqdm=engine["progress"])
    for index, (one, output) in enumerate(zip(asked, outputs, strict=True)):
        if args.json:
            print(json.dumps(_as_json(index, one, output), ensure_ascii=False))
        else:
            _print(one, output, alone=len(asked) == 1)
    return 1 if any(o.error is not None for o in outputs) else 0


def _as_chat(asked: Asked) -> Asked:
    if asked.chat:
        return asked
    text = asked.prompt.get("prompt") if isinstance(asked.prompt, dict) else asked.prompt
    if not isinstance(text, str):
        raise RequestError("--chat makes messages of texts, and a prompt is given as token ids: leave out --chat")
    return dataclasses.replace(asked, prompt=[{"role": "user", "content": text}], chat=True)


def _stream(llm: LLM, asked: Asked, params: SamplingParams) -> int:
    shown = ""
    states = llm.stream(chat_prompt(llm, asked.prompt) if asked.chat else asked.prompt, params)
    for output in states:
        print(output.text[len(shown) :], end="", flush=True)
        shown = output.text
    print()
    return 0


def chat_prompt(llm: LLM, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """A conversation as a prompt for ``LLM.stream``."""
    return {"prompt_token_ids": llm._need_tokenizer("chat").apply_chat_template(messages)}


def _print(asked: Asked, output: RequestOutput, *, alone: bool) -> None:
    if not alone:
        prompt = asked.prompt[-1]["content"] if asked.chat else asked.prompt
        print(f"> {prompt.get('prompt', prompt) if isinstance(prompt, dict) else prompt}")
    if output.error is not None:
        print(f"[failed: {output.error}]")
    for one in output.outputs if output.error is None else ():
        print((f"[{one.index}] " if len(output.outputs) > 1 else "") + one.text)
    if not alone:
        print()


def _as_json(index: int, asked: Asked, output: RequestOutput) -> dict[str, Any]:
    line: dict[str, Any] = {"index": index}
    if asked.id is not None:
        line["id"] = asked.id
    if asked.chat:
        line["messages"] = asked.prompt
    elif output.prompt is not None:
        line["prompt"] = output.prompt
    line["prompt_token_ids"] = output.prompt_token_ids
    if output.error is not None:
        return {**line, "error": str(output.error)}
    line["outputs"] = [_completion(o) for o in output.outputs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [None if p is None else _logprobs(p) for p in output.prompt_logprobs]
    if output.metrics is not None:
        line["seconds"] = {
            "queue": output.metrics.queue_time,
            "first_token": output.metrics.first_token_time,
            "all": output.metrics.finished_time,
        }
    return line


def _completion(one: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": one.text,
        "token_ids": one.token_ids,
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
    }
    if one.logprobs is not None:
        found["cumulative_logprob"] = one.cumulative_logprob
        found["logprobs"] = [_logprobs(position) for position in one.logprobs]
    return found


def _logprobs(position: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": i, "token": p.decoded_token, "logprob": p.logprob, "rank": p.rank} for i, p in position.items()
    ]
