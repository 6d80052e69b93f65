"""The weights file: order, views, errors, dummy values, and the memory that conversion takes."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmapi._build.checkpoint import open_checkpoint, read_config
from llmapi._build.file_span import FileSpan
from llmapi._build.store.hashing_file import HashingFile
from llmapi._build.store.manifest import FileRecord
from llmapi._build.tensor_file import TensorFile, TensorSpec, write_tensors
from llmapi._build.weights import converted, dummy, tensor_specs, write_weights
from llmapi._digests import DigestMemory
from llmapi._source import resolve
from llmapi.errors import CacheError, CheckpointError
from llmapi.models.family import family_of, spec_of
from tests.models.test_parity import Memory, state_of
from tests.tiny import tiny_config, tiny_model


def write(path: Path, tensors: dict[str, torch.Tensor]) -> TensorFile:
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    with path.open("wb") as out:
        write_tensors(out, specs, lambda spec: tensors[spec.name])
    return TensorFile(path)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "c": torch.randn(2, 2, 2).half(),
    }
    file = write(tmp_path / "x.safetensors", tensors)
    theirs = load_file(str(tmp_path / "x.safetensors"))
    assert file.names() == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(file.read([name]), tensor)


def test_neighbours_merge_into_a_view_and_others_into_a_copy(tmp_path: Path) -> None:
    tensors = {name: torch.randn(rows, 6) for name, rows in (("q", 4), ("k", 2), ("x", 3), ("v", 2))}
    file = write(tmp_path / "x.safetensors", tensors)
    start = file.read(["q"]).data_ptr()
    qk = file.read(["q", "k"])
    assert qk.data_ptr() == start and torch.equal(qk, torch.cat((tensors["q"], tensors["k"])))
    qkv = file.read(["q", "k", "v"])
    assert qkv.data_ptr() != start and torch.equal(qkv, torch.cat([tensors[n] for n in "qkv"]))
    kq = file.read(["k", "q"])
    assert torch.equal(kq, torch.cat((tensors["k"], tensors["q"]))), "order of the parts counts, not of the file"


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.randn(300)})
    data = path.read_bytes()
    path.write_bytes({"short": data[:-1], "long": data + b"x", "header": b"\xff" * 64, "empty": b""}[damage])
    with pytest.raises(CacheError, match="build again"):
        TensorFile(path)


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_what_the_rewrites_merge_lies_side_by_side(overrides: dict[str, bool], tmp_path: Path) -> None:
    from llmapi._build.export import export_graph

    config = {**tiny_config("llama", **overrides).to_dict(), "architectures": ["LlamaForCausalLM"]}
    spec = spec_of(config)
    specs = tensor_specs(spec, "float32")
    file = write(tmp_path / "x.safetensors", {s.name: dummy(0)(s) for s in specs})
    low = file.read([specs[0].name]).data_ptr()
    high = low + file.path.stat().st_size
    merged = [i for i in export_graph(spec).inputs if len(i.parts) > 1]
    assert len(merged) == spec.num_layers * (4 if overrides else 2)
    for graph_input in merged:
        assert low <= file.read(graph_input.parts).data_ptr() < high, f"{graph_input.name} is a copy"


def test_every_missing_unexpected_and_misshapen_tensor_is_named() -> None:
    model = tiny_model(tiny_config("llama"))
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    spec, state = spec_of(config), state_of(model)
    del state["model.layers.1.self_attn.k_proj.weight"], state["model.norm.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # harmless, and known to be
    with pytest.raises(CheckpointError) as caught:
        converted(Memory(state), family_of(config), spec, tensor_specs(spec, "float32"))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "2 missing: layers.1.self_attn.k_proj.weight, norm.weight" in message
    assert "1 unexpected: layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.2.mlp.up_proj.weight gives [3, 4], config.json wants [112, 64]" in message
    assert "inv_freq" not in message


def test_dummy_weights_follow_the_seed_and_the_name_alone() -> None:
    spec = spec_of({**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]})
    specs = tensor_specs(spec, "float32")
    first = {s.name: dummy(1)(s) for s in specs}
    values = dummy(1)
    some = {s.name: values(s) for s in specs[::-3]}
    assert all(torch.equal(first[name], tensor) for name, tensor in some.items())
    other = dummy(2)(specs[0])
    assert not torch.equal(first[specs[0].name], other)
    assert torch.equal(first["norm.weight"], torch.ones(64))
    assert 0.015 < float(first["embed.weight"].std()) < 0.025


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("lend", [True, False])
def test_tensors_come_straight_from_their_file(
    dtype: str, lend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans read in pieces give the values that mapped tensors give, cast or not, whole or some rows."""
    for module in ("llmapi._build.tensor_file._CHUNK", "llmapi._build.store.hashing_file._PIECE"):
        monkeypatch.setattr(module, 4096)  # several pieces for each matrix, and a last one that is shorter
    folder = tmp_path / "m"
    model = tiny_model(tiny_config("llama")).bfloat16()
    model.save_pretrained(str(folder), max_shard_size="100KB")
    snapshot = resolve(str(folder), digests=DigestMemory(tmp_path / "digests"))
    config = read_config(snapshot)
    spec, family = spec_of(config), family_of(config)
    specs = tensor_specs(spec, dtype)
    with open_checkpoint(snapshot) as checkpoint:
        values = converted(checkpoint, family, spec, specs)
        assert all(isinstance(values(s), FileSpan) for s in specs)
        path = tmp_path / "out.safetensors"
        if lend:
            records: list[FileRecord] = []
            with HashingFile(path, records.append) as out:
                write_weights(out, specs, values, lambda done: None)
            assert records == [FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())]
        else:
            with path.open("wb") as plain:
                write_weights(plain, specs, values, lambda done: None)
        monkeypatch.setattr(type(checkpoint), "span", lambda self, name: None)
        with (tmp_path / "mapped.safetensors").open("wb") as mapped:
            write_weights(mapped, specs, converted(checkpoint, family, spec, specs), lambda done: None)
    assert path.read_bytes() == (tmp_path / "mapped.safetensors").read_bytes()
    theirs = load_file(str(path))
    assert torch.equal(theirs["norm.weight"], model.model.norm.weight.detach().to(getattr(torch, dtype)))


