"""``llmapi build``: bring a model into the cache ahead of its first use."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from llmapi._cli.options import add_model_verb, engine_arguments
from llmapi._cli.parser import Parser, Verbs
from llmapi.errors import ConfigError

if TYPE_CHECKING:
    from llmapi._build.report import BuildReport


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb."""
    parser = add_model_verb(
        verbs,
        "build",
        run,
        help="build an engine into the cache, or save one to a folder",
        description="Fetch, convert and build a model, so that the next start finds everything in the cache.",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="also save a self-contained engine there: LLM(FOLDER) needs nothing else"
    )
    return [parser]


def run(args: Namespace) -> int:
    """Do it."""
    from llmapi.llm import LLM

    given = engine_arguments(args)
    if given.get("backend") == "tensorrt":  # the GPU that it is for need not be here
        if args.output is not None:
            raise ConfigError(
                "--output with backend tensorrt: a saved engine holds no plan; leave --output out, and build on the "
                "other machine, or let it share this cache"
            )
        _show(LLM.build(args.model, **given))
        return 0
    with LLM(args.model, **given) as llm:
        report = llm.build_report
        if args.output is not None:
            llm.save(args.output)
    _show(report)
    if args.output is not None:
        print(f"saved to {args.output}")
    return 0


def _show(report: BuildReport) -> None:
    print(report)
    print()
    for line in report.cache:
        print(line)
