"""``llmapi build``: bring a model into the cache ahead of its first use."""

from __future__ import annotations

from argparse import Namespace

from llmapi._cli.options import add_engine, engine_arguments
from llmapi._cli.parser import Parser, Verbs


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb."""
    parser = verbs.add_parser(
        "build",
        usage="llmapi build [options] MODEL",
        help="build an engine into the cache, or save one to a folder",
        description="Fetch, convert and build a model, so that the next start finds everything in the cache.",
    )
    add_engine(parser)
    parser.add_argument(
        "--output", metavar="FOLDER", help="also save a self-contained engine there: LLM(FOLDER) needs nothing else"
    )
    parser.set_defaults(run=run)
    return [parser]


def run(args: Namespace) -> int:
    """Do it."""
    from llmapi.llm import LLM

    with LLM(args.model, **engine_arguments(args)) as llm:
        report = llm.build_report
        if args.output is not None:
            llm.save(args.output)
    print(report)
    print()
    for line in report.cache:
        print(line)
    if args.output is not None:
        print(f"saved to {args.output}")
    return 0
