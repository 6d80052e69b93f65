"""How long a TensorRT plan of a large model takes to build, and in how much memory. No GPU and no weights are needed.

    python benchmarks/tensorrt_build.py                      # 32 layers of Llama 3 8B's shape, bfloat16, sm80
    python benchmarks/tensorrt_build.py --target sm89,sm120 --layers 8

Peak memory is that of the whole process, Python, torch and the export included.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from llmapi._build.export import export_graph
from llmapi._build.tensorrt.package import load_package
from llmapi._build.tensorrt.plan import build_plan
from llmapi.config import EngineOptions, resolve
from llmapi.models.family import spec_of
from llmapi.models.transformer import constants

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}


def main() -> None:
    """Build once, and print the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--target", default="sm80", help="such as sm89,sm120; 'portable' for none")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-seq-len", type=int, default=4096)
    args = parser.parse_args()
    spec = spec_of({**LLAMA_8B, "num_hidden_layers": args.layers})
    target = None if args.target == "portable" else args.target
    config = resolve(
        EngineOptions(backend="tensorrt", dtype=args.dtype, target=target, max_seq_len=args.max_seq_len), spec
    )
    package = load_package()
    start = time.perf_counter()
    graph = export_graph(spec)
    exported = time.perf_counter()
    plan, info = build_plan(package, graph, spec, config, constants(spec))
    built = time.perf_counter()
    figures = {
        "package": f"{info.package} {info.version}",
        "layers": args.layers,
        "targets": info.targets or "portable",
        "dtype": info.dtype,
        "export_s": round(exported - start, 1),
        "build_s": round(built - exported, 1),
        "plan_mib": round(plan.nbytes / 2**20, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
