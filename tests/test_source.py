"""From a model's name to its files: the hub, its cache, folders and .gguf files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmapi._digests import DigestMemory
from llmapi._source import Snapshot, resolve
from llmapi.errors import (
    CheckpointError,
    ConfigError,
    GatedModelError,
    ModelNotFoundError,
    OfflineError,
    SourceError,
)
from tests.fakehub import FakeHub

INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SUPPORT = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 64}',
    "special_tokens_map.json": b"{ }",
    "chat_template.jinja": b"{{ messages }}",
}
CLUTTER = {
    "README.md": b"# model",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.00.pth": b"pth",
    "consolidated.safetensors": b"consolidated",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"msgpack",
    "model-q4.gguf": b"GGUF",
    "training_args.bin": b"args",
    "adapter_model.safetensors": b"adapter",
}
WHOLE = {**SUPPORT, **CLUTTER, "model.safetensors": b"S" * 5000, "pytorch_model.bin": b"B" * 5000, "modeling.py": b"1"}
SHARDED = {
    **SUPPORT,
    **CLUTTER,
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": b"1" * 3000,
    "model-00002-of-00002.safetensors": b"2" * 4000,
    "model-00003-of-00003.safetensors": b"3" * 9,
}


@pytest.fixture
def memory(tmp_path: Path) -> DigestMemory:
    return DigestMemory(tmp_path / "digests")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the client in this process uses; huggingface_hub read its environment when it was imported."""
    from huggingface_hub import constants

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


def names(snapshot: Snapshot) -> set[str]:
    return {f.name for f in snapshot.files}


def get(memory: DigestMemory, model: str = "org/model", **kwargs: Any) -> Snapshot:
    return resolve(model, digests=memory, progress=False, **kwargs)


def test_hub_fetches_only_what_is_needed(hub: FakeHub, memory: DigestMemory) -> None:
    commit = hub.add("org/model", WHOLE)
    snapshot = get(memory)
    assert names(snapshot) == hub.fetched() == set(SUPPORT) | {"model.safetensors"}
    assert (snapshot.kind, snapshot.revision, snapshot.model) == ("hub", commit, "org/model")
    for file in snapshot.files:
        assert file.path.read_bytes() == WHOLE[file.name]
        assert file.size == len(WHOLE[file.name])
    assert snapshot.config_file == snapshot.path / "config.json"
    assert [f.name for f in snapshot.weight_files] == ["model.safetensors"]
    assert {f.name for f in snapshot.tokenizer_files} == set(SUPPORT) - {"config.json", "generation_config.json"}
    assert snapshot.index_file is None and snapshot.code_files == ()


def test_a_check_of_the_configuration_comes_before_any_weight(hub: FakeHub, memory: DigestMemory) -> None:
    seen: list[bytes] = []

    def refuse(config: Path) -> None:
        seen.append(config.read_bytes())
        raise ConfigError("too large for this GPU")

    hub.add("org/model", WHOLE)
    with pytest.raises(ConfigError, match="too large"):
        resolve("org/model", digests=memory, progress=False, check=refuse)
    assert hub.fetched() == {"config.json"}
    assert seen == [WHOLE["config.json"]]
    whole = resolve("org/model", digests=memory, progress=False, check=lambda config: None)
    assert hub.fetched() == {f.name for f in whole.files}


