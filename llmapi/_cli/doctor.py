"""``llmapi doctor``: what this machine can run, and why not the rest."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from llmapi import _env
from llmapi._cli import checks
from llmapi._cli.options import add_cache_dir
from llmapi._cli.parser import Parser, Verbs


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb."""
    parser = verbs.add_parser(
        "doctor",
        help="say what this machine can run, and why not the rest",
        description="Say what this machine can run, and why not the rest. Exit code 1 where it can run nothing.",
    )
    add_cache_dir(parser)
    parser.add_argument("--network", action="store_true", help="also try to reach the hub")
    parser.set_defaults(run=run)
    return [parser]


def run(args: Namespace) -> int:
    """Do it."""
    given = getattr(args, "engine_cache_dir", None)
    root = Path(given).expanduser() if given else _env.cache_dir()
    needed_fails = False
    for title, make in checks.groups(root, network=args.network):
        print(title)
        for check in make():
            needed_fails |= check.needed and not check.ok
            needed = " (needed)" if check.needed and not check.ok else ""
            print(f"  {'OK' if check.ok else 'no'}  {check.name}{needed}: {check.found}")
            if not check.ok and check.remedy:
                print(f"      -> {check.remedy}")
    print()
    if needed_fails:
        print("This machine cannot run llmapi yet: mend what says 'no' and is marked as needed.")
    else:
        from llmapi import _device

        runs = "cpu backend" if _device.cuda_problem() else "cuda and cpu backends; 'auto' takes cuda"
        print(f"This machine runs models on the {runs}.")
    return 1 if needed_fails else 0
