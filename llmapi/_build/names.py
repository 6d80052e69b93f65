"""Names of the files inside artifacts."""

WEIGHTS_FILE = "model.safetensors"
GRAPH_FILE = "graph.json"
CONSTANTS_FILE = "constants.safetensors"
CPU_KERNELS_FILE = "kernels.so"