def test_second_time_asks_nobody(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", SHARDED)
    first = get(memory)
    hub.log.clear()
    assert get(memory) == first
    assert get(memory, revision=first.revision).files == first.files
    assert hub.log == []


def test_refresh_asks_again_and_finds_the_new_commit(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", WHOLE)
    old = get(memory)
    new = hub.add("org/model", {**WHOLE, "model.safetensors": b"N" * 6000})
    assert get(memory).revision == old.revision
    hub.log.clear()
    fresh = get(memory, refresh=True)
    assert fresh.revision == new
    assert fresh.weight_files[0].path.read_bytes() == b"N" * 6000
    assert hub.fetched() == {"model.safetensors"}  # the other blobs were there
    hub.stop()
    with pytest.raises(OfflineError):
        get(memory, refresh=True)
    assert get(memory).revision == new


def test_shards_are_those_of_the_index(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", SHARDED)
    snapshot = get(memory)
    assert [f.name for f in snapshot.weight_files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert snapshot.index_file is not None
    assert "model-00003-of-00003.safetensors" not in hub.fetched()


def test_bin_where_there_are_no_safetensors(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add(
        "org/model", {k: v for k, v in WHOLE.items() if k != "model.safetensors"} | {"adapter_model.safetensors": b""}
    )
    assert [f.name for f in get(memory).weight_files] == ["pytorch_model.bin"]


def test_code_only_when_trusted(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", WHOLE)
    assert "modeling.py" not in names(get(memory))
    assert [f.name for f in get(memory, trust_remote_code=True).code_files] == ["modeling.py"]


def test_dummy_fetches_no_weights(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", SHARDED)
    assert names(get(memory, load_format="dummy")) == set(SUPPORT) == hub.fetched()
    assert len(get(memory).weight_files) == 2  # and what it left is not taken for the whole model


def test_revisions(hub: FakeHub, memory: DigestMemory) -> None:
    first = hub.add("org/model", WHOLE)
    tagged = hub.add("org/model", {**WHOLE, "config.json": b'{"v": 2}'}, ref="v2")
    assert get(memory).revision == first
    assert get(memory, revision="v2").revision == tagged
    assert get(memory, revision=tagged).revision == tagged
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        get(memory, revision="v9")


def test_interrupted_download_is_not_complete(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", SHARDED)
    hub.fail["model-00002-of-00002.safetensors"] = 500
    with pytest.raises(SourceError, match="500"):
        get(memory)
    hub.fail.clear()
    hub.log.clear()
    snapshot = get(memory)
    assert hub.fetched() == {"model-00002-of-00002.safetensors"}  # the rest is kept
    assert len(snapshot.weight_files) == 2


def test_interrupted_download_offline_says_what_is_missing(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", SHARDED)
    hub.fail["model-00002-of-00002.safetensors"] = 500
    with pytest.raises(SourceError):
        get(memory)
    hub.stop()
    with pytest.raises(OfflineError, match=r"incomplete on this disk.*model-00002-of-00002"):
        get(memory)


def test_missing_tokenizer_is_noticed_after_an_interruption(hub: FakeHub, memory: DigestMemory, cache: Path) -> None:
    hub.add("org/model", WHOLE)
    snapshot = get(memory)
    (snapshot.path / "tokenizer.json").unlink()
    hub.log.clear()
    assert "tokenizer.json" in names(get(memory))
    assert hub.log
    for tree in cache.glob("*/trees/*.json"):  # a cache that an older client filled
        tree.unlink()
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    hub.log.clear()
    assert names(get(memory)) == names(snapshot)
    assert hub.log == []
    (snapshot.path / "tokenizer.json").unlink()
    assert "tokenizer.json" in names(get(memory))
    assert hub.log


def test_cut_connection_resumes(hub: FakeHub, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # of 10 MB; whole chunks are kept
    content = os.urandom(200_000)
    hub.add("org/model", {**SUPPORT, "model.safetensors": content})
    hub.cut["model.safetensors"] = 70_000
    assert get(memory).weight_files[0].path.read_bytes() == content
    ranges = [r.range for r in hub.log if r.file == "model.safetensors" and r.method == "GET"]
    assert ranges[0] is None
    assert len(ranges) == 2 and ranges[1] is not None
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 70_000


def test_damaged_file_in_the_cache_is_fetched_again(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", WHOLE)
    blob = get(memory).weight_files[0].path.resolve()
    blob.write_bytes(b"S" * 10)
    assert get(memory).weight_files[0].path.read_bytes() == b"S" * 5000


def test_gated(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", WHOLE, token="right", gated=True)
    for token in (None, "wrong"):
        with pytest.raises(GatedModelError, match=r"accept its licence at http.*HF_TOKEN") as caught:
            get(memory, token=token)
        assert "wrong" not in str(caught.value)
    assert get(memory, token="right").kind == "hub"
    assert any(r.token == "right" for r in hub.log)


def test_token_from_the_environment(hub: FakeHub, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", WHOLE, token="right", gated=True)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert get(memory).kind == "hub"


def test_refused_token(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", WHOLE)
    with pytest.raises(GatedModelError, match="token is invalid"):
        get(memory, token="expired")


def test_private_and_missing(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/secret", WHOLE, token="right")
    for model in ("org/secret", "org/nothing", "nothing"):
        with pytest.raises(ModelNotFoundError, match=f"no model '{model}' on the hub.*HF_TOKEN"):
            get(memory, model)
    assert get(memory, "org/secret", token="right").kind == "hub"


def test_hub_down(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", WHOLE)
    hub.stop()
    with pytest.raises(OfflineError, match=r"org/model is not on this disk.*cannot be reached.*HF_ENDPOINT"):
        get(memory)


def test_offline_mode(hub: FakeHub, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("org/model", WHOLE)
    get(memory)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert get(memory).weight_files
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        get(memory, "org/other")
    assert hub.log == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.gguf": b"GGUF", "README.md": b""}, "GGUF.*x.gguf"),
        ({"README.md": b""}, "no config.json"),
        (SUPPORT, "no weights.*dummy"),
        ({**SUPPORT, "model.safetensors.index.json": INDEX.encode()}, "lacks model-00001-of-00002"),
    ],
)
def test_repository_without_a_model(hub: FakeHub, memory: DigestMemory, files: dict[str, bytes], message: str) -> None:
    hub.add("org/model", files)
    with pytest.raises(ModelNotFoundError, match=message):
        get(memory)


def test_disk_too_small(hub: FakeHub, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    hub.add("org/model", WHOLE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match=r"free.*HF_HOME"):
        get(memory)
    assert hub.fetched() == set()


def test_one_progress_bar_in_bytes(
    hub: FakeHub, memory: DigestMemory, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm.auto

    bars: list[Any] = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    hub.add("org/model", SHARDED)
    snapshot = resolve("org/model", digests=memory)
    size = sum(f.size for f in snapshot.files)
    assert [(b.desc.rstrip(": "), b.unit, b.n, b.total) for b in bars] == [("fetch", "B", size, size)]
    drawn = capfd.readouterr().err
    assert "fetch" in drawn and "Fetching" not in drawn and "ownload" not in drawn
    get(memory)
    assert capfd.readouterr().err == ""


def test_digests_of_lfs_files_are_not_computed(hub: FakeHub, memory: DigestMemory) -> None:
    hub.add("org/model", SHARDED)
    snapshot = get(memory)
    digests = snapshot.digests()
    assert digests == {n: "sha256:" + hashlib.sha256(SHARDED[n]).hexdigest() for n in names(snapshot)}
    assert memory.hashed_bytes == sum(f.size for f in snapshot.files if not f.name.endswith(".safetensors"))
    assert set(snapshot.digests(snapshot.weight_files)) == {f.name for f in snapshot.weight_files}


def test_environment_of_the_client(tmp_path: Path) -> None:
    """A fresh process with HF_HOME and HF_ENDPOINT, then HF_HUB_OFFLINE, as a user sets them."""
    code = (
        "import sys; from pathlib import Path\n"
        "from llmapi._source import resolve; from llmapi._digests import DigestMemory\n"
        "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules\n"
        "print(resolve('org/model', digests=DigestMemory(Path('d')), progress=False).path)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "right",
        "PYTHONPATH": str(Path.cwd()),
    }

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env | more, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    with FakeHub() as hub:
        hub.add("org/model", WHOLE, token="right", gated=True)
        first = run(HF_ENDPOINT=hub.endpoint)
        endpoint = hub.endpoint
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    again = run(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout, again.stderr
    other = run(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert "OfflineError" in other.stderr and "HF_HUB_OFFLINE" in other.stderr


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("files", [WHOLE, SHARDED])
def test_folder(files: dict[str, bytes], memory: DigestMemory, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", files)
    snapshot = get(memory, str(path))
    assert (snapshot.kind, snapshot.path, snapshot.revision) == ("folder", path, None)
    weights = {f.name for f in snapshot.weight_files}
    assert names(snapshot) - weights - {"model.safetensors.index.json"} == set(SUPPORT)
    assert weights in ({"model.safetensors"}, {n for n in SHARDED if n.endswith("-of-00002.safetensors")})
    assert names(get(memory, str(path), load_format="dummy")) == set(SUPPORT)
    assert resolve(path, digests=memory).files == snapshot.files


def test_numbered_shards_without_an_index(memory: DigestMemory, tmp_path: Path) -> None:
    files = {n: c for n, c in SHARDED.items() if not n.endswith("index.json") and "00003" not in n}
    assert len(get(memory, str(folder(tmp_path / "m", files))).weight_files) == 2
    (tmp_path / "m" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 .*model-00001-of-00002"):
        get(memory, str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ModelNotFoundError, "holds no files"),
        ({"README.md": b""}, ModelNotFoundError, "no config.json"),
        ({"a.gguf": b"GGUF"}, ModelNotFoundError, "path of one of them.*a.gguf"),
        (SUPPORT, CheckpointError, "no weights.*load_format='dummy'"),
        ({k: v for k, v in SHARDED.items() if "00002-of-00002" not in k}, CheckpointError, "lacks 1.*00002-of-00002"),
        ({**SUPPORT, "model.safetensors.index.json": b"{"}, CheckpointError, "not a usable weights index"),
        ({**SUPPORT, "model.safetensors.index.json": b'{"weight_map": {}}'}, CheckpointError, "empty"),
        (
            {**SUPPORT, "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
            CheckpointError,
            "not a plain file name",
        ),
    ],
)
def test_bad_folder(
    files: dict[str, bytes], error: type[Exception], message: str, memory: DigestMemory, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(error, match=message):
        get(memory, str(folder(tmp_path / "m", files)))


def test_folder_with_only_a_config_is_enough_for_dummy(memory: DigestMemory, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {"config.json": b"{}"})
    assert names(get(memory, str(path), load_format="dummy")) == {"config.json"}


def test_gguf_file(memory: DigestMemory, tmp_path: Path) -> None:
    path = folder(tmp_path, {"m.gguf": b"GGUF"}) / "m.gguf"
    snapshot = get(memory, str(path))
    assert (snapshot.kind, snapshot.path, snapshot.config_file) == ("gguf", path, None)
    assert [f.path for f in snapshot.weight_files] == [f.path for f in snapshot.tokenizer_files] == [path]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("", ConfigError, "org/name"),
        ("  ", ConfigError, "org/name"),
        (None, ConfigError, "org/name"),
        (7, ConfigError, "org/name"),
        ("foo/bar/baz", ModelNotFoundError, "neither a folder"),
        ("a b/c", ModelNotFoundError, "neither a folder"),
        ("foo--bar/baz", ModelNotFoundError, "neither a folder"),
        ("x" * 5000, ModelNotFoundError, "neither a folder"),
        ("nul\0", ModelNotFoundError, "neither a folder"),
        ("./x", ModelNotFoundError, "no folder ./x"),
        ("~/no such folder", ModelNotFoundError, "no folder"),
        ("/no/such/folder", ModelNotFoundError, "no folder"),
        ("models/", ModelNotFoundError, "no folder"),
        ("no/such.gguf", ModelNotFoundError, "no file no/such.gguf"),
        (__file__, ModelNotFoundError, "is a file"),
    ],
)
def test_malformed_names(model: Any, error: type[Exception], message: str, memory: DigestMemory) -> None:
    with pytest.raises(error, match=message):
        resolve(model, digests=memory)


def test_arguments(memory: DigestMemory, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", WHOLE)
    with pytest.raises(ConfigError, match="revision='v2'"):
        get(memory, str(path), revision="v2")
    with pytest.raises(ConfigError, match="did you mean 'dummy'"):
        get(memory, str(path), load_format="dumy")
