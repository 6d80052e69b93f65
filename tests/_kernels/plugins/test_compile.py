"""The plugins' kernels as PTX for every architecture: the entry, its parameters, the shared memory that it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmapi._device import HEAD_SIZES
from llmapi._kernels import nvrtc, plugins
from llmapi._kernels.nvrtc import ARCHITECTURES, Unit, compile_ptx
from llmapi._kernels.plugins.plugin import MOST_SHARED, compute_capability
from tests._kernels.test_nvrtc import QUICK

TYPES = [(arch, "float16" if arch == "sm_75" else "bfloat16") for arch in ARCHITECTURES] + [("sm_80", "float32")]

AS_USERS_GET_IT = ("sm_75", "sm_80", "sm_90a")
"""Architectures between which the sources differ; the others' are the same as one of these, and quick PTX will do."""

CALLS: list[tuple[str, Sequence[tuple[int, ...]], Mapping[str, Any]]] = [
    ("rotary_kv_write", [(7, 960), (7, 64), (7,), (9,)], {"rotary_dim": 64, "interleaved": 0}),
    ("kv_write", [(7, 960), (7,), (9,)], {}),
    ("paged_attention", [(7, 9, 64), (9,), (3, 5), (3,), (4,)], {}),
    ("paged_attention_biased", [(7, 9, 64), (9,), (3, 5), (3,), (4,), (9,), (9,)], {"alibi": 1, "sinks": 1}),
    ("paged_attention_parts", [(7, 9, 64), (9,), (3, 5), (3,), (4,)], {"parts": 16}),
    (
        "paged_attention_parts_biased",
        [(7, 9, 64), (9,), (3, 5), (3,), (4,), (9,), (9,)],
        {"alibi": 0, "sinks": 1, "parts": 16},
    ),
    ("join_parts", [(7, 9, 64), (3, 7, 9, 64), (3, 7, 9, 2)], {}),
    ("join_parts_sinks", [(7, 9, 64), (3, 7, 9, 64), (3, 7, 9, 2), (9,)], {}),
    ("add_rms_norm", [(7, 960), (7, 960), (960,)], {"width": 960, "eps": 1e-6}),
]
SHAPE = {"layer": 0, "heads": 9, "kv_heads": 3, "head_dim": 64, "block_size": 16}
SHAPE_AND_SCORES = {**SHAPE, "scale": 1.0, "window": 0, "softcap": 0.0}


@pytest.mark.parametrize(("arch", "dtype"), TYPES)
def test_every_kernel_is_ptx_for_every_architecture(arch: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if arch not in AS_USERS_GET_IT:
        monkeypatch.setattr(nvrtc, "_OPTIONS", (*nvrtc._OPTIONS, QUICK))
    target = f"compute_{compute_capability(arch)}"
    units = plugins.units(dtype)
    with ThreadPoolExecutor(2) as pool:
        for unit, code in zip(units, pool.map(lambda unit: compile_ptx(unit, target), units), strict=True):
            ptx = code.decode()
            assert f".target sm_{target.removeprefix('compute_')}\n" in ptx, unit.label
            assert re.findall(r"\.entry\s+(\w+)", ptx) == [unit.source.removesuffix(".cu")], unit.label
            static = sum(int(n) for n in re.findall(r"\.shared [^;]*\[(\d+)\];", ptx))
            assert static + int(dict(unit.defines).get("SHARED", 0)) <= MOST_SHARED, unit.label


@pytest.mark.parametrize(("name", "shapes", "attributes"), CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_parameters_are_inputs_extras_and_outputs(
    name: str, shapes: Sequence[tuple[int, ...]], attributes: Mapping[str, Any]
) -> None:
    plugin = plugins.PLUGINS[name]
    attributes = {**SHAPE_AND_SCORES, **attributes}
    launch = plugin.launch("float16", shapes, attributes)
    ptx = compile_ptx(launch.unit, "compute_80").decode()
    found = re.search(rf"\.entry\s+{launch.entry}\s*\((.*?)\)", ptx, re.DOTALL)
    assert found
    wanted = ["u64"] * len(plugin.inputs) + ["u32"] * len(launch.extras) + ["u64"] * len(plugin.output_types)
    assert re.findall(r"\.param\s+\.(\w+)", found[1]) == wanted
    assert len(plugin.outputs(shapes, attributes)) == len(plugin.output_types)
    assert {"arch"} < set(plugin.attributes) and set(plugin.attributes) <= {*attributes, "arch"}


def test_every_plugin_is_called() -> None:
    assert [name for name, _, _ in CALLS] == list(plugins.PLUGINS)


def test_decoding_keeps_as_many_tiles_in_flight_as_fit() -> None:
    """One more for each warp would not fit; a tile is 16 keys and values, rows an odd number of 16 bytes apart."""
    for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        for unit in plugins.units(dtype):
            if unit.source == "plugin_paged_attention.cu":
                of = {name: int(value) for name, value in unit.defines}
                tile = 32 * 16 * (of["LLM_HEAD_DIM"] * size // 16 | 1)
                assert of["LLM_WARPS"] * of["STAGES"] * tile <= of["SHARED"], unit.label
                assert of["LLM_WARPS"] * (of["STAGES"] + 1) * tile > MOST_SHARED - 64, unit.label


def test_the_pages_table_of_layouts_is_that_of_the_code() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "kernels" / "plugins.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    sizes = [int(cell) for cell in table["head size, 16 bits"]]
    assert tuple(sizes) == HEAD_SIZES
    for i, head_dim in enumerate(sizes):
        attributes = {**SHAPE_AND_SCORES, "heads": 8, "kv_heads": 2, "head_dim": head_dim}
        shapes = [(7, 8, head_dim), (9,), (3, 5), (3,), (4,)]
        launch = plugins.PLUGINS["paged_attention"].launch("bfloat16", shapes, attributes)
        of = dict(launch.unit.defines)
        warps, rows_of = int(of["LLM_WARPS"]), 16 * int(of["LLM_ROW_TILES"]) * int(of["LLM_WARPS"])
        assert table["warps"][i] == str(warps) and launch.block == 32 * warps
        assert table["query rows of a tile"][i] == str(rows_of) and table["keys of a tile"][i] == of["LLM_KEYS"]
        assert table["tiles in flight, a warp"][i] == of["STAGES"]
        assert table["shared memory, KiB"][i] == f"{launch.shared / 1024:g}"


def test_the_guard_is_the_kernels() -> None:
    text = (nvrtc.CSRC / "plugin.cuh").read_text()
    found = re.search(r"#define POOL_GUARD (0x\w+)ll", text)
    assert found and int(found[1], 16) == plugins.pools.POOL_GUARD
    assert found[1].removeprefix("0x") == b"llmapiKV".hex()


def test_keys_know_sources_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugins.key_parts()
    for path in nvrtc.CSRC.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(nvrtc, "CSRC", tmp_path)
    nvrtc.source_text_digest.cache_clear()
    assert plugins.key_parts() == before
    with (tmp_path / "context_attention.cuh").open("a") as file:
        file.write("// changed\n")
    nvrtc.source_text_digest.cache_clear()
    after = plugins.key_parts()
    nvrtc.source_text_digest.cache_clear()
    assert {name for name in before if before[name] != after[name]} == {"plugins"}


def test_ptx_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.cu").write_text('extern "C" __global__ void f() { int x = ; }')
    monkeypatch.setattr(nvrtc, "CSRC", tmp_path)
    with pytest.raises(nvrtc.BuildError, match="does not compile for compute_80"):
        compile_ptx(Unit.of("bad.cu"), "compute_80")
