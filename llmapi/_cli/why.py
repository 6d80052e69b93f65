"""``llmapi cache why``: whether a start would find everything in the cache, and what differs where it would not."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import TYPE_CHECKING

from llmapi._cli.options import add_model_verb, engine_arguments
from llmapi._cli.parser import Parser, Verbs
from llmapi._cli.text import age_text, model_text

if TYPE_CHECKING:
    from llmapi._runtime.finding import Finding


def add(verbs: Verbs) -> Parser:
    """Declare the verb."""
    return add_model_verb(
        verbs,
        "cache why",
        run,
        help="say whether a start would find everything, and what differs where not",
        description="Say, for each artifact of a model, whether a start with these options would find it in the cache; "
        "where not, which entry is nearest and what differs. Nothing is built, and no weights are downloaded.",
    )


def run(args: Namespace) -> int:
    """Do it."""
    from llmapi._runtime.explain import explain

    for finding in explain(args.model, **engine_arguments(args)):
        for line in _lines(finding):
            print(line)
    return 0


def _lines(finding: Finding) -> list[str]:
    digest = f" {finding.key.digest[:12]}" if finding.key else ""
    if finding.entry is not None:
        used = age_text(time.time() - finding.entry.last_used)
        return [f"{finding.kind}: hit:{digest} ({model_text(finding.entry.label)}), last used {used} ago"]
    state = {True: "hit", False: "miss", None: "none"}[finding.found]
    head = f"{finding.kind}: {state}:{digest}"
    if finding.note:
        head += f"{',' if digest else ''} {finding.note}"
    if finding.nearest is None:
        return [head if finding.found or finding.note else f"{head}, there is no entry of this kind yet"]
    manifest, diff = finding.nearest
    lines = [head, f"  nearest is {manifest.digest[:12]} ({model_text(manifest.label)}), which differs in"]
    return [*lines, *(f"    {line}" for part in diff for line in part.lines())]