def test_rows_of_a_span() -> None:
    span = FileSpan(Path("x"), 100, torch.float16, (6, 5))
    assert span.nbytes == 60
    assert span.rows(2, 4) == FileSpan(Path("x"), 120, torch.float16, (2, 5))
    assert span.rows(4, 99) == FileSpan(Path("x"), 140, torch.float16, (2, 5))
    assert span.rows(7, 9).shape == (0, 5)


def test_a_shard_cut_short_while_it_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(100))
    spec = TensorSpec("a", "float32", (64,))
    with pytest.raises(CheckpointError, match=r"x\.safetensors ends at byte 100, inside a tensor"):
        write_tensors(io.BytesIO(), [spec], lambda s: FileSpan(file, 10, torch.float32, (64,)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_tensors(io.BytesIO(), [spec], lambda s: FileSpan(tmp_path / "none", 0, torch.float32, (64,)))


MEASURE = """
import sys
from pathlib import Path

import torch

from llmapi._build.checkpoint import open_checkpoint, read_config
from llmapi._build.weights import converted, tensor_specs, write_weights
from llmapi._digests import DigestMemory
from llmapi._source import resolve
from llmapi.models.family import family_of, spec_of
import llmapi._kernels


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024


folder = Path(sys.argv[1])
snapshot = resolve(folder, digests=DigestMemory(folder / "digests"))
config = read_config(snapshot)
spec = spec_of(config)
specs = tensor_specs(spec, "float32")
torch.randn(512, 512).bfloat16().float()  # whatever torch allocates once
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
with open_checkpoint(snapshot) as checkpoint, (folder / "out").open("wb") as out:
    write_weights(out, specs, converted(checkpoint, family_of(config), spec, specs), lambda done: None)
print(status("VmHWM") - before)
"""


def test_conversion_takes_little_memory(tmp_path: Path) -> None:
    """At most the largest shard plus 1.3 times the largest tensor that is converted."""
    overrides = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8192}
    config = tiny_config("llama", **overrides, num_attention_heads=8)
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(str(tmp_path), max_shard_size="48MB")
    shards = [p.stat().st_size for p in tmp_path.glob("*.safetensors")]
    assert len(shards) > 3, "the test wants several shards"
    total = sum(shards)
    largest = max(p.numel() for p in model.parameters()) * (2 + 4)  # a tensor before and after
    bound = max(shards) + 1.3 * largest
    assert total > 1.5 * bound, "the test could not fail"
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout)
    assert peak <= bound, f"peak {peak / 1e6:.0f} MB, allowed {bound / 1e6:.0f} MB"
