"""Prints, as JSON, what TensorRT's bindings say of the names that the plugin path's engine uses. Run by a test."""

from __future__ import annotations

import json

import tensorrt as trt

NAMES = {
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": [
        "create_execution_context", "device_memory_size_v2", "get_tensor_name", "num_io_tensors",
        "num_optimization_profiles",
    ],
    "IExecutionContext": [
        "execute_async_v3", "infer_shapes", "set_device_memory", "set_input_shape", "set_optimization_profile_async",
        "set_tensor_address",
    ],
}  # fmt: skip

if __name__ == "__main__":
    found = {
        kind: {name: getattr(getattr(trt, kind), name).__doc__ or "" for name in names} for kind, names in NAMES.items()
    }
    strategies = list(trt.ExecutionContextAllocationStrategy.__members__)
    print(json.dumps({"names": found, "strategies": strategies, "members": {k: dir(getattr(trt, k)) for k in NAMES}}))
