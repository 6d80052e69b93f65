"""Export: TransformerSpec to graph. The model is traced by ``torch.export`` on the meta device; no weight is needed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import llmapi._kernels  # noqa: F401  (defines torch.ops.llmapi)
from llmapi._build.graph import STEP_INPUTS, Graph, Input, Node, Ref
from llmapi._build.rewrite import rewrite
from llmapi.errors import BuildError
from llmapi.models.spec import TransformerSpec
from llmapi.models.transformer import Transformer


def export_graph(spec: TransformerSpec) -> Graph:
    """The step of a model, exported and rewritten.

    Args:
        spec: the architecture.

    Raises:
        BuildError: torch.export refused the model.
    """
    return to_graph(rewrite(trace(spec)))


def trace(spec: TransformerSpec) -> fx.GraphModule:
    """The step of a model as torch.export gives it; each placeholder's ``meta["input"]`` holds its Input.

    Args:
        spec: the architecture.
    """
    with torch.device("meta"):
        model = Transformer(spec).eval()
    tokens, rows, width, wanted, blocks = (torch.export.Dim(name) for name in ("T", "B", "M", "N", "blocks"))

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    def caches() -> list[torch.Tensor]:
        shape = (7, 16, spec.num_kv_heads, spec.head_dim)
        return [torch.zeros(shape, device="meta") for _ in range(spec.num_layers)]

    args = (ints(9), ints(9), ints(9), ints(3, 4), ints(3), ints(4), ints(2), caches(), caches())
    shapes = (
        {0: tokens}, {0: tokens}, {0: tokens}, {0: rows, 1: width}, {0: rows}, {0: rows + 1}, {0: wanted},
        [{0: blocks}] * spec.num_layers, [{0: blocks}] * spec.num_layers,
    )  # fmt: skip
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, dynamic_shapes=shapes)
    except Exception as error:
        raise BuildError(
            f"torch.export {torch.__version__} could not trace the {spec.family} model: {error}. This is a defect of "
            "llmapi or of this torch version; please report it with the model's config.json"
        ) from error
    _label_inputs(program, spec)
    module: fx.GraphModule = program.graph_module
    return module


def _label_inputs(program: torch.export.ExportedProgram, spec: TransformerSpec) -> None:
    signature = program.graph_signature
    for node in program.graph.find_nodes(op="placeholder"):
        name, shape = node.name, tuple(node.meta["val"].shape)
        if name in signature.inputs_to_parameters:
            canonical = signature.inputs_to_parameters[name]
            node.meta["input"] = Input(canonical, "weight", (canonical,), shape)
        elif name in signature.inputs_to_buffers:
            canonical = signature.inputs_to_buffers[name]
            node.meta["input"] = Input(canonical, "constant", (canonical,), shape)
        elif name in STEP_INPUTS:
            node.meta["input"] = Input(name, "step", (name,), STEP_INPUTS[name])
        else:
            kind, _, layer = name.partition("_caches_")
            label: Any = f"{kind}_cache"
            cache_shape = ("blocks", "block_size", spec.num_kv_heads, spec.head_dim)
            node.meta["input"] = Input(f"{label}.{layer}", label, (layer,), cache_shape)


def to_graph(module: fx.GraphModule) -> Graph:
    """The fx graph as plain data.

    Args:
        module: as :func:`trace` or a rewrite gave it.
    """
    inputs: list[Input] = []
    nodes: list[Node] = []
    names: dict[fx.Node, Ref] = {}
    output: Ref | None = None

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.meta["input"])
            names[node] = Ref(node.meta["input"].name)
        elif node.op == "call_function":
            path = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][0]
            args = tuple(plain(a) for a in node.args)
            nodes.append(Node(node.name, _op_name(node.target), args, {k: plain(v) for k, v in node.kwargs.items()}, path))
            names[node] = Ref(node.name)
        elif node.op == "output":
            (result,) = node.args[0]
            output = names[result]
        else:
            raise BuildError(f"the exported graph has a node of an unexpected kind: {node.format_node()}")
    assert output is not None
    return Graph(tuple(inputs), tuple(nodes), output)


def _op_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    raise BuildError(f"the exported graph calls {target!r}, which is not an operator")
