"""How large the tensors of a graph are, for shapes of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, helper


class Known(NamedTuple):
    """A tensor inside a graph."""

    shape: tuple[int, ...] | None
    """None where it depends on values."""
    nbytes: int


def tensors(
    model: ModelProto, inputs: Mapping[str, tuple[int, ...]], types: Mapping[str, int]
) -> dict[str, Known]:
    """Every tensor that nodes of a graph make, for these shapes of its inputs."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        value.CopyFrom(helper.make_tensor_value_info(value.name, types[value.name], inputs[value.name]))
    for value in fixed.graph.output:
        value.CopyFrom(helper.make_tensor_value_info(value.name, types[value.name], None))
    del fixed.graph.value_info[:]
    graph = _inferred(fixed, types)
    found = {}
    for value in (*graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        whole = value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims)
        shape = tuple(d.dim_value for d in dims) if whole else None
        item = helper.tensor_dtype_to_np_dtype(types[value.name]).itemsize if value.name in types else 0
        found[value.name] = Known(shape, 0 if shape is None else int(np.prod(shape, dtype=np.int64)) * item)
    return found


def _inferred(model: ModelProto, types: Mapping[str, int]) -> onnx.GraphProto:
    """With attention that ONNX has no rules for, whose result is like its queries."""
    while True:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        known = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input)}
        foreign = [n for n in graph.node if n.domain and n.output[0] not in known and n.input[0] in known]
        if not foreign:
            return graph
        for node in foreign:
            dims = [d.dim_value or None for d in known[node.input[0]].shape.dim]
            made = helper.make_tensor_value_info(node.output[0], types[node.output[0]], dims)
            model.graph.value_info.append(made)


def peak(model: ModelProto, known: Mapping[str, Known], without: Collection[str] = ()) -> int:
    """Most bytes that live at once between the inputs and the outputs of a graph.

    Args:
        without: tensors that are never written out.
    """
    nodes = [*model.graph.node]
    last = {name: number for number, node in enumerate(nodes) for name in node.input}
    outside = {v.name for v in model.graph.output} | {*without}
    now = highest = 0
    ends: dict[int, int] = {}
    for number, node in enumerate(nodes):
        for name in node.output:
            if name in known and name not in outside:
                now += known[name].nbytes
                end = last.get(name, number)
                ends[end] = ends.get(end, 0) + known[name].nbytes
        highest = max(highest, now)
        now -= ends.get(number, 0)
    return highest
