"""``llmapi chat``: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from llmapi._cli.generate import chat_prompt
from llmapi._cli.options import add_engine, add_sampling, engine_arguments, sampling_arguments
from llmapi._cli.parser import Parser, Verbs
from llmapi._cli.text import model_text
from llmapi.errors import LLMAPIError, PromptTooLongError
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    from llmapi.llm import LLM
    from llmapi.outputs import RequestOutput

_COMMANDS = """\
/system TEXT  set the system message; without TEXT, take it away
/reset        forget the conversation, the system message apart
/exit         leave (so does Ctrl-D)
Ctrl-C stops an answer."""
_NOT_HERE = ("n", "logprobs", "prompt_logprobs", "detokenize")


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb."""
    parser = verbs.add_parser(
        "chat",
        usage="llmapi chat [options] MODEL",
        help="talk with a model",
        description="Talk with a model; /help lists what else can be typed. Lines from a pipe are messages, too.",
    )
    add_sampling(parser, leave_out=_NOT_HERE)
    add_engine(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.set_defaults(run=run)
    return [parser]


def run(args: Namespace) -> int:
    """Do it."""
    # An answer is as long as it wants to be: Ctrl-C is at hand.
    params = SamplingParams(**{"max_tokens": None, **sampling_arguments(args)})
    from llmapi.llm import LLM

    with LLM(args.model, **engine_arguments(args)) as llm:
        return Talk(llm, params, args.system, interactive=sys.stdin.isatty()).run()


class Talk:
    """A conversation.

    Args:
        llm: answers.
        params: of every answer.
        system: the system message.
        interactive: whether a person types; else lines are read without prompts and notes.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, interactive: bool) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._interactive = interactive
        self._history: list[dict[str, str]] = []
        self._failed = False

    def run(self) -> int:
        """Talk until the end of the input; the exit code, 1 where a piped message could not be answered."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its line editing)
            self._note(f"{model_text(self._llm.model)} is ready; /help lists commands, Ctrl-D leaves")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    break
            elif line:
                self._answer(line)
        return 1 if self._failed and not self._interactive else 0

    def _read(self) -> str | None:
        """The next line, or None at the end."""
        try:
            return input("> " if self._interactive else "").strip()
        except EOFError:
            if self._interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._note("\n(Ctrl-D or /exit leaves)")
            return ""

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return False
        if word == "/reset":
            self._history.clear()
            self._note("(the conversation is forgotten)")
        elif word == "/system":
            self._system = rest.strip() or None
            self._note("(the system message is set)" if self._system else "(there is no system message now)")
        elif word == "/help":
            self._note(_COMMANDS)
        else:
            self._error(f"unknown command {word}; there are /system TEXT, /reset, /help and /exit")
        return True

    def _answer(self, text: str) -> None:
        """Answer a message; what was answered up to a Ctrl-C counts."""
        self._history.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self._system}] if self._system else []
        output: RequestOutput | None = None
        shown = ""
        try:
            for output in self._llm.stream(chat_prompt(self._llm, [*system, *self._history]), self._params):
                print(output.text[len(shown) :], end="", flush=True)
                shown = output.text
        except KeyboardInterrupt:
            if output is not None:
                self._llm.abort(output.request_id)
            if not self._interactive:
                raise
            print(" [stopped]", end="")
        except LLMAPIError as error:
            self._history.pop()
            hint = "; /reset starts anew" if isinstance(error, PromptTooLongError) else ""
            self._error(f"{error}{hint}")
            return
        print(flush=True)
        if shown:
            self._history.append({"role": "assistant", "content": shown})
        else:
            self._history.pop()
        if output is not None and output.outputs[0].finish_reason == "length":
            self._note("(cut at the limit of tokens)")

    def _note(self, text: str) -> None:
        if self._interactive:
            print(text, file=sys.stderr)

    def _error(self, text: str) -> None:
        self._failed = True
        print(f"llmapi: error: {text}", file=sys.stderr)
