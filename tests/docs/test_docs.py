"""README and docs/: Python blocks run, messages and tables are those of the code, links and commands exist."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmapi
from llmapi import LLM, LLMAPIError, SamplingParams, _env, errors
from tests.fakehub import FakeHub
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GATED = "meta-llama/Llama-3.2-1B"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_ERROR = re.compile(r"(\w+Error): ")


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it starts at."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{page.name}: a fence is not closed"
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in _FENCE.finditer(text)]


def table(page: Path, first_column: str) -> list[list[str]]:
    """Rows of the one table whose first heading is ``first_column``; cells that are all code lose their backquotes."""
    lines = page.read_text(encoding="utf-8").splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in line.strip("|").split("|")])
    return rows


# ---- Python blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "my-model")


@pytest.fixture(scope="module")
def hub(checkpoint: Path) -> Iterator[FakeHub]:
    """A hub where the models of the docs are tiny random ones."""
    files = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    with FakeHub() as server:
        server.add(MODEL, files)
        server.add(GATED, files, token="accepted", gated=True)
        yield server


@pytest.fixture
def place(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> Path:
    """A working folder with a copy of ``my-model``, caches of its own, and the fake hub for the real one."""
    from huggingface_hub import constants

    caches = tmp_path_factory.getbasetemp()
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(caches / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LLMAPI_CACHE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMAPI_CACHE_DIR", str(caches / "llmapi"))
    monkeypatch.setenv("LLMAPI_PROGRESS", "0")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "my-model").symlink_to(checkpoint, target_is_directory=True)
    monkeypatch.chdir(folder)
    return folder


def run_block(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    """Run a block as a script, or as a notebook's cell where it awaits at its top level."""
    source = "\n" * (block.line - 1) + block.text
    code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    result = eval(code, namespace)
    if inspect.iscoroutine(result):
        asyncio.run(result)


def agrees(written: str, real: str) -> bool:
    """Whether a written message is the real one; lines may be broken anywhere and ``...`` stands for anything."""
    flat = " ".join(written.split())
    pattern = ".*?".join(re.escape(part) for part in flat.split("..."))
    return re.fullmatch(pattern, " ".join(real.split())) is not None


def message(error: BaseException, hub: FakeHub) -> str:
    return f"{type(error).__name__}: {error}".replace(hub.endpoint, "https://huggingface.co")


@pytest.mark.parametrize(
    "page", [p for p in RUN if any(b.language == "python" for b in blocks(p))], ids=lambda p: p.name
)
def test_python_blocks_run(page: Path, place: Path, hub: FakeHub) -> None:
    """In order, in one namespace. A block that is followed by an error message raises just that."""
    found = blocks(page)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    try:
        for block, following in zip(found, [*found[1:], None], strict=True):
            if block.language != "python":
                continue
            where = f"{page.name}:{block.line}"
            if following is not None and following.language == "text" and _ERROR.match(following.text):
                with pytest.raises(LLMAPIError) as caught:
                    run_block(page, block, namespace)
                real = message(caught.value, hub)
                assert agrees(following.text, real), f"{where} raises\n  {real}\nbut the page says\n  {following.text}"
            else:
                try:
                    run_block(page, block, namespace)
                except Exception as error:
                    raise AssertionError(f"the block at {where} fails: {type(error).__name__}: {error}") from error
    finally:
        for value in namespace.values():
            if isinstance(value, LLM):
                value.close()


