"""One step of a loop, traced once, as many steps of it in a row: tracing them all takes minutes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

STEP_AXIS = 0
"""What a step takes of its own lies along the first axis of what all take."""


def unroll(model: ir.Model, steps: int, state: str) -> None:
    """Repeat what a graph of one step does, in place.

    A step is everything that depends on the state or on a part (a gathered first entry) of what holds
    something for each step; the rest is done once for all. Weights are shared.

    Args:
        steps: how many there are to be. Inputs and values that hold one entry for each get as many.
        state: input that every step takes from the one before it; the only output that is returned
            under that name and :data:`hart_runtime.runtime.contract.OUT`.
    """
    graph = model.graph
    (begin,) = (value for value in graph.inputs if value.name == state)
    (end,) = (value for value in graph.outputs if value.name == f"{state}_out")
    parts = {node: value for node in graph if (value := _part_of(node)) is not None}
    step = _following([begin, *(node.outputs[0] for node in parts)], graph)
    body = [node for node in graph if node in parts or node in step]
    of_all = [value for value in graph.inputs if _first_axis(value) == 1]
    before = [node for node in _following(of_all, graph) if node not in parts and node not in step]
    made = [
        value for node in before for value in node.outputs if value.dtype and value.dtype.is_floating_point()
    ]
    for value in (*of_all, *made):  # shapes of shapes stay
        if _first_axis(value) == 1 and value.shape is not None:
            value.shape = ir.Shape([steps, *value.shape[1:]])
    last = end
    for number in range(1, steps):
        known: dict[ir.Value, ir.Value] = {begin: last}
        for node in body:
            last_node = _again(node, number, known, node in parts)
            graph.append(last_node)
        last = known[end]
    _return_instead(graph, end, last)


def _first_axis(value: ir.Value) -> object:
    return value.shape[STEP_AXIS] if value.shape is not None and value.shape.rank() else None


def _part_of(node: ir.Node) -> ir.Value | None:
    """What a node takes the first entry of, if it does that alone."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != STEP_AXIS:
        return None
    index = node.inputs[1]
    constant = index.const_value if index is not None else None
    if constant is None or constant.shape.rank() or int(constant.numpy()) != 0:
        return None
    return node.inputs[0]


def _following(values: list[ir.Value], graph: ir.Graph) -> set[ir.Node]:
    """All nodes that depend on values."""
    reached = set(values)
    found: set[ir.Node] = set()
    for node in graph:
        if any(value in reached for value in node.inputs if value is not None):
            found.add(node)
            reached.update(node.outputs)
    return found


def _again(node: ir.Node, number: int, known: dict[ir.Value, ir.Value], part: bool) -> ir.Node:
    """A node in a later step; ``known`` are values of the first step with that step's."""
    inputs = [known.get(value, value) if value is not None else None for value in node.inputs]
    if part:
        tensor = ir.tensor(np.array(number, np.int64), name=f"step.{number}")
        inputs[1] = _constant(node, tensor)
    outputs = []
    for value in node.outputs:
        copy = ir.Value(name=f"{value.name}.{number}", shape=value.shape, type=value.type)
        known[value] = copy
        outputs.append(copy)
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        name=f"{node.name}.{number}" if node.name else None,
        metadata_props=dict(node.metadata_props),
    )


def _constant(node: ir.Node, tensor: ir.TensorProtocol) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        graph.register_initializer(value)
    return graph.initializers[tensor.name]


def _return_instead(graph: ir.Graph, before: ir.Value, after: ir.Value) -> None:
    """Let the graph return another value in the place of one, under its name."""
    name = before.name
    before.name, after.name = f"{name}.0", name
    graph.outputs[[value is before for value in graph.outputs].index(True)] = after
