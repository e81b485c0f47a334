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


def quantize_products(model: ir.Model) -> ir.Model:
    """Replace the products of tokens with constant weights, in place, and return the model.

    ``y = x @ w`` becomes ``s * (round(x / s) @ q) * c`` with ``s`` (..., 1) from each row's
    largest magnitude, ``q`` int8 and ``c`` (columns) from the weights. A row with NaN stays NaN.
    """
    graph = model.graph
    tokens: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    model.opset_imports.setdefault("com.microsoft", 1)
    constants = {
        name: _constant(graph, f"int8.{name}", np.asarray(value))
        for name, value in {
            "one": np.float32(1),
            "step": np.float32(1 / TOKEN_LEVELS),
            "tiny": np.float32(1e-30),
            "zero": np.uint8(TOKEN_ZERO),
            "last": np.array([-1], np.int64),
        }.items()
    }
    for product in [node for node in graph if node.op_type == "MatMul"]:
        x, weight = product.inputs
        if x is None or weight is None or not _is_large(weight):
            continue
        if x not in tokens:
            tokens[x] = _quantize_tokens(graph, product, x, constants)
        quantized, scale = tokens[x]
        values, columns = quantize_weight(weight.const_value.numpy())  # type: ignore[union-attr]
        name = product.name
        inputs = [
            quantized,
            _constant(graph, f"{weight.name}.int8", values),
            constants["one"],
            _constant(graph, f"{weight.name}.scale", columns),
            constants["zero"],
        ]
        whole = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=f"{name}/int8")
        scaled = ir.node("Mul", [whole.outputs[0], scale], name=f"{name}/scale")
        graph.insert_before(product, [whole, scaled])
        old, new = product.outputs[0], scaled.outputs[0]
        new.name, new.shape, new.dtype = old.name, old.shape, old.dtype
        old.name = f"{old.name}.float"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(product, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return model


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


def _is_large(weight: ir.Value) -> bool:
    tensor = weight.const_value
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == 2
        and min(int(n) for n in tensor.shape) >= SMALLEST
    )


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value
