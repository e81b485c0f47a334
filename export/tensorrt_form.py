"""Forms of a graph for TensorRT, in operators that the parsers of its versions have.

The graphs' own form has ONNX Runtime's attention, which TensorRT has no importer for. From 10.15 on
TensorRT reads the standard operators for attention and norms; before, both are written out, in an opset
that all of its versions know.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from hart_runtime.export.rewrite import replace_node
from hart_runtime.runtime.contract import OLDEST_OPSET, STANDARD, WRITTEN_OUT

FIXED_ROW = 1024
"""Longest row whose sums are taken with a matrix stored in the graph."""


def write_out(model: ir.Model) -> ir.Model:
    """A copy for TensorRT from 10.3 on: no operator that it does not import, nor one it makes a loop of."""
    copy = model.clone()
    writer = _Writer(copy)
    for operator, written in (
        ("MultiHeadAttention", writer.attention),
        ("RMSNormalization", writer.norm),
        ("CumSum", writer.running_sum),
    ):
        for node in [node for node in copy.graph if node.op_type == operator]:
            replace_node(copy, node, *written(node))
    copy.opset_imports.pop("com.microsoft", None)
    copy.opset_imports[""] = min(copy.opset_imports[""], OLDEST_OPSET)
    return copy


def with_standard_attention(model: ir.Model) -> ir.Model:
    """A copy for TensorRT from 10.15 on: ONNX's own attention operator in the place of ONNX Runtime's."""
    copy = model.clone()
    for node in [node for node in copy.graph if node.op_type == "MultiHeadAttention"]:
        attributes = _attention_of(node)._asdict()
        heads = attributes.pop("num_heads")
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
        replace_node(copy, node, ir.node("Attention", node.inputs, attributes, name=node.name))
    copy.opset_imports.pop("com.microsoft", None)
    return copy


FORMS: dict[str, Callable[[ir.Model], ir.Model]] = {
    WRITTEN_OUT: write_out,
    STANDARD: with_standard_attention,
}
"""What makes each form of :meth:`hart_runtime.runtime.contract.Contract.forms`."""


class _Attention(NamedTuple):
    """What ONNX Runtime's operator is given."""

    num_heads: int
    scale: float


def _attention_of(node: ir.Node) -> _Attention:
    return _Attention(**{name: attribute.value for name, attribute in node.attributes.items()})


class _Writer:
    """Writes operators out as several; constants are shared."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.constants: dict[str, ir.Value] = {}

    def attention(self, node: ir.Node) -> list[ir.Node]:
        """softmax(q k^T * scale) v, the scale on the queries: in half the plain product may overflow."""
        q, k, v = node.inputs
        assert q is not None
        heads, scale = _attention_of(node)
        kind = q.dtype or node.outputs[0].dtype
        assert kind is not None
        split = self.constant(f"heads_{heads}", np.array([0, 0, heads, -1], np.int64))
        factor = self.constant(f"scale_{scale:.9g}_{kind.name}", np.array(scale, kind.numpy()))
        steps = _Steps(node)
        parted = [steps("Reshape", [part, split]) for part in (steps("Mul", [q, factor]), k, v)]
        q, v = (steps("Transpose", [part], perm=[0, 2, 1, 3]) for part in (parted[0], parted[2]))
        k = steps("Transpose", [parted[1]], perm=[0, 2, 3, 1])
        weights = steps("Softmax", [steps("MatMul", [q, k])], axis=-1)
        mixed = steps("Transpose", [steps("MatMul", [weights, v])], perm=[0, 2, 1, 3])
        steps("Reshape", [mixed, self.constant("joined", np.array([0, 0, -1], np.int64))])
        return steps.nodes

    def norm(self, node: ir.Node) -> list[ir.Node]:
        """The last axis over the root of its mean square, times a weight; float32 in every precision."""
        x, weight = node.inputs
        assert node.attributes["axis"].as_int() == -1
        epsilon = self.constant(
            f"epsilon_{node.attributes['epsilon'].as_float():.9g}",
            np.array(node.attributes["epsilon"].as_float(), np.float32),
        )
        steps = _Steps(node)
        mean = steps("ReduceMean", [steps("Mul", [x, x]), self.constant("last", _LAST)], keepdims=1)
        size = steps("Sqrt", [steps("Add", [mean, epsilon])])
        steps("Mul", [steps("Div", [x, size]), weight])
        return steps.nodes

    def running_sum(self, node: ir.Node) -> list[ir.Node]:
        """A cumulative sum over the last axis as a product with a triangle of ones."""
        x = node.inputs[0]
        assert x is not None
        assert x.shape is not None
        length, steps = x.shape[-1], _Steps(node)
        if isinstance(length, int) and length <= FIXED_ROW:
            triangle = self.constant(f"triangle_{length}", np.triu(np.ones((length, length), np.float32)))
        else:
            triangle = self.triangle(steps, x)
        steps("MatMul", [x, triangle])
        return steps.nodes

    def triangle(self, steps: _Steps, x: ir.Value) -> ir.Value:
        """(n, n), ones on and above the diagonal, for rows of a length n that is known at run time only."""
        rank = len(x.shape or ())
        size = steps("Shape", [x], start=rank - 1, end=rank)
        length = steps("Squeeze", [size, self.constant("first", np.array([0], np.int64))])
        zero, one = (self.constant(name, np.array(n, np.int64)) for name, n in (("zero", 0), ("one", 1)))
        places = steps("Range", [zero, length, one])
        rows = steps("Unsqueeze", [places, self.constant("second", np.array([1], np.int64))])
        return steps("Cast", [steps("LessOrEqual", [rows, places])], to=ir.DataType.FLOAT)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer, one of each name."""
        if name not in self.constants:
            value = ir.val(f"written.{name}", const_value=ir.tensor(array, name=f"written.{name}"))
            self.graph.register_initializer(value)
            self.constants[name] = value
        return self.constants[name]


_LAST = np.array([-1], np.int64)


class _Steps:
    """Nodes one after another, named after the one they stand for."""

    def __init__(self, node: ir.Node) -> None:
        self.name = node.name
        self.nodes: list[ir.Node] = []
        self.numbers = itertools.count()

    def __call__(
        self, operator: str, inputs: list[ir.Value | None], **attributes: int | list[int]
    ) -> ir.Value:
        name = f"{self.name}/{operator}_{next(self.numbers)}"
        node = ir.node(operator, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]
