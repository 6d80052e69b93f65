"""The public surface changes on purpose only, importing it does nothing, and imports go one way.

Write surface.txt anew after a change that is meant::

    PYTHONPATH=. python tests/api/test_surface.py
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmapi

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmapi"
RECORD = Path(__file__).with_name("surface.txt")

# ---- names and signatures


def surface() -> str:
    """Every public name with its bases, constructor, methods and attributes, one a line."""
    lines = []
    for name in sorted(llmapi.__all__):
        public = getattr(llmapi, name)
        bases = ", ".join(b.__name__ for b in public.__bases__ if b is not object)
        lines.append(f"class {name}({bases})" if bases else f"class {name}")
        if not issubclass(public, BaseException):
            lines += sorted(_members(public), key=lambda line: (not line.startswith("    __init__"), line))
    return "\n".join(lines) + "\n"


def _members(public: type) -> Iterator[str]:
    yield "    __init__" + _signature(public.__init__)
    for name, value in vars(public).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            result = inspect.signature(value.fget).return_annotation if value.fget else ""
            yield f"    {name}: {result} (property)"
        elif isinstance(value, classmethod):
            yield f"    classmethod {name}" + _signature(value.__func__)
        elif inspect.isfunction(value):
            kind = "async " if inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value) else ""
            yield f"    {kind}{name}" + _signature(value)
    for name in ("__enter__", "__exit__", "__await__", "__aiter__"):
        if name in vars(public):
            yield f"    {name}"


def _signature(function: Any) -> str:
    """As written in the source, whatever the version of Python makes of it."""
    parts, starred = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred = starred or p.kind is p.VAR_POSITIONAL
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.annotation is not p.empty:
            text += f": {p.annotation}"
        if p.default is not p.empty:
            text += f" = {'<factory>' if 'factory' in repr(p.default) else repr(p.default)}"
        parts.append(text)
    result = inspect.signature(function).return_annotation
    return f"({', '.join(parts)})" + ("" if result is inspect.Signature.empty else f" -> {result}")


def test_surface_is_the_recorded_one() -> None:
    recorded, now = RECORD.read_text(encoding="utf-8").splitlines(), surface().splitlines()
    gone = [f"- {line}" for line in recorded if line not in now]
    new = [f"+ {line}" for line in now if line not in recorded]
    assert now == recorded, (
        "the public surface changed:\n"
        + "\n".join([*gone, *new] or ["(another order)"])
        + "\nUsers rely on it. If the change is meant: PYTHONPATH=. python tests/api/test_surface.py, name it in "
        "CHANGELOG.md, and commit surface.txt with it"
    )


def test_all_is_sorted_and_complete() -> None:
    assert llmapi.__all__ == ["LLM", *sorted(set(llmapi.__all__) - {"LLM"})]
    assert set(llmapi.__all__) == set(llmapi._HOMES)
    for name, home in llmapi._HOMES.items():
        assert getattr(llmapi, name).__module__ == f"llmapi.{home}", name
    assert set(llmapi.__all__) <= set(dir(llmapi))
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = llmapi.Llm  # type: ignore[attr-defined]


def test_every_llm_argument_is_described() -> None:
    described = set(re.findall(r"^ {8}(\w+): ", llmapi.LLM.__doc__ or "", re.M))
    taken = set(inspect.signature(llmapi.LLM).parameters) - {"unknown"}
    assert described == taken | {"ConfigError", "SourceError", "UnsupportedModelError", "CheckpointError"}


# ---- importing

_WATCHED = """
import json, os, sys
read, touched, own = [], [], {root!r}
harmless = (sys.prefix, sys.base_prefix, sys.exec_prefix, own, os.path.dirname(os.__file__))
get = os._Environ.__getitem__
def watched(self, key):
    caller = sys._getframe(1)
    while caller.f_globals.get("__name__") in ("os", "collections.abc", "_collections_abc"):
        caller = caller.f_back
    if caller.f_globals.get("__name__", "").startswith("llmapi"):
        read.append(key)
    return get(self, key)
def hook(event, args):
    if event == "open" and isinstance(args[0], str):
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or not os.path.abspath(args[0]).startswith(harmless):
            touched.append([event, args[0]])
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "subprocess.Popen", "socket.connect"):
        touched.append([event, str(args[0])])
