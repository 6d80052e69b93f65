"""The command line: ``llmapi generate | chat | build | cache | bench | doctor``.

Answers go to stdout; bars, logs and errors to stderr. Exit codes: 0 all went well, 1 an error (one line on stderr), 2
the command was not understood, 130 Ctrl-C, 141 the reader of stdout went away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence

import llmapi
from llmapi._cli import bench, build, cache, chat, doctor, generate
from llmapi._cli.parser import Parser, UsageError
from llmapi.errors import LLMAPIError

_DESCRIPTION = "Run large language models: fetch the weights, build an engine once, generate."
_EPILOG = "llmapi VERB --help shows the options of a verb."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``llmapi``; None takes those of the process.

    Returns:
        the exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 0
    except UsageError as error:
        return _failed(f"{error}", 2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except LLMAPIError as error:
        if debug:
            raise
        return _failed(_one_line(error))
    except OSError as error:
        if debug:
            raise
        return _failed(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else _one_line(error))
    except Exception as error:
        if debug:
            raise
        return _failed(f"this should not happen: {type(error).__name__}: {_one_line(error)}; --debug shows where")


def _run(words: Sequence[str]) -> int:
    args, rest = _parser().parse_known_args(words)
    if rest:
        args.parser.refuse(rest)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    with _logging(verbose=args.verbose):
        code: int = args.run(args)
        return code


def _parser() -> Parser:
    parser = Parser(prog="llmapi", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"llmapi {llmapi.__version__}")
    _add_common(parser, first=True)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in (generate, chat, build, cache, bench, doctor):
        for leaf in verb.add(verbs):
            _add_common(leaf)
            leaf.set_defaults(parser=leaf)
    return parser


def _add_common(parser: Parser, *, first: bool = False) -> None:
    """The options that stand before the verb as well as after it."""
    default = False if first else SUPPRESS
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=default, help="log what happens, cache hits and misses included"
    )
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


@contextlib.contextmanager
def _logging(*, verbose: bool) -> Iterator[None]:
    """Send llmapi's own log to stderr."""
    log = logging.getLogger("llmapi")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format())
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"llmapi: {level}{super().format(record)}"


def _failed(message: str, code: int = 1) -> int:
    print(f"llmapi: error: {message}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _forget_stdout() -> None:
    """Nobody reads stdout any more: what is still buffered must not raise once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
