"""``llmapi build --backend tensorrt``: plans without a GPU, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmapi._build.tensorrt.package import installed
from tests.cli.helpers import Cli, refused


@pytest.fixture(autouse=True)
def rtx() -> None:
    if "tensorrt_rtx" not in installed():
        pytest.skip("tensorrt_rtx is not installed")


def test_a_plan_is_built_once_and_explained(cli: Cli, model: str, tmp_path: Path) -> None:
    words = (model, "--backend", "tensorrt", "--max-seq-len", "64", "--cache-dir", str(tmp_path))
    first = cli("build", *words, "--target", "sm89")
    assert (first.code, first.err) == (0, "")
    assert "\nplan " in first.out and "\nbuilt: plan " in first.out
    again = cli("build", *words, "--target", "SM_89")
    assert again.code == 0 and "built" not in again.out and "\nhit: plan " in again.out
    why = cli("cache", "why", *words, "--target", "sm89,sm120")
    assert why.code == 0 and "engine: hit:" in why.out and "plan: miss:" in why.out
    assert 'targets: ["sm89"] -> ["sm89","sm120"]' in why.out
    listed = cli("cache", "ls", "--cache-dir", str(tmp_path))
    assert listed.out.count("\nplan ") == 1


def test_what_cannot_be_built_is_refused_in_one_line(cli: Cli, model: str, tmp_path: Path) -> None:
    words = ("build", model, "--backend", "tensorrt", "--cache-dir", str(tmp_path))
    refused(cli(*words, "--target", "sm90"), 1, "only for sm75, sm80", "backend='cuda'")
    refused(cli(*words, "--target", "sm75", "--dtype", "bfloat16"), 1, "on sm80 and newer")
    refused(cli(*words, "--output", str(tmp_path / "saved")), 1, "a saved engine holds no plan")
    refused(cli("build", model, "--backend", "cpu", "--target", "sm89"), 1, "takes a target")
