"""Convert a 7B-shaped checkpoint of many shards: time, throughput against the disk's own rate, peak memory.

    python benchmarks/convert.py                     # 8 of the 32 layers, about 3.5 GB
    python benchmarks/convert.py --layers 32         # the whole shape of Llama-2-7B, 13.5 GB; needs three times that
    python benchmarks/convert.py --dtype float32     # with a cast, so that twice as much is written as is read

The checkpoint holds made-up bfloat16 values in safetensors shards with an index. Each turn measures the disk and then
converts, in a fresh process, through the same calls as a start: the digests of the shards, then the phase "convert".
Before either, the shards are dropped from the page cache, and what is written counts until it is on the disk (fsync).
The binding rate is the one that keeps the disk busy the longest alone: bytes read over the read rate, or bytes written
over the write rate. The target is at least 60 % of it. A disk need not reach both rates at once, so a plain copy that
reads and writes at the same time is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
_CHUNK = 8 << 20


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama checkpoint."""
    hidden, inner, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            found[f"{layer}self_attn.{name}_proj.weight"] = (hidden, hidden)
        found[f"{layer}mlp.gate_proj.weight"] = found[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def make(folder: Path, layers: int, shard_bytes: int) -> int:
    """Write the checkpoint; its size in bytes."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "num_key_value_heads": SHAPE["num_attention_heads"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **SHAPE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensors(layers).items():
        size = 2 * _count(shape)
        if held + size > shard_bytes and shards[-1]:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    pattern = b"".join((0x3C00 + (i * 2654435761 >> 12) % 0x180).to_bytes(2, "little") for i in range(1 << 20))
    index, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + 2 * _count(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset, index[name] = end, file.name
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, offset, len(pattern)):
                out.write(pattern[: offset - start])
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    os.sync()
    return total


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def forget(*files: Path) -> None:
    """Drop files from the page cache, so that reading them reads the disk."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_rates(folder: Path, size: int) -> dict[str, float]:
    """Bytes a second of plain sequential writing (until fsync) and of reading what is not in the page cache."""
    file, data = folder / "disk-rate.bin", os.urandom(_CHUNK)
    start = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for _ in range(0, size, _CHUNK):
            out.write(data)
        os.fsync(out.fileno())
    write = size / (time.perf_counter() - start)
    forget(file)
    buffer = bytearray(_CHUNK)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    read = size / (time.perf_counter() - start)
    file.unlink()
    return {"write": write, "read": read}


def copy_rate(sources: list[Path], folder: Path) -> float:
    """Bytes a second of a plain copy that reads and writes at the same time, until fsync: nothing is computed."""
    forget(*sources)
    file, size = folder / "copy-rate.bin", sum(s.stat().st_size for s in sources)
    empty: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    full: queue.SimpleQueue[tuple[bytearray, int]] = queue.SimpleQueue()
    for _ in range(4):
        empty.put(bytearray(_CHUNK))

    def write() -> None:
        with file.open("wb", buffering=0) as out:
            left = size
            while left:
                buffer, count = full.get()
                out.write(memoryview(buffer)[:count])
                os.posix_fadvise(out.fileno(), out.tell() - count, count, os.POSIX_FADV_DONTNEED)  # begin with it
                empty.put(buffer)
                left -= count
            os.fsync(out.fileno())

    writer = threading.Thread(target=write)
    start = time.perf_counter()
    writer.start()
    for source in sources:
        with source.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer := empty.get()):
                full.put((buffer, count))
            empty.put(buffer)
    writer.join()
    seconds = time.perf_counter() - start
    file.unlink()
    return size / seconds


def convert(folder: str, cache: str, dtype: str) -> dict[str, Any]:
    """Convert in this process, as a start does: seconds and bytes of the phases, peak memory."""
    from llmapi._build.pipeline import Builder
    from llmapi._build.report import BuildReport
    from llmapi._build.store import Store
    from llmapi._build.weights import tensor_specs
    from llmapi._digests import DigestMemory
    from llmapi._runtime.options import ModelOptions
    from llmapi._runtime.start import find_recipe
    from llmapi.config import EngineOptions

    report = BuildReport(folder)
    digests = DigestMemory(Path(cache) / "digests")
    options = ModelOptions(folder, cache_dir=cache, progress=False)
    snapshot, _, recipe = find_recipe(options, EngineOptions(dtype=dtype), digests)
    start = time.perf_counter()
    snapshot.digests(snapshot.weight_files)
    digest_seconds = time.perf_counter() - start
    forget(*(f.path for f in snapshot.weight_files))
    builder = Builder(Store(Path(cache), budget_bytes=1 << 60), report, progress=False)
    tensor_specs(recipe.spec, dtype)  # whatever torch loads once is not conversion's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    written = builder.weights(recipe)
    size = sum(f.stat().st_size for f in written.glob("*.safetensors"))
    builder.close()
    return {
        "digest": digest_seconds,
        "convert": next(p.seconds for p in report.phases if p.name == "convert"),
        "written": size,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def main() -> None:
    """Make the checkpoint, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument(
        "--disk-mb", type=int, default=0, help="size of the file that measures the disk; 0: the model's"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default the temporary folder")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(convert(*options.one)))
        return
    place = Path(tempfile.mkdtemp(prefix="llmapi-convert-", dir=options.folder))
    try:
        model = place / "model"
        model.mkdir()
        size = make(model, options.layers, options.shard_mb << 20)
        shards = sorted(model.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB of bfloat16 in {len(shards)} shards, converted to {options.dtype}")
        ratios = []
        for turn in range(options.turns):
            rates = disk_rates(place, options.disk_mb << 20 or size)
            copied = copy_rate(shards, place)
            forget(*shards)
            command = [sys.executable, __file__, "--one", str(model), str(place / "cache"), options.dtype]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                sys.exit(run.stderr)
            found = json.loads(run.stdout.splitlines()[-1])
            shutil.rmtree(place / "cache")
            seconds = found["convert"]
            alone = max(size / rates["read"], found["written"] / rates["write"])
            ratios.append(alone / seconds)
            print(
                f"turn {turn + 1}: disk writes {rates['write'] / 1e6:.0f} MB/s, reads {rates['read'] / 1e6:.0f} MB/s; "
                f"digest {found['digest']:.2f} s; convert {seconds:.2f} s, {size / seconds / 1e6:.0f} MB/s in, "
                f"{found['written'] / seconds / 1e6:.0f} MB/s out, {100 * ratios[-1]:.0f} % of the binding rate; "
                f"{100 * found['written'] / seconds / copied:.0f} % of a plain copy ({copied / 1e6:.0f} MB/s); "
                f"peak memory +{found['peak'] / 1e6:.0f} MB",
                flush=True,
            )
        print(f"median {100 * statistics.median(ratios):.0f} % of the binding rate of the disk (target 60 %)")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
