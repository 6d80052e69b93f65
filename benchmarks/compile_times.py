"""How long NVRTC takes for the kernels of one module, each on one core. No GPU is needed.

    PYTHONPATH=. python benchmarks/compile_times.py sample_cuda --only SPLIT=1 SPLIT=4 --repeats 3

Seconds are of processor time, the median of the repeats, which go through all units in turn.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time

from llmapi._kernels import nvrtc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="of llmapi/_kernels, such as sample_cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=nvrtc.DTYPE_MACRO)
    parser.add_argument("--arch", default="sm_90a", choices=nvrtc.ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[], metavar="MACRO", help="units that have one of these macros")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    units = importlib.import_module(f"llmapi._kernels.{args.module}").units(args.dtype)
    units = [unit for unit in units if not args.only or set(args.only) & set(unit.label.split())]
    seconds: dict[str, list[float]] = {unit.label: [] for unit in units}
    for _ in range(args.repeats):
        for unit in units:
            begun = time.process_time()
            nvrtc.compile_unit(unit, args.arch)
            seconds[unit.label].append(time.process_time() - begun)
    print(f"NVRTC {nvrtc.version()}, {args.arch}")
    for label, taken in seconds.items():
        print(f"{statistics.median(taken):6.1f} s  {label}")
    print(f"{sum(statistics.median(taken) for taken in seconds.values()):6.1f} s in all")


if __name__ == "__main__":
    main()
