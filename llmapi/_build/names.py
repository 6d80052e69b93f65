"""Names of the files inside artifacts."""

WEIGHTS_FILE = "model.safetensors"
GRAPH_FILE = "graph.json"
CONSTANTS_FILE = "constants.safetensors"
CUBIN_FILE = "kernel.cubin"
TUNING_FILE = "tuning.json"
CPU_KERNELS_FILE = "kernels.so"
