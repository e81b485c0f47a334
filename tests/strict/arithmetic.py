"""The arithmetic of a GPU, computed by ONNX Runtime's CPU provider.

That provider computes a node typed half in float32 and may pass the result on before it is rounded.
Here a graph is rewritten so that it does not matter: everything is float32, and what the graph
types half is rounded to half behind the node that made it (to infinity from 65520 on). With TF32 the
operands of products that the graph types float32 are rounded to the 10 bits of mantissa that it keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
PRODUCTS = {"MatMul": 2, "Gemm": 2, "Conv": 2, "ConvTranspose": 2, "MultiHeadAttention": 3, "Attention": 3}
"""Operators that TF32 changes, with the number of their operands."""
EXACT = frozenset(
    [
        *("Reshape", "Transpose", "Concat", "Slice", "Gather", "GatherElements", "Squeeze", "Unsqueeze"),
        *(
            "Expand",
            "Tile",
            "Identity",
            "Split",
            "Flatten",
            "Where",
            "Pad",
            "Neg",
            "Abs",
            "Relu",
            "Max",
            "Min",
        ),
        *(
            "TopK",
            "ReduceMax",
            "ReduceMin",
            "Clip",
            "ScatterElements",
            "ScatterND",
            "GatherND",
            "DepthToSpace",
        ),
    ]
)
"""Operators that make no number which was not there before: nothing is to be rounded."""


def element_types(model: ModelProto) -> dict[str, int]:
    """Of every tensor in a graph, also behind operators that ONNX has no rules for."""
    known = ModelProto()
    known.CopyFrom(model)
    while True:
        graph = onnx.shape_inference.infer_shapes(known).graph
        types = {i.name: i.data_type for i in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type:
                types.setdefault(value.name, value.type.tensor_type.elem_type)
        foreign = [n for n in graph.node if n.domain and n.output[0] not in types and n.input[0] in types]
        if not foreign:
            return types
        for node in foreign:
            known.graph.value_info.extend(
                helper.make_tensor_value_info(name, types[node.input[0]], None)
                for name in node.output
                if name
            )


def session(model: ModelProto | Path, tf32: bool) -> onnxruntime.InferenceSession:
    """A session that computes a graph as a GPU does.

    Args:
        model: with its weights in it, or a file whose weights may lie beside it.
        tf32: whether float32 products are rounded.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Optimizations fuse a node with its neighbours, and would take two casts that undo each other out.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, Path):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(model.parent)
        )
        model = onnx.load(model, load_external_data=False)
    content = rewritten(model, tf32).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def rewritten(model: ModelProto, tf32: bool) -> ModelProto:
    """A graph of the same inputs and outputs that rounds where a GPU would."""
    types = element_types(model)
    new = ModelProto()
    new.CopyFrom(model)
    graph = new.graph
    del graph.node[:], graph.value_info[:]
    given = [v.name for v in (*graph.input, *graph.initializer)]
    for name in given:
        if types[name] == HALF:
            graph.node.append(_cast(name, _single(name), FLOAT))
    for node in model.graph.node:
        graph.node.extend(_rounding(node, types))
    for value in graph.output:
        if types[value.name] == HALF:
            graph.node.append(_cast(_single(value.name), value.name, HALF))
    if tf32:
        _round_products(graph, types)
    return new


def _rounding(node: NodeProto, types: Mapping[str, int]) -> Iterator[NodeProto]:
    """A node in float32, and what rounds its outputs."""
    if any(a.type in {AttributeProto.GRAPH, AttributeProto.GRAPHS} for a in node.attribute):
        raise NotImplementedError(f"{node.op_type} holds a graph of its own")
    changed = NodeProto()
    changed.CopyFrom(node)
    del changed.input[:], changed.output[:]
    changed.input.extend(_single(n) if types.get(n) == HALF else n for n in node.input)
    for attribute in changed.attribute:
        if attribute.name in {"to", "dtype"} and attribute.i == HALF:
            attribute.i = FLOAT
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type == HALF:
            single = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(single))
    after = []
    for name in node.output:
        if types.get(name) != HALF or node.op_type in EXACT:
            changed.output.append(_single(name) if types.get(name) == HALF else name)
            continue
        changed.output.append(f"{name}/exact")
        after.append(_cast(f"{name}/exact", f"{name}/half", HALF))
        after.append(_cast(f"{name}/half", _single(name), FLOAT))
    yield changed
    yield from after


def _round_products(graph: GraphProto, types: Mapping[str, int]) -> None:
    """Round what goes into float32 products: x * 8193 - (x * 8193 - x) keeps 11 significant bits."""
    graph.initializer.append(numpy_helper.from_array(np.float32(8193), "tf32/split"))
    nodes: list[NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        for place in range(min(PRODUCTS.get(node.op_type, 0), len(node.input))):
            name = node.input[place]
            if types.get(name) != FLOAT:
                continue
            large, rest, rounded = (f"{name}/tf32/{part}" for part in ("large", "rest", "rounded"))
            if name not in done:
                done.add(name)
                nodes.append(helper.make_node("Mul", [name, "tf32/split"], [large]))
                nodes.append(helper.make_node("Sub", [large, name], [rest]))
                nodes.append(helper.make_node("Sub", [large, rest], [rounded]))
            node.input[place] = rounded
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _single(name: str) -> str:
    """What a tensor typed half is called in float32."""
    return f"{name}/single"


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)


@functools.cache
def _types() -> dict[str, np.dtype[Any]]:
    return {
        f"tensor({name})": np.dtype(kind)
        for name, kind in {
            "float": "float32",
            "float16": "float16",
            "double": "float64",
            "int64": "int64",
            "int32": "int32",
            "bool": "bool",
            "uint8": "uint8",
            "int8": "int8",
        }.items()
    }


def dtype_of(value: Any) -> np.dtype[Any]:
    """Of an input or output of a session."""
    return _types()[value.type]


def compute(
    computing: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """All outputs by name."""
    names = [value.name for value in computing.get_outputs()]
    found = computing.run(names, dict(inputs))
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}
