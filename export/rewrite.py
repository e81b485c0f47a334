"""Traced graphs, rewritten where the exporter's form costs a wait or is refused; results stay the same."""

from __future__ import annotations

import onnx_ir as ir

ONE_NUMBER = frozenset({"Reshape", "Gather", "Squeeze", "Unsqueeze", "Identity"})
"""Operators that leave a single number what it is."""


def read_directly(model: ir.Model) -> None:
    """Let TopK read how many it keeps from the graph's input itself.

    The exporter takes the number out of its tensor and puts it into one again. Those nodes run on the
    GPU, so ONNX Runtime copies the result back to the host at every scale, waits for it, and captures
    no such graph.
    """
    inputs = set(model.graph.inputs)
    for node in [node for node in model.graph if node.op_type == "TopK"]:
        source = node.inputs[1]
        while source is not None and (made := source.producer()) is not None and made.op_type in ONE_NUMBER:
            source = made.inputs[0]
        if source in inputs and source.shape == ir.Shape([1]):
            node.replace_input_with(1, source)
    remove_unused(model)


def write_out_squares(model: ir.Model) -> None:
    """Sizes times themselves as products: not every engine has powers of whole numbers."""
    for node in [node for node in model.graph if node.op_type == "Pow"]:
        base, exponent = node.inputs
        (power,) = node.outputs
        assert exponent is not None
        if power.dtype != ir.DataType.INT64 or exponent.const_value is None:
            continue
        if exponent.const_value.numpy().item() == 2:
            replace_node(model, node, ir.node("Mul", [base, base]))


def replace_node(model: ir.Model, old: ir.Node, *new: ir.Node) -> None:
    """Put nodes, the last of which makes the result, in the place of one with a single output."""
    (before,), (after,) = old.outputs, new[-1].outputs
    after.dtype, after.shape = before.dtype, before.shape
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], new, [before], [after])


def remove_unused(model: ir.Model) -> None:
    """Nodes whose results nobody reads, and weights."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
