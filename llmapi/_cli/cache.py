"""``llmapi cache``: look at the build cache, and keep it in order."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmapi import _env
from llmapi._cli import values, why
from llmapi._cli.options import add_cache_dir
from llmapi._cli.parser import Parser, Verbs
from llmapi._cli.text import age_text, columns, model_text

if TYPE_CHECKING:
    from llmapi._build.store import EntryInfo, Store

_KEY = "first digits of an entry's key, as ls shows them, or kind/digits"


def add(verbs: Verbs) -> list[Parser]:
    """Declare the verb, and its own verbs."""
    about = "Look at the build cache, and keep it in order."
    inner = verbs.add_parser("cache", help="list, check, explain, prune and move cached builds", description=about)
    parsers = inner.add_subparsers(title="verbs", metavar="VERB", required=True)
    found = []

    def verb(name: str, run: Any, help: str) -> Parser:
        parser = parsers.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        add_cache_dir(parser)
        parser.set_defaults(run=run)
        found.append(parser)
        return parser

    verb("path", run_path, "print the folder of the cache")
    verb("ls", run_ls, "list the entries, the last used first")
    verb("show", run_show, "show what an entry was made from and what it holds").add_argument("key", help=_KEY)
    found.append(why.add(parsers))
    verb("verify", run_verify, "hash every file, and set damaged entries aside")
    verb("prune", run_prune, "delete the least recently used entries").add_argument(
        "--budget",
        type=values.size,
        metavar="SIZE",
        help="what may stay, e.g. 50GB (LLMAPI_CACHE_BYTES, or the default)",
    )
    verb("rm", run_rm, "delete entries").add_argument("keys", metavar="KEY", nargs="+", help=_KEY)
    parser = verb("export", run_export, "write entries to one file, for another machine")
    parser.add_argument("keys", metavar="KEY", nargs="+", help=_KEY)
    parser.add_argument("file", metavar="FILE", type=Path, help="file to write")
    parser = verb("import", run_import, "take in the entries of a file that export wrote")
    parser.add_argument("file", metavar="FILE", type=Path, help="file to read")
    return [inner, *found]


def run_path(args: Namespace) -> int:
    """Do ``path``."""
    print(_store(args).root)
    return 0


def run_ls(args: Namespace) -> int:
    """Do ``ls``."""
    store = _store(args)
    entries = store.entries()[::-1]
    total = sum(e.size for e in entries)
    if entries:
        print(columns([("KIND", "KEY", "SIZE", "BUILT", "USED", "HITS", "MODEL"), *map(_row, entries)], right=[2, 5]))
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    print(f"{count}, {_size(total)} of {_size(store.budget())} in {store.root}")
    return 0


def _row(entry: EntryInfo) -> tuple[str, ...]:
    times = _ago(entry.created), _ago(entry.last_used)
    return entry.kind, entry.digest[:12], _size(entry.size), *times, str(entry.hits), model_text(entry.label)


def run_show(args: Namespace) -> int:
    """Do ``show``."""
    store = _store(args)
    entry = store.show(args.key)
    manifest = entry.manifest
    in_use = ", in use now" if store.in_use(entry) else ""
    print(f"{entry.kind} {entry.digest}")
    print(f"model   {entry.label}")
    print(f"built   {_ago(entry.created)} by llmapi {manifest.version}")
    print(f"used    {_ago(entry.last_used)}, {entry.hits} hits{in_use}")
    print(f"files   {_size(entry.size)}")
    for name, record in manifest.files.items():
        print(f"  {name}  {_size(record.size)}  sha256:{record.sha256}")
    print("made from")
    for part in manifest.key.parts:
        for name, value in _leaves(part.name, part.value):
            print(f"  {name}: {value}")
    return 0


def run_verify(args: Namespace) -> int:
    """Do ``verify``; 1 where something is damaged."""
    store = _store(args)
    checked: list[EntryInfo] = []
    problems = store.verify(checked.append)
    for problem in problems:
        then = f"set aside as {problem.moved}; the next start builds it again" if problem.moved else "it stays there"
        print(f"damaged: {problem.kind} {problem.digest[:12]}: {problem.reason}; {then}")
    sound = len(checked) - sum((p.kind, p.digest) in {(e.kind, e.digest) for e in checked} for p in problems)
    size = _size(sum(e.size for e in checked))
    print(f"{sound} sound, {len(problems)} damaged; {size} read in {store.root}")
    return 1 if problems else 0


def run_prune(args: Namespace) -> int:
    """Do ``prune``."""
    from llmapi._digests import DigestMemory

    store = _store(args)
    report = store.prune(args.budget)
    DigestMemory(store.root / "digests").prune()  # notes on files that are gone
    for entry in report.removed:
        print(f"removed {entry}, {_size(entry.size)}, last used {_ago(entry.last_used)}")
    for entry in report.in_use:
        print(f"kept {entry}, {_size(entry.size)}: it is in use")
    print(f"{_size(report.freed)} freed, {_size(report.left)} left in {store.root}")
    return 0


def run_rm(args: Namespace) -> int:
    """Do ``rm``."""
    store = _store(args)
    for digest in dict.fromkeys(f"{e.kind}/{e.digest}" for e in map(store.show, args.keys)):
        entry = store.remove(digest)
        print(f"removed {entry}, {_size(entry.size)}")
    return 0


def run_export(args: Namespace) -> int:
    """Do ``export``."""
    size = _store(args).export(args.keys, args.file)
    print(f"{args.file}: {_size(size)}")
    return 0


def run_import(args: Namespace) -> int:
    """Do ``import``."""
    from llmapi._build.artifact_keys import misfit

    store = _store(args)
    before = {(e.kind, e.digest) for e in store.entries()}
    for entry in store.import_(args.file, misfit):
        print(f"{'kept' if (entry.kind, entry.digest) in before else 'imported'} {entry}, {_size(entry.size)}")
    return 0


def _store(args: Namespace) -> Store:
    from llmapi._build.store import Store

    given = getattr(args, "engine_cache_dir", None)
    return Store(Path(given).expanduser() if given else _env.cache_dir())


def _size(size: int) -> str:
    from llmapi._build.store.disk import size_text

    return size_text(size)


def _ago(when: float) -> str:
    return f"{age_text(time.time() - when)} ago"


def _leaves(name: str, text: str) -> Iterator[tuple[str, str]]:
    """The value of a part, a JSON object as one line for each leaf."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner if isinstance(inner, str) else json.dumps(inner))
    else:
        yield name, text
