"""Matrix products in 8-bit integers, for the CPU.

Weights have one scale a column, tokens one scale a row, taken when the product runs: what a token
becomes depends on no other token, so pictures stay independent of the batch they are drawn in.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

TOKEN_LEVELS, TOKEN_ZERO = 127, 128
"""Tokens become unsigned 8-bit numbers, 1 to 255 around 128."""
WEIGHT_LEVELS = 63
"""Weights become 7-bit numbers. Processors without VNNI or AMX add pairs of products in 16 bits
(2 * 255 * 63 fits, 2 * 255 * 127 would be cut off without a word)."""
SMALLEST = 64
"""Products with a shorter side than this stay as they are: they take no time."""


def quantize_weights(model: ir.Model) -> ir.Model:
    """Store the weights of large products in 8 bits, in place, and return the model.

    ``x @ w`` becomes ``x @ DequantizeLinear(q, c)`` with ``q`` int8 and ``c`` (columns): standard
    operators, for runtimes that make 8-bit products of that themselves.
    """
    graph = model.graph
    for product in [node for node in graph if node.op_type == "MatMul"]:
        weight = product.inputs[1]
        if weight is None or not is_large(weight):
            continue
        values, columns = quantize_weight(weight.const_value.numpy())  # type: ignore[union-attr]
        parts = [
            constant(graph, f"{weight.name}.int8", values),
            constant(graph, f"{weight.name}.scale", columns),
        ]
        whole = ir.node("DequantizeLinear", parts, {"axis": 1}, name=f"{product.name}/weight")
        whole.outputs[0].shape, whole.outputs[0].dtype = weight.shape, ir.DataType.FLOAT
        graph.insert_before(product, whole)
        product.replace_input_with(1, whole.outputs[0])
    _drop_unused(graph)
    return model


def quantize_products(model: ir.Model) -> ir.Model:
    """Make products with such weights whole numbers for ONNX Runtime, in place, and return the model.

    ``y = x @ DequantizeLinear(q, c)`` becomes ``s * (round(x / s) @ q) * c`` with ``s`` (..., 1) from
    each row's largest magnitude. A row with NaN stays NaN.
    """
    graph = model.graph
    tokens: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    model.opset_imports.setdefault("com.microsoft", 1)
    constants = {
        name: constant(graph, f"int8.{name}", np.asarray(value))
        for name, value in {
            "one": np.float32(1),
            "step": np.float32(1 / TOKEN_LEVELS),
            "tiny": np.float32(1e-30),
            "zero": np.uint8(TOKEN_ZERO),
            "last": np.array([-1], np.int64),
        }.items()
    }
    for whole in [node for node in graph if node.op_type == "DequantizeLinear"]:
        values, columns = whole.inputs
        for product in list(whole.outputs[0].consumers()):
            x = product.inputs[0]
            assert x is not None
            if x not in tokens:
                tokens[x] = _quantize_tokens(graph, product, x, constants)
            quantized, scale = tokens[x]
            inputs = [quantized, values, constants["one"], columns, constants["zero"]]
            name = product.name
            integer = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=f"{name}/int8")
            scaled = ir.node("Mul", [integer.outputs[0], scale], name=f"{name}/scale")
            graph.insert_before(product, [integer, scaled])
            old, new = product.outputs[0], scaled.outputs[0]
            new.name, new.shape, new.dtype = old.name, old.shape, old.dtype
            old.name = f"{old.name}.float"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(product, safe=True)
        graph.remove(whole, safe=True)
    _drop_unused(graph)
    return model


def _drop_unused(graph: ir.Graph) -> None:
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) float to int8 of the same shape, and the scale of each output column."""
    largest = np.abs(weight).max(axis=0).astype(np.float32)
    scale = np.maximum(largest, np.float32(1e-30)) / np.float32(WEIGHT_LEVELS)
    return np.rint(weight / scale).astype(np.int8), scale


def _quantize_tokens(
    graph: ir.Graph, before: ir.Node, x: ir.Value, constants: dict[str, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    """Unsigned 8-bit tokens and their scales, computed once for all products of ``x``."""
    name = before.name
    size = ir.node("Abs", [x], name=f"{name}/abs")
    largest = ir.node("ReduceMax", [size.outputs[0], constants["last"]], {"keepdims": 1}, name=f"{name}/max")
    step = ir.node("Mul", [largest.outputs[0], constants["step"]], name=f"{name}/step")
    scale = ir.node("Max", [step.outputs[0], constants["tiny"]], name=f"{name}/row_scale")
    levels = ir.node("Div", [x, scale.outputs[0]], name=f"{name}/levels")
    tokens = ir.node(
        "QuantizeLinear", [levels.outputs[0], constants["one"], constants["zero"]], name=f"{name}/tokens"
    )
    graph.insert_before(before, [size, largest, step, scale, levels, tokens])
    return tokens.outputs[0], scale.outputs[0]


def is_large(weight: ir.Value) -> bool:
    """Whether it is a float32 matrix that takes time, or much room."""
    tensor = weight.const_value
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == 2
        and min(int(n) for n in tensor.shape) >= SMALLEST
    )


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new weight of a graph."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value
