"""The artifacts' keys: each part alone makes another key; what must not matter makes the same one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmapi import _device
from llmapi._build import artifact_keys, compiled, cpu_kernels, key as key_module
from llmapi._build.artifact_keys import (
    engine_key,
    graph_recipe_key,
    misfit,
    tokenizer_key,
    tokenizer_origin,
    weights_key,
)
from llmapi._build.checkpoint import read_config
from llmapi._build.compiled import kernel_key, tuning_key
from llmapi._build.cpu_kernels import kernels_key
from llmapi._build.key import Key, canonical
from llmapi._build.pipeline import Recipe
from llmapi._build.store import Manifest
from llmapi._digests import DigestMemory
from llmapi._kernels import nvrtc
from llmapi._kernels.nvrtc import Unit
from llmapi._source import resolve as resolve_source
from llmapi.config import EngineConfig, EngineOptions, KvCacheConfig, resolve
from llmapi.models.family import family_of, spec_of
from llmapi.models.spec import RopeSpec, TransformerSpec
from tests.tiny import tiny_checkpoint, tiny_config

ROOT = Path(__file__).resolve().parents[2]
SPEC = spec_of({**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]})
CONFIG = resolve(EngineOptions(), SPEC)
ORIGIN = {"files": ["sha256:" + "a" * 64, "sha256:" + "b" * 64]}
GRAPH = "c" * 64
TOKENIZER = {"tokenizer.json": "sha256:" + "d" * 64, "config.json": "sha256:" + "e" * 64}

Make = Callable[..., Key]


def weights(spec: TransformerSpec = SPEC, config: EngineConfig = CONFIG, origin: Any = ORIGIN) -> Key:
    return weights_key(spec, config, origin)


def graph(spec: TransformerSpec = SPEC) -> Key:
    return graph_recipe_key(spec)


def engine(spec: TransformerSpec = SPEC, config: EngineConfig = CONFIG, digest: str = GRAPH) -> Key:
    return engine_key(spec, config, digest)


def names(before: Key, after: Key) -> list[str]:
    return [d.name for d in before.diff(after)]


def other(value: object) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] + 1)
    if isinstance(value, RopeSpec):
        return dataclasses.replace(value, theta=value.theta + 1)
    if value is None:
        return 1
    assert isinstance(value, str)
    return value + "x"


# ---- every part matters


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TransformerSpec)])
def test_every_field_of_the_architecture_is_in_the_keys_of_what_it_shapes(field: str) -> None:
    changed = dataclasses.replace(SPEC, **{field: other(getattr(SPEC, field))})
    assert names(weights(), weights(spec=changed)) == ["spec"]
    assert names(graph(), graph(spec=changed)) == ["spec"]
    # The engine has the whole graph's text instead, and the rotary tables it stores.
    assert names(engine(), engine(spec=changed)) == (["constants"] if field == "rope" else [])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RopeSpec)])
def test_every_field_of_the_rotary_embedding(field: str) -> None:
    assert SPEC.rope is not None
    rope = dataclasses.replace(SPEC.rope, **{field: other(getattr(SPEC.rope, field))})
    changed = dataclasses.replace(SPEC, rope=rope)
    assert names(engine(), engine(spec=changed)) == ["constants"]
    assert [line.split(":")[0] for d in engine().diff(engine(spec=changed)) for line in d.lines()] == [
        f"constants.{field}"
    ]


@pytest.mark.parametrize("name", sorted(CONFIG.shape_parts()))
def test_every_limit_and_type_is_in_the_engines_key(name: str) -> None:
    changed = dataclasses.replace(CONFIG, **{name: other(getattr(CONFIG, name))})
    assert names(engine(), engine(config=changed)) == ([name, "target"] if name == "backend" else [name])
    assert names(weights(), weights(config=changed)) == (["dtype"] if name == "dtype" else [])


def test_where_the_weights_come_from() -> None:
    files = [str(f) for f in ORIGIN["files"]]
    changed = [
        {"files": [files[0], "sha256:" + "0" * 64]},
        {"files": files[:1]},
        {"dummy": 0},
        {"dummy": 1},
    ]
    digests = {weights().digest, *(weights(origin=o).digest for o in changed)}
    assert len(digests) == 1 + len(changed)
    assert all(names(weights(), weights(origin=o)) == ["origin"] for o in changed)


def test_the_text_of_the_graph() -> None:
    assert names(engine(), engine(digest="0" * 64)) == ["graph"]


def test_the_files_of_a_tokenizer_and_their_names() -> None:
    before = tokenizer_key(TOKENIZER)
    for changed in (
        {**TOKENIZER, "tokenizer.json": "sha256:" + "0" * 64},
        {"vocab.json": TOKENIZER["tokenizer.json"], "config.json": TOKENIZER["config.json"]},
        {"tokenizer.json": TOKENIZER["tokenizer.json"]},
        {"gguf": "sha256:" + "d" * 64},
    ):
        assert names(before, tokenizer_key(changed)) == ["origin"]


EVERY: dict[str, Make] = {
    "weights": weights,
    "graph": graph,
    "engine": engine,
    "tokenizer": lambda: tokenizer_key(TOKENIZER),
    "cpu-kernels": lambda: kernels_key("g++ 12.2"),
    "kernel": lambda: kernel_key(Unit.of("norm.cu", LLM_DTYPE=2), "sm_90a"),
    "tuning": lambda: tuning_key("NVIDIA H200", "sm_90a", "bfloat16", ["1x8x8"]),
}


LATER = {"cpu-kernels": [], "kernel": [], "tuning": ["torch"]}


def test_every_part_of_a_gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(source: str = "norm.cu", dtype: int = 2, arch: str = "sm_90a") -> Key:
        return kernel_key(Unit.of(source, LLM_DTYPE=dtype), arch)

    assert names(key(), key(source="rotary.cu")) == ["source"]
    assert names(key(), key(dtype=1)) == ["defines"]
    assert names(key(), key(arch="sm_80")) == ["target"]
    before = key()
    for name, value, part in (("version", lambda: "99.9", "nvrtc"), ("_OPTIONS", ("--other",), "options")):
        with monkeypatch.context() as patch:
            patch.setattr(nvrtc, name, value)
            assert names(before, key()) == [part]


def test_every_part_of_measured_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**changed: Any) -> Key:
        given = {"gpu": "A", "arch": "sm_90a", "dtype": "bfloat16", "cases": ["1x8x8"]}
        return tuning_key(**{**given, **changed})

    before = key()
    assert names(before, key(gpu="B")) == ["gpu"]
    assert names(before, key(arch="sm_80")) == ["target"]
    assert names(before, key(dtype="float16")) == ["dtype"]
    assert names(before, key(cases=["1x8x8", "2x8x8"])) == ["cases"]
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "source_text_digest", lambda source: "0" * 64)
        assert names(before, key()) == ["kernels"]
    assert key(cases=["a", "b"]) == key(cases=["b", "a"])
    monkeypatch.setattr(compiled, "_cublas", lambda: "99")
    assert names(before, key()) == ["cublas"]


@pytest.mark.parametrize("kind", EVERY)
def test_the_schema_of_keys_is_in_all_of_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = EVERY[kind]()
    monkeypatch.setattr(key_module, "KEY_SCHEMA", 99)
    assert names(before, EVERY[kind]()) == ["key_schema"]


@pytest.mark.parametrize(
    ("field", "value"), [("version", "9.9"), ("git_version", "f" * 40), ("cuda", "99.0"), ("hip", "9")]
)
def test_the_torch_build_is_in_the_keys_of_what_it_makes(
    field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {kind: make() for kind, make in EVERY.items()}
    build = {**key_module._torch_build(), field: value}
    monkeypatch.setattr(key_module, "_torch_build", lambda: build)
    changed = {kind: names(before[kind], make()) for kind, make in EVERY.items()}
    assert changed == {"weights": [], "graph": ["torch"], "engine": ["torch"], "tokenizer": [], **LATER}


def test_the_libraries_that_read_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokenizer_key(TOKENIZER)
    for library in artifact_keys._TOKENIZER_LIBRARIES:
        with monkeypatch.context() as patch:
            real = artifact_keys._installed
            patch.setattr(artifact_keys, "_installed", lambda name, x=library, r=real: "9.9" if name == x else r(name))
            [diff] = before.diff(tokenizer_key(TOKENIZER))
            assert [line.split(":")[0] for line in diff.lines()] == [f"libraries.{library}"]


def copied_package(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT / "llmapi", folder / "llmapi", ignore=shutil.ignore_patterns("__pycache__")))


SOURCES = {
    "_kernels/norm.py": {"graph": ["exporter"], "engine": ["kernels"]},
    "_build/export.py": {"graph": ["exporter"]},
    "_build/graph.py": {"graph": ["exporter"]},
    "_build/rewrite/add_norm.py": {"graph": ["exporter"]},
    "models/layers.py": {"weights": ["converter"], "graph": ["exporter"]},
    "models/families/llama.py": {"weights": ["converter"], "graph": ["exporter"]},
    "_build/weights.py": {"weights": ["converter"]},
    "_build/tensor_file.py": {"weights": ["converter"]},
    "_build/file_span.py": {"weights": ["converter"]},
    "_build/checkpoint.py": {"weights": ["converter"]},
    "_build/gguf.py": {"weights": ["converter"]},
    "_build/gguf_tensors.py": {"weights": ["converter"]},
    "_tokenizer.py": {"tokenizer": ["converter"]},
    "_frozen_tokenizer.py": {"tokenizer": ["converter"]},
    "_kernels/csrc_cpu/linear.h": {"cpu-kernels": ["sources"]},
    "_kernels/csrc/norm.cu": {"kernel": ["source"]},
    "_kernels/csrc/common.cuh": {"kernel": ["source"], "tuning": ["kernels"]},
    "_kernels/csrc/skinny_linear.cuh": {"tuning": ["kernels"]},
    "_kernels/skinny_linear_layout.py": {"graph": ["exporter"], "engine": ["kernels"], "tuning": ["kernels"]},
    "_runtime/linear_cuda.py": {"tuning": ["kernels"]},
    "llm.py": {},  # the rest shapes nothing that is stored
    "_runtime/sampler.py": {},
    "_build/store/store.py": {},
}


def test_sources_are_in_the_keys_of_what_they_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = copied_package(tmp_path)
    before = {kind: make() for kind, make in EVERY.items()}
    monkeypatch.setattr(artifact_keys, "_PACKAGE", package)
    monkeypatch.setattr(key_module, "_PACKAGE", package)
    monkeypatch.setattr(cpu_kernels, "SOURCES", package / "_kernels" / "csrc_cpu")
    monkeypatch.setattr(nvrtc, "CSRC", package / "_kernels" / "csrc")
    monkeypatch.setattr(nvrtc, "source_text_digest", nvrtc.source_text_digest.__wrapped__)
    assert {kind: make() for kind, make in EVERY.items()} == before  # a moved installation keeps its keys
    for file, expected in SOURCES.items():
        text = (package / file).read_bytes()
        (package / file).write_bytes(text + b"\n# changed\n")
        changed = {kind: names(before[kind], make()) for kind, make in EVERY.items()}
        assert {kind: parts for kind, parts in changed.items() if parts} == expected, file
        (package / file).write_bytes(text)


def test_the_parts_are_those_that_the_docs_list() -> None:
    """A part that is added must be tested here, and named in docs/cache.md."""
    parts = {kind: [p.name for p in make().parts] for kind, make in EVERY.items()}
    assert parts == {
        "weights": ["key_schema", "spec", "origin", "dtype", "quantization", "rank", "world", "converter"],
        "graph": ["key_schema", "torch", "spec", "exporter"],
        "engine": [
            *("key_schema", "torch", "graph", "constants"),
            *("backend", "dtype", "kv_dtype", "max_seq_len", "max_batch_size", "max_num_tokens", "block_size"),
            *("kernels", "target", "rank", "world"),
        ],
        "tokenizer": ["key_schema", "origin", "libraries", "converter"],
        "cpu-kernels": ["key_schema", "sources", "flags", "compiler", "machine", "processor"],
        "kernel": ["key_schema", "source", "defines", "target", "nvrtc", "options"],
        "tuning": ["key_schema", "torch", "gpu", "target", "dtype", "cases", "kernels", "cublas"],
    }
    text = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    for found in parts.values():
        for name in found:
            assert f"`{name}`" in text, f"docs/cache.md does not name the part {name}"


# ---- what must not matter


def test_what_shapes_nothing_is_in_no_key() -> None:
    for changed in (
        {"enable_prefix_caching": not CONFIG.enable_prefix_caching},
        {"kv_cache": KvCacheConfig(max_tokens=4096)},
        {"kv_cache": KvCacheConfig(memory_fraction=0.5)},
    ):
        config = dataclasses.replace(CONFIG, **changed)  # type: ignore[arg-type]
        assert (engine(config=config), weights(config=config)) == (engine(), weights())
    family = dataclasses.replace(SPEC, family="another")
    assert engine(spec=family) == engine()  # the graph says all


def test_the_order_of_dict_keys_is_in_no_key() -> None:
    config = {**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]}
    backward = json.loads(json.dumps(dict(reversed(config.items()))))
    assert spec_of(backward) == SPEC
    assert graph(spec=spec_of(backward)) == graph()
    turned = dict(reversed(TOKENIZER.items()))
    assert list(turned) != list(TOKENIZER) and tokenizer_key(turned) == tokenizer_key(TOKENIZER)
    assert canonical(dict(reversed(SPEC.to_json().items()))) == canonical(SPEC.to_json())


def keys_of(folder: Path, memory: Path) -> dict[str, str]:
    """The keys of the model in a folder."""
    snapshot = resolve_source(str(folder), digests=DigestMemory(memory))
    config = read_config(snapshot)
    spec = spec_of(config)
    recipe = Recipe(snapshot, family_of(config), spec, resolve(EngineOptions(), spec))
    return {
        "weights": weights_key(spec, recipe.config, recipe.origin()).digest,
        "graph": graph_recipe_key(spec).digest,
        "engine": engine_key(spec, recipe.config, GRAPH).digest,
        "tokenizer": tokenizer_key(tokenizer_origin(snapshot)).digest,
    }


def test_path_names_and_times_are_in_no_key(tmp_path: Path) -> None:
    first = tiny_checkpoint(tmp_path / "one")
    before = keys_of(first, tmp_path / "a")
    moved = tmp_path / "größer und anderswo"
    shutil.copytree(first, moved)
    for file in moved.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
        file.chmod(0o600)
    (moved / "README.md").write_text("not the model's")
    assert keys_of(moved, tmp_path / "b") == before
    (moved / "model.safetensors").rename(moved / "model-00001-of-00001.safetensors")
    assert keys_of(moved, tmp_path / "b") == before  # content counts, not the file's name


def test_host_home_threads_clock_and_environment_are_in_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    before = keys_of(folder, tmp_path / "a")
    threads = torch.get_num_threads()
    try:
        with monkeypatch.context() as patch:
            for name in ("HF_HOME", "HF_HUB_CACHE", "LLMAPI_CACHE_DIR", "HOME", "TMPDIR", "USER"):
                patch.setenv(name, str(tmp_path / "elsewhere"))
            patch.setattr(socket, "gethostname", lambda: "another")
            patch.setattr(os, "uname", lambda: os.uname_result(("Linux", "another", "9", "9", "x86_64")))
            patch.setattr(os, "cpu_count", lambda: 96)
            patch.setattr(time, "time", lambda: 9e9)
            patch.setattr(time, "time_ns", lambda: 9 * 10**18)
            torch.set_num_threads(threads + 1)
            assert keys_of(folder, tmp_path / "b") == before
    finally:
        torch.set_num_threads(threads)


def test_another_process_with_another_hash_seed_gives_the_same_keys(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    script = (
        "import sys, json; from pathlib import Path; from tests._build.test_artifact_keys import keys_of;"
        "print(json.dumps(keys_of(Path(sys.argv[1]), Path(sys.argv[2]))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == keys_of(folder, tmp_path / "a")


# ---- what an import says


def manifest(kind: str, key: Key) -> Manifest:
    return Manifest(kind, key, {}, "m", 0.0, "0")


def test_only_an_engine_of_this_machine_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert misfit(manifest("engine", engine())) is None
    here = key_module._torch_build()["version"]
    with monkeypatch.context() as patch:
        patch.setattr(key_module, "_torch_build", lambda: {"version": "9.9"})
        far = engine()
    assert misfit(manifest("engine", far)) == (
        f"it needs torch 9.9, and here is {here}; build it here from the weights instead"
    )
    assert misfit(manifest("weights", far)) is None and misfit(manifest("graph", far)) is None
    elsewhere = Key([dataclasses.replace(p, value="sm_90") if p.name == "target" else p for p in engine().parts])
    assert misfit(manifest("engine", elsewhere)) == (
        "it needs target sm_90, and here is cpu; build it here from the weights instead"
    )
    of_a_gpu = engine(config=dataclasses.replace(CONFIG, backend="cuda"))
    assert misfit(manifest("engine", of_a_gpu)) == (
        "it needs target cuda, and here is cpu; build it here from the weights instead"
    )
    monkeypatch.setattr(_device, "cuda_problem", lambda: None)
    assert misfit(manifest("engine", of_a_gpu)) is None and misfit(manifest("engine", engine())) is None
