"""Convolutions in 8-bit integers, for the CPU.

Weights have one scale an output channel, and 7 bits for the reason that :mod:`hart_runtime.export.quantize`
gives. Maps have one scale and one zero, taken from what was seen while the checkpoint drew
(:mod:`hart_runtime.export.calibration`): they are constants, so pictures stay independent of their batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from hart_runtime.export.calibration import Range, Seen
from hart_runtime.export.quantize import constant, quantize_weight
from hart_runtime.export.rewrite import remove_unused, replace_node

LEVELS = 255
AFFINE = ("step", "zero")
"""Of unsigned 8-bit numbers: what one stands for, and the one that stands for 0."""
WIDER = 1.5
"""How much larger numbers of other pictures may be than those that were seen. What is larger still is cut
off, and shows sooner than a step that is as much coarser."""


def quantize_filters(model: ir.Model, seen: Mapping[str, Seen]) -> ir.Model:
    """Store weights of convolutions in 8 bits, in place, and return the model.

    ``conv(x, w)`` becomes ``conv(x, DequantizeLinear(q, c))`` with ``q`` int8 and ``c`` (outputs).

    Args:
        seen: by the name of its module, of every convolution that is to change.
    """
    graph = model.graph
    for node, name in _convolutions(graph, seen):
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        if f"{name}.int8" not in graph.initializers:  # strips of a map have one weight
            array = weight.const_value.numpy()
            values, scale = quantize_weight(array.reshape(len(array), -1).T)
            constant(graph, f"{name}.int8", np.ascontiguousarray(values.T).reshape(array.shape))
            constant(graph, f"{name}.int8.scale", scale)
        parts = [graph.initializers[f"{name}.{part}"] for part in ("int8", "int8.scale")]
        whole = ir.node("DequantizeLinear", parts, {"axis": 0}, name=f"{node.name}/weight")
        whole.outputs[0].shape, whole.outputs[0].dtype = weight.shape, ir.DataType.FLOAT
        graph.insert_before(node, whole)
        node.replace_input_with(1, whole.outputs[0])
    remove_unused(model)
    return model


def convolve_integers(model: ir.Model, seen: Mapping[str, Seen]) -> ir.Model:
    """Make convolutions with such weights whole numbers, in place, and return the model.

    ``conv(x, DequantizeLinear(q, c), b)`` becomes ``DequantizeLinear(QLinearConv(QuantizeLinear(x), q, b))``.
    """
    graph, parts = model.graph, dict[str, _Parts]()
    for node, name in _convolutions(graph, seen):
        x, _, *bias = node.inputs  # the exporter leaves one of zeros out
        assert x is not None
        if name not in parts:
            parts[name] = _parts_of(graph, name, bias, seen[name])
        taken, weights, scale_and_zero, whole = parts[name]
        inputs = [_quantized(graph, node, x, taken), *taken, *weights, *scale_and_zero, whole]
        integer = ir.node("QLinearConv", inputs, node.attributes, name=f"{node.name}/int8")
        made = integer.outputs[0]
        made.name, made.shape, made.dtype = f"{node.name}/int8", node.outputs[0].shape, ir.DataType.UINT8
        for reader in list(node.outputs[0].consumers()):
            if reader.op_type == "Shape":  # or ONNX Runtime makes floating point of the map once more for it
                reader.replace_input_with(0, made)
        floating = ir.node("DequantizeLinear", [made, *scale_and_zero], name=f"{node.name}/float")
        replace_node(model, node, integer, floating)
    remove_unused(model)
    return model


def affine(seen: Range) -> tuple[np.float32, np.uint8]:
    """The two, for what was seen and 0."""
    low, high = min(seen.low, 0.0) * WIDER, max(seen.high, 0.0) * WIDER
    scale = np.float32(max(high - low, 1e-30) / LEVELS)
    return scale, np.uint8(np.rint(-low / scale).clip(0, LEVELS))


class _Parts(NamedTuple):
    """What a convolution in whole numbers takes beside a map."""

    taken: list[ir.Value]
    """Scale and zero of the map."""
    weights: list[ir.Value]
    """Whole numbers, their scales and zeros."""
    made: list[ir.Value]
    """Scale and zero of the map that it makes."""
    bias: ir.Value


def _parts_of(graph: ir.Graph, name: str, bias: Sequence[ir.Value | None], seen: Seen) -> _Parts:
    q, scale = (graph.initializers[f"{name}.{part}"] for part in ("int8", "int8.scale"))
    assert scale.const_value is not None
    taken, made = affine(seen.taken), affine(seen.made)
    limits, steps = np.iinfo(np.int32), scale.const_value.numpy().astype(np.float64) * taken[0]
    sums = np.zeros(len(steps))
    for value in bias:
        assert value is not None
        assert value.const_value is not None
        sums = np.rint(value.const_value.numpy() / steps).clip(limits.min, limits.max)

    def stored(part: str, value: object) -> ir.Value:
        return constant(graph, f"{name}.{part}", np.asarray(value))

    return _Parts(
        [stored(f"taken.{part}", value) for part, value in zip(AFFINE, taken, strict=True)],
        [q, scale, stored("int8.zero", np.zeros(len(steps), np.int8))],
        [stored(f"made.{part}", value) for part, value in zip(AFFINE, made, strict=True)],
        stored("int8.bias", sums.astype(np.int32)),
    )


def _quantized(graph: ir.Graph, node: ir.Node, x: ir.Value, parts: list[ir.Value]) -> ir.Value:
    """What a convolution takes in 8 bits; of a map whose cells are repeated, before they are."""
    grown = x.producer()
    repeats = grown is not None and grown.op_type == "Resize"
    source = grown.inputs[0] if repeats else x
    levels = ir.node("QuantizeLinear", [source, *parts], name=f"{node.name}/levels")
    graph.insert_before(node, levels)
    if not repeats:
        return levels.outputs[0]
    again = ir.node(
        "Resize", [levels.outputs[0], *grown.inputs[1:]], grown.attributes, name=f"{grown.name}/int8"
    )
    graph.insert_before(node, again)
    return again.outputs[0]


def _convolutions(graph: ir.Graph, seen: Mapping[str, Seen]) -> Iterator[tuple[ir.Node, str]]:
    """Nodes of the convolutions in question, and the names of their modules."""
    for node in [node for node in graph if node.op_type == "Conv"]:
        weight = node.inputs[1]
        assert weight is not None
        source = weight.producer()
        stored = weight if source is None else source.inputs[0]
        name = (stored.name or "").rpartition(".")[0] if stored is not None else ""
        if name in seen:
            yield node, name
