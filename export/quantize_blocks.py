"""Weights in 8-bit integers for tokens that stay in float32, on the CPU.

A language model's tokens have a few channels hundreds of times as large as the others (arXiv 2208.07339),
which one scale a token would lose, and its weights may be as much smaller where they meet these. So
every channel of a token is multiplied by how large its weights are, and weights that are all alike are
rounded, with one scale for a block of a column. Tables that tokens are looked up in become half.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hart_runtime.export.quantize import constant, is_large
from hart_runtime.export.rewrite import remove_unused, replace_node

LEVELS, ZERO = 127, 128
"""Weights become unsigned 8-bit numbers, 1 to 255 around 128: the operator's own zero."""
LARGEST_BLOCK, SMALLEST_BLOCK = 64, 16
"""Inputs that share a scale: the largest power of two that divides them and that the operator takes. Blocks
of 32 would take a twentieth more bytes and round a tenth less."""
FLOAT32_TOKENS = 1
"""Accuracy level of ``MatMulNBits`` that leaves tokens as they are."""
TINY = np.float32(1e-30)
WHOLE = ".whole"
"""Ends the name of a weight that was made float32 again."""

Matrix = NDArray[np.float32]


def block_of(inputs: int) -> int:
    """How many inputs share a scale; 0 where the operator has no such block."""
    block = min(inputs & -inputs, LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


def quantize_blocks(model: ir.Model) -> ir.Model:
    """Store weights of large products in 8 bits and tables in half, in place, and return the model.

    ``x @ w`` becomes ``(x * g) @ ((q - 128) * s).T`` in standard operators, with ``g`` (inputs), ``q`` uint8
    (outputs, blocks, block) and ``s`` (outputs, blocks); all products of ``x`` have one ``g``. A row of a
    table is made float32 once it was found.
    """
    graph = model.graph
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in list(graph):
        first, *more = node.inputs
        if node.op_type == "MatMul" and more[0] is not None and _has_blocks(more[0]):
            products.setdefault(first, []).append(node)
        elif node.op_type == "Gather" and first is not None and _fits_half(first):
            half = constant(graph, f"{first.name}.half", first.const_value.numpy().astype(np.float16))
            row = ir.node("Gather", [half, *more], node.attributes, name=node.name)
            wide = ir.node("Cast", row.outputs, {"to": ir.DataType.FLOAT}, name=f"{node.name}/float")
            replace_node(model, node, row, wide)
    for x, nodes in products.items():
        gain = channel_gain([node.inputs[1].const_value.numpy() for node in nodes])
        even = ir.node(
            "Mul", [x, constant(graph, f"{nodes[0].name}.gain", gain)], name=f"{nodes[0].name}/even"
        )
        even.outputs[0].shape, even.outputs[0].dtype = x.shape, ir.DataType.FLOAT
        graph.insert_before(nodes[0], even)
        for node in nodes:
            node.replace_input_with(0, even.outputs[0])
            _write_out(graph, node, gain)
    remove_unused(model)
    return model


def multiply_blocks(model: ir.Model) -> ir.Model:
    """Make products with such weights one operator of ONNX Runtime, in place, and return the model."""
    graph = model.graph
    model.opset_imports.setdefault("com.microsoft", 1)
    for product in [node for node in graph if node.op_type == "MatMul"]:
        x, weight = product.inputs
        name = (weight.name or "").removesuffix(WHOLE) if weight is not None else ""
        values, scales = graph.initializers.get(f"{name}.uint8"), graph.initializers.get(f"{name}.scale")
        if values is None or values.shape is None:
            continue
        outputs, blocks, block = (int(n) for n in values.shape)
        attributes = {
            "K": blocks * block,
            "N": outputs,
            "bits": 8,
            "block_size": block,
            "accuracy_level": FLOAT32_TOKENS,
        }
        one = ir.node(
            "MatMulNBits", [x, values, scales], attributes, domain="com.microsoft", name=product.name
        )
        replace_node(model, product, one)
    remove_unused(model)
    return model


def channel_gain(weights: Sequence[Matrix]) -> NDArray[np.float32]:
    """(inputs) How large the weights (inputs, outputs) of each input are, the root of their mean square."""
    squares = sum(np.square(weight, dtype=np.float64).sum(axis=1) for weight in weights)
    count = sum(weight.shape[1] for weight in weights)
    return np.maximum(np.sqrt(squares / count), TINY).astype(np.float32)


def quantize_weight(weight: Matrix) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(inputs, outputs) float to uint8 (outputs, blocks, block), and the scale of each block."""
    inputs, outputs = weight.shape
    blocks = weight.T.reshape(outputs, -1, block_of(inputs))
    scale = np.maximum(np.abs(blocks).max(axis=-1), TINY) / np.float32(LEVELS)
    return (np.rint(blocks / scale[..., None]) + ZERO).astype(np.uint8), scale


def _has_blocks(weight: ir.Value) -> bool:
    return is_large(weight) and block_of(int(weight.const_value.shape[0])) > 0


def _fits_half(table: ir.Value) -> bool:
    return is_large(table) and bool(np.abs(table.const_value.numpy()).max() <= np.finfo(np.float16).max)


def _write_out(graph: ir.Graph, product: ir.Node, gain: NDArray[np.float32]) -> None:
    weight = product.inputs[1]
    values, scales = quantize_weight(weight.const_value.numpy() / gain[:, None])
    name, nodes = weight.name, []

    def made(operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes, name=f"{product.name}/{operator.lower()}"))
        return nodes[-1].outputs[0]

    q, s = constant(graph, f"{name}.uint8", values), constant(graph, f"{name}.scale", scales)
    zero = constant(graph, f"{name}.zero", np.array(ZERO, np.float32))
    last = constant(graph, f"{name}.last", np.array([-1], np.int64))
    shape = constant(graph, f"{name}.shape", np.array([len(values), -1], np.int64))
    whole = made("Mul", made("Sub", made("Cast", q, to=ir.DataType.FLOAT), zero), made("Unsqueeze", s, last))
    columns = made("Transpose", made("Reshape", whole, shape), perm=[1, 0])
    columns.name, columns.shape, columns.dtype = f"{name}{WHOLE}", weight.shape, ir.DataType.FLOAT
    graph.insert_before(product, nodes)
    product.replace_input_with(1, columns)