def test_messages_of_what_the_blocks_cannot_do(place: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages of troubleshooting.md that follow no block, brought about here."""
    from huggingface_hub import constants

    from llmapi.models.family import family_of

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    triggers: dict[str, Callable[[], object]] = {
        "OfflineError": lambda: LLM(MODEL),
        "UnsupportedModelError": lambda: family_of({"architectures": ["Gemma2ForCausalLM"]}),
    }
    found = blocks(ROOT / "docs/troubleshooting.md")
    alone = [
        b
        for before, b in zip([None, *found], found, strict=False)
        if b.language == "text" and _ERROR.match(b.text) and (before is None or before.language != "python")
    ]
    assert {b.text.split(":")[0] for b in alone} == set(triggers)
    for block in alone:
        with pytest.raises(LLMAPIError) as caught:
            triggers[block.text.split(":")[0]]()
        assert agrees(block.text, message(caught.value, hub)), message(caught.value, hub)


def test_every_error_class_is_explained() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    classes = [n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, LLMAPIError)]
    for name in set(classes) - {"LLMAPIError"}:
        assert f"\n## {name}\n" in text, f"docs/troubleshooting.md has no section {name}"
    assert set(classes) <= set(llmapi.__all__)


def test_the_comparison_of_messages_can_fail() -> None:
    assert agrees("A: one\ntwo ... four", "A: one two three four")
    assert not agrees("A: one two", "A: one two three")
    assert not agrees("A: one ... four", "A: one two three")


# ---- SamplingParams


def test_sampling_table_has_the_fields_and_defaults_of_the_code() -> None:
    written = {row[0]: row[1] for row in table(ROOT / "docs/sampling.md", "field")}
    real = {f.name: repr(f.default) for f in dataclasses.fields(SamplingParams)}
    assert list(written) == list(real), "other fields, or in another order"
    assert written == real


_INTERVAL = re.compile(r"([\[(])(-?[\d.]+), (inf|[-\d* ]+)([\])])(,? or None)?")


def test_sampling_table_has_the_ranges_of_the_code() -> None:
    """Each numeric range of the table, tried at its ends and just beyond them."""

    def allowed(name: str, value: object) -> bool:
        beams: dict[str, Any] = {"use_beam_search": True, "beam_width": 256}
        if name == "num_beam_groups":
            beams["diversity_penalty"] = 0.0 if value == 1 else 1.0
        if name == "diversity_penalty":
            beams["num_beam_groups"] = 1 if value == 0 else 2
        own = beams if name in ("beam_width", "length_penalty", "num_beam_groups", "diversity_penalty") else {}
        if name == "beam_width" and value is None:
            own = {}
        try:
            SamplingParams(**{**own, name: value})  # type: ignore[arg-type]
        except llmapi.ConfigError:
            return False
        return True

    tried = set()
    for name, default, limits, *_ in table(ROOT / "docs/sampling.md", "field"):
        found = _INTERVAL.fullmatch(limits)
        if found is None:
            continue
        tried.add(name)
        whole = "." not in default
        low = int(found[2]) if whole else float(found[2])
        step = 1 if whole else 1e-9
        assert allowed(name, low) == (found[1] == "["), f"{name}={low}"
        assert allowed(name, low + step) and not allowed(name, low - step), f"{name} near {low}"
        if found[3] != "inf":
            high: Any = ast.literal_eval(found[3]) if found[3].isdigit() else _power(found[3])
            assert found[4] == "]" and allowed(name, high) and not allowed(name, high + step), f"{name} near {high}"
        elif not whole:
            assert not allowed(name, float("inf")), name
        assert allowed(name, None) == bool(found[5]), f"{name}=None"
    numeric = {f.name for f in dataclasses.fields(SamplingParams) if re.match(r"(int|float)\b", str(f.type))}
    assert tried == numeric


def _power(text: str) -> int:
    """``"2**64 - 1"`` as a number."""
    base, exponent, minus = re.fullmatch(r"(\d+)\*\*(\d+) - (\d+)", text).groups()  # type: ignore[union-attr]
    return int(int(base) ** int(exponent)) - int(minus)


def test_comparison_table_has_every_field() -> None:
    rows = [row[0] for row in table(ROOT / "docs/sampling.md", "llmapi")]
    names = {name for row in rows for name in re.findall(r"\b[a-z_]+\b", row)}
    missing = {f.name for f in dataclasses.fields(SamplingParams)} - names
    assert not missing


def test_guided_table_has_the_fields_and_defaults_of_the_code() -> None:
    written = {row[0]: row[1] for row in table(ROOT / "docs/guided.md", "argument")}
    assert written == {f.name: repr(f.default) for f in dataclasses.fields(llmapi.GuidedDecodingParams)}


# ---- other tables


def test_supported_models_are_those_of_the_code() -> None:
    from llmapi.models.family import families

    rows = table(ROOT / "README.md", "family")
    assert {row[1]: row[0] for row in rows} == {name: family.name for name, family in families().items()}


def test_environment_variables_are_those_of_the_code() -> None:
    read = set(re.findall(r'environ\.get\("(\w+)"', inspect.getsource(_env)))
    assert read == set(re.findall(r"^\| ``(\w+)``", _env.__doc__ or "", re.M))
    assert {row[0] for row in table(ROOT / "docs/cache.md", "variable")} == read


def test_fields_of_outputs_exist() -> None:
    rows = table(ROOT / "docs/quickstart.md", "field")
    names = {name for row in rows for name in row[0].replace("`", "").split(", ")}
    fields = {f.name for f in dataclasses.fields(llmapi.RequestOutput)}
    assert names == fields - {"request_id", "finished"} | {"text"}
    (listed,) = [row[1] for row in rows if row[0] == "outputs"]
    completion = {f.name for f in dataclasses.fields(llmapi.CompletionOutput)}
    assert set(re.findall(r"`(\w+)`", listed)) - {"CompletionOutput"} == completion - {"index"}


def test_files_and_functions_of_the_hops_exist() -> None:
    rows = re.findall(r"^\| \d \| `([^`]+)` \| `([^`]+)` \|", (ROOT / "docs/architecture.md").read_text(), re.M)
    assert len(rows) == 6
    for file, name in rows:
        scope: Any = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            kinds = (ast.ClassDef, ast.FunctionDef)
            found = [n for n in scope.body if isinstance(n, kinds) and n.name == part]
            assert found, f"{file} has no {name}"
            scope = found[-1]


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:llmapi|tests|notebooks|benchmarks|examples|docs)/[\w./]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


# ---- commands and links


def commands(page: Path) -> list[tuple[int, str]]:
    """Lines of console and bash blocks that are commands, with their line numbers."""
    found = []
    for block in blocks(page):
        if block.language in ("console", "bash", "sh"):
            for offset, line in enumerate(block.text.splitlines()):
                found.append((block.line + offset, line.removeprefix("$ ")))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_known_to_the_command_line(page: Path) -> None:
    lines = [(n, shlex.split(c, comments=True)) for n, c in commands(page) if c.startswith("llmapi ")]
    if not lines:
        return
    from llmapi._cli.parser import UsageError
    from llmapi.cli import _parser

    for number, words in lines:
        try:
            _, rest = _parser().parse_known_args(words[1:])
        except UsageError as error:
            raise AssertionError(f"{page.name}:{number}: {shlex.join(words)}: {error}") from error
        except SystemExit as end:  # --help
            rest = [] if end.code == 0 else words
        assert not rest, f"{page.name}:{number}: {shlex.join(words)}: {rest} is not understood"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    asked = {w[1] for p in PAGES for _, c in commands(p) if (w := shlex.split(c, comments=True))[:1] == ["make"]}
    assert asked and asked <= targets, f"no such target: {sorted(asked - targets)}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}, but there is no such heading"


def test_index_links_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


# ---- docstrings


def modules() -> list[str]:
    return ["llmapi", *(m.name for m in pkgutil.walk_packages(llmapi.__path__, "llmapi.") if "__main__" not in m.name)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    """Examples run, except those marked +SKIP."""
    result = doctest.testmod(importlib.import_module(name), report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail; see the output above"


@pytest.mark.parametrize("name", llmapi.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    """Each class, and each public method and property of it."""
    public = getattr(llmapi, name)
    assert own_doc(public), f"{name} has no docstring"
    for attribute, value in vars(public).items():
        described = isinstance(value, property | staticmethod | classmethod) or inspect.isfunction(value)
        if described and not attribute.startswith("_"):
            assert inspect.getdoc(value), f"{name}.{attribute} has no docstring"


def own_doc(public: type) -> str | None:
    """A class's docstring, unless it is the signature that ``dataclass`` puts in place of none."""
    doc = vars(public).get("__doc__")
    return None if doc is None or doc.startswith(f"{public.__name__}(") else doc