os._Environ.__getitem__ = watched
sys.addaudithook(hook)
import time
start = time.perf_counter()
import llmapi
{more}
seconds = time.perf_counter() - start
loaded = [m for m in ("torch", "transformers", "numpy", "huggingface_hub", "safetensors", "tqdm") if m in sys.modules]
print(json.dumps(dict(seconds=seconds, loaded=loaded, read=read, touched=touched)))
"""


def fresh(more: str = "") -> dict[str, Any]:
    """Import llmapi in a new process and tell what that did."""
    code = _WATCHED.format(root=str(ROOT), more=more)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("more", ["", "from llmapi import LLM, SamplingParams"])
def test_import_is_quick(more: str) -> None:
    assert min(fresh(more)["seconds"] for _ in range(5)) < 0.3


@pytest.mark.parametrize("more", ["", "from llmapi import *", "llmapi.SamplingParams(seed=1, stop='x')"])
def test_import_is_inert(more: str) -> None:
    """No heavy library, no environment variable, no file but Python's own; nor do the names themselves cost any."""
    did = fresh(more)
    assert (did["loaded"], did["read"], did["touched"]) == ([], [], [])


def test_what_wires_a_start_loads_torch_in_the_phase_that_says_so() -> None:
    did = fresh("import llmapi._runtime.start")
    assert not {"torch", "transformers"} & set(did["loaded"])


def test_the_watch_sees_what_it_should() -> None:
    did = fresh("from llmapi import _env; _env.progress(); open(os.devnull, 'w').close(); import numpy")
    assert did["read"] == ["LLMAPI_PROGRESS"] and did["loaded"] == ["numpy"]
    assert ["open", os.devnull] in did["touched"]


# ---- the order of imports

LAYERS = (
    {"errors", "_device", "_targets", "_tensorrt"},
    {"config", "sampling", "guided", "outputs", "beam_search"},
    {"_env", "_progress", "_files", "_digests", "_source", "_hub", "_tokenizer", "_frozen_tokenizer", "_detokenizer"},
    {"models"},
    {"_kernels"},
    {"_build"},
    {"_runtime"},
    {"llm"},
    {"_cli"},
    {"cli", "lm_eval_model"},
    {"__main__"},
)
"""What may import what: a module imports its own layer and lower ones, never a higher one.

Imports inside functions count. Those under ``if TYPE_CHECKING:`` do not: they are for readers and never run. The
package's own ``__init__`` imports nothing: it hands names out on first use.
"""


def layer(module: str) -> int:
    """Index of the layer that ``llmapi.<module>`` belongs to."""
    top = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if top in names)


def sources() -> dict[str, Path]:
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that run-time imports name; relative ones are refused."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def test_every_module_has_a_layer() -> None:
    known = {name for names in LAYERS for name in names}
    tops = {m.split(".")[1] for m in sources() if m != "llmapi.__init__"}
    assert tops - known == set(), "place these in LAYERS"


def test_no_lower_layer_imports_a_higher_one() -> None:
    wrong = []
    for module, path in sources().items():
        for target in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if not target.startswith("llmapi."):
                continue
            if module == "llmapi.__init__" or layer(target) > layer(module):
                wrong.append(f"{module} imports {target}")
    assert not wrong, wrong


def test_policy_never_touches_tensors() -> None:
    """The scheduler, the block pool and what they import are plain Python over ints."""
    known = sources()
    todo, seen = ["llmapi._runtime.scheduler", "llmapi._runtime.blocks"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        for target in imports(ast.parse(known[module].read_text(encoding="utf-8"))):
            assert target.split(".")[0] not in ("torch", "numpy", "transformers"), f"{module} imports {target}"
            owner = target if target in known else target.rpartition(".")[0]
            if owner in known and owner not in seen:
                todo.append(owner)
    assert "llmapi._runtime.plan" in seen


def test_the_decoder_knows_operators_by_name_only() -> None:
    for module, path in sources().items():
        if module.startswith("llmapi.models."):
            assert not any(t.startswith("llmapi._kernels") for t in imports(ast.parse(path.read_text()))), module


def test_only_env_reads_the_environment() -> None:
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {"environ", "environb", "getenv", "getenvb"}
            attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
            assert module == "llmapi._env" or not (attribute or imported), f"{module}:{node.lineno}"


# ---- what is committed


def committed() -> list[Path]:
    """Files under version control, and those that would be."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [p for name in done.stdout.decode().split("\0") if name and (p := ROOT / name).is_file()]


def test_no_file_speaks_of_a_machine() -> None:
    """Nothing that is committed names a folder of the machine that it was written on."""
    places = re.compile("|".join(f"(?<![\\w.])/{name}/" for name in ("work", "root")))
    found = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(text.splitlines(), 1) if places.search(line)]
    assert not found, found


if __name__ == "__main__":
    RECORD.write_text(surface(), encoding="utf-8")
