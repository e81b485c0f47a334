"""What TensorRT's parsers make of a graph: which nodes each version refuses, what it reads on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from tests.strict.api import RTX

LARGEST_K = 3840
WHOLE = (TensorProto.INT32, TensorProto.INT64)
SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}
SINCE |= {"TensorScatter": (10, 15)}
NEVER = frozenset(
    [
        *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *(
            "BlackmanWindow",
            "CenterCropPad",
            "Col2Im",
            "Compress",
            "ConvInteger",
            "DFT",
            "Det",
            "Multinomial",
        ),
        *("DynamicQuantizeLinear", "HammingWindow", "HannWindow", "MatMulInteger", "QLinearConv", "Unique"),
        *("QLinearMatMul", "SequenceAt", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer"),
    ]
)
"""Operators without an importer in any version."""
ON_THE_HOST = {"TopK": (1,), "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Range": (0, 1, 2)}
ON_THE_HOST |= {"Tile": (1,), "Pad": (1, 3), "ConstantOfShape": (0,), "Resize": (2, 3), "Unsqueeze": (1,)}
ON_THE_HOST |= {"Squeeze": (1,), "Split": (1,), "CumSum": (1,), "ReduceSum": (1,), "ReduceMax": (1,)}
ON_THE_HOST |= {"ReduceMin": (1,), "ReduceMean": (1,), "Trilu": (1,), "OneHot": (1,)}
"""Inputs whose values decide shapes, by operator."""
ARITHMETIC = frozenset(
    [
        *("Add", "Sub", "Mul", "Div", "Min", "Max", "Floor", "Ceil", "Cast", "Concat", "Gather", "Identity"),
        *("Reshape", "Slice", "Squeeze", "Unsqueeze", "Where", "Equal", "Neg", "Abs", "Mod"),
    ]
)
"""What a value may go through on its way to deciding a shape."""


class Refusal(NamedTuple):
    """A node that a parser does not take."""

    node: int
    why: str


def number_of(version: str) -> tuple[int, int]:
    """(10, 13) for "10.13.3.9"; above all others for TensorRT-RTX."""
    if version == RTX:
        return 99, 0
    major, minor, *_ = (int(part) for part in version.split("."))
    return major, minor


def refusals(version: str, model: ModelProto, types: Mapping[str, int]) -> Iterator[Refusal]:
    """The nodes of a graph that a version cannot import."""
    for number, node in enumerate(model.graph.node):
        why = _refused(version, model, node, types)
        if why is not None:
            yield Refusal(number, why)


def _refused(  # noqa: PLR0911  (one line a rule)
    version: str, model: ModelProto, node: NodeProto, types: Mapping[str, int]
) -> str | None:
    release, operator = number_of(version), node.op_type
    given = [*node.input]
    if node.domain and (version != RTX or operator != "MultiHeadAttention"):
        return f"No importer registered for op: {operator}. Plugin not found"
    if operator in NEVER or release < SINCE.get(operator, (0, 0)):
        return f"No importer registered for op: {operator}"
    if operator in {"Attention", "MultiHeadAttention"}:
        if len([name for name in node.output if name]) > 1:
            return f"{operator} with more than one output is not supported"
        if operator == "Attention" and any(given[4:6]):
            return "Attention with past keys and values is not supported"
    if operator == "Pow" and release < (10, 12) and types.get(given[0]) in WHOLE:
        return "Pow does not support integer-typed base tensors"
    if operator == "CumSum" and version != RTX and types.get(given[0]) in WHOLE:
        return "CumSum supports floating-point inputs only"
    if operator == "Pad" and release < (10, 4) and len(given) > 3 and given[3]:
        return "Pad with axes is not supported"
    k = _constant(model, given[1]) if operator == "TopK" else None
    if k is not None and int(k.reshape(-1)[0]) > LARGEST_K:
        return f"TopK supports K of up to {LARGEST_K}, found {int(k.reshape(-1)[0])}"
    if any(types.get(name) in {TensorProto.UINT32, TensorProto.UINT64, TensorProto.STRING} for name in given):
        return f"{operator} with an unsupported type"
    return None


def _constant(model: ModelProto, name: str) -> np.ndarray | None:  # type: ignore[type-arg]
    for initializer in model.graph.initializer:
        if initializer.name == name and not initializer.external_data:
            return numpy_helper.to_array(initializer)
    return None


def shape_inputs(model: ModelProto) -> list[str]:
    """Inputs of a graph whose values decide shapes, directly or through arithmetic on the host."""
    made = {name: node for node in model.graph.node for name in node.output}
    todo = [
        node.input[place]
        for node in model.graph.node
        for place in ON_THE_HOST.get(node.op_type, ())
        if place < len(node.input)
    ]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in made and made[name].op_type in ARITHMETIC:
            todo += made[name].input
    return [value.name for value in model.graph.input if value.name in seen]


def unread(node: NodeProto) -> list[str]:
    """Inputs of a node that the importer ignores: attention would read a whole cache."""
    return [name for name in node.input[6:7] if name] if node.op_type == "Attention" else []


class Attention(NamedTuple):
    """A product, a softmax and a product."""

    nodes: tuple[int, ...]
    scores: tuple[str, ...]
    """Tensors that are not written out if it is fused."""
    fused: bool


def attentions(model: ModelProto, types: Mapping[str, int], fuse: bool) -> list[Attention]:
    """Attention in a graph, as one node or written out; the latter is fused in half only."""
    nodes = [*model.graph.node]
    maker = {name: number for number, node in enumerate(nodes) for name in node.output}
    readers: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, []).append(number)
    found = []
    for number, node in enumerate(nodes):
        if node.op_type in {"Attention", "MultiHeadAttention"}:
            found.append(Attention((number,), (), fuse))
        if node.op_type != "Softmax":
            continue
        before = _back(nodes, maker, node.input[0])
        after = _forth(nodes, readers, node.output[0])
        if before and after:
            group = (*before, number, *after)
            half = all(types.get(nodes[n].output[0]) == TensorProto.FLOAT16 for n in (before[0], after[-1]))
            scores = tuple(name for n in group[:-1] for name in nodes[n].output)
            found.append(Attention(group, scores, fuse and half))
    return found


def _back(nodes: list[NodeProto], maker: Mapping[str, int], name: str) -> list[int]:
    """From a product to what a softmax reads."""
    if name not in maker:
        return []
    number = maker[name]
    if nodes[number].op_type == "MatMul":
        return [number]
    if nodes[number].op_type not in {"Mul", "Div", "Add", "Sub", "Cast", "Where"}:
        return []
    for source in nodes[number].input:
        if found := _back(nodes, maker, source):
            return [*found, number]
    return []


def _forth(nodes: list[NodeProto], readers: Mapping[str, list[int]], name: str) -> list[int]:
    """From what a softmax gives to a product."""
    for number in readers.get(name, ()):
        if nodes[number].op_type == "MatMul":
            return [number]
        if nodes[number].op_type == "Cast" and (found := _forth(nodes, readers, nodes[number].output[0])):
            return [number, *found]
    return []
