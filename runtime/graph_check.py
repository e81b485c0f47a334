"""Compares a graph file with the contract before any library opens it.

Files come from strangers, and whoever changed one may have sealed it again. So a graph is made of the
operators that its contract lists, takes and returns what the loop feeds and reads, has its weights in the
bundle's own file, and no constant in it asks for a tensor larger than the model has any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from hart_runtime.common.errors import InputError, shown
from hart_runtime.runtime.contract import Contract
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.graph_file import FLOAT8, GraphFile, Known, Weight, read_graph
from hart_runtime.runtime.shapes import same_tensor
from hart_runtime.runtime.spec import GraphSpec, ModelSpec, TensorSpec

SIZES = {"Expand": (1,), "Pad": (1,), "Range": (0, 1, 2), "Resize": (3,), "TopK": (1,)}
"""Inputs that say how large a result is."""
FACTORS = {"Resize": (2,), "Tile": (1,)}
"""Inputs that say how many times larger it is than what it is made of."""
MOST_TIMES = 4
MOST_NUMBERS = 16
"""In a tensor that is a size."""
CHOOSERS = frozenset({"Cast", "Gather", "Identity", "Neg", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""Operators that only their first input's numbers come out of."""
ARITHMETIC = frozenset({"Add", "Concat", "Div", "Max", "Min", "Mul", "Sub"})
"""Operators that sizes are computed with."""


@dataclass(frozen=True)
class Bounds:
    """What graphs of a bundle stay within."""

    weights: int
    """Bytes of the weight file."""
    elements: int
    """More than any tensor of the model has."""
    tables: Mapping[str, int] = field(default_factory=dict)
    """Rows of the table that the numbers of an input are looked up in, by its name."""


def bounds_of(
    model: ModelSpec, max_batch: int, weights: int, tables: Mapping[str, int] | None = None
) -> Bounds:
    """Of a model that draws ``max_batch`` pictures at once."""
    sizes = model.sizes
    widest = max(sizes[name] for name in ("vocab", "dim", "context_dim", "width", "channels"))
    places = max(sizes["cells"], sizes["tokens"])
    elements = 2 * max_batch * max(places * widest, 3 * sizes["pixels"] ** 2)
    return Bounds(weights, elements, tables or {})


def check_graph(
    data: bytes, spec: GraphSpec, opset: int, contract: Contract, bounds: Bounds, known: Known
) -> None:
    """Check one form of a graph.

    Args:
        data: contents of the file.
        opset: of the form.
        known: parts of other graphs of the bundle that were read, which grows.

    Raises:
        InputError: where in the file something is wrong, what was expected and found; without its name.
    """
    graph = read_graph(data, known)
    allowed = {"": opset, "com.microsoft": 1}
    found = {("" if name == "ai.onnx" else name): version for name, version in graph.opsets.items()}
    if found.get("") != opset or any(allowed.get(name) != version for name, version in found.items()):
        raise InputError(f"opset: expected {opset}, found {shown(graph.opsets)}")
    for words, wanted, there in (
        ("inputs", spec.inputs, graph.inputs),
        ("outputs", spec.outputs, graph.outputs),
    ):
        for one, other in zip_longest(wanted, there):
            if one != other and (one is None or other is None or not same_tensor(one, other)):
                raise InputError(f"{words}: expected {_said(one)}, found {_said(other)}")
    if unknown := {node.operator for node in graph.nodes} - contract.operators:
        raise InputError(
            f"operators: expected those of the graph {contract.name}, found {shown(min(unknown))} beside them"
        )
    for weight in graph.weights.values():
        _check_place(weight, bounds)
    _check_sizes(graph, bounds)
    for tensor in graph.inputs:
        if tensor.name in bounds.tables:
            _check_table(graph, tensor.name, bounds.tables[tensor.name])


def _said(tensor: TensorSpec | None) -> str:
    return f"{shown(tensor.name)} {tensor.dtype} {shown(list(tensor.shape))}" if tensor else "no more"


def _check_place(weight: Weight, bounds: Bounds) -> None:
    if weight.place is None:
        return
    file, offset, length = weight.place
    if file != WEIGHTS:
        raise InputError(
            f"weight {shown(weight.name)}: reads {shown(file)}, outside the bundle's {WEIGHTS}; refused"
        )
    if not 0 <= offset <= offset + length <= bounds.weights:
        raise InputError(
            f"weight {shown(weight.name)}: expected a place within the {bounds.weights} bytes of {WEIGHTS}, "
            f"found {length} bytes from {offset} on"
        )


def _check_table(graph: GraphFile, name: str, rows: int) -> None:
    """Refuse a table of another size than what is fed was checked against: libraries do not all look."""
    for node in graph.nodes:
        if name not in node.inputs or node.operator == "Shape":
            continue
        table = graph.weights.get(node.inputs[0])
        if node.operator != "Gather" or table is None or table.shape[:1] != (rows,):
            found = f"{shown(node.operator)} of {shown(table.shape if table else node.inputs[0])}"
            raise InputError(f"input {name}: expected rows of a table of {rows}, found {found}")


def _check_sizes(graph: GraphFile, bounds: Bounds) -> None:
    """Refuse nodes that constants make larger than the model's tensors."""
    made = {"": 1.0} | {tensor.name: 1.0 for tensor in graph.inputs}
    for node in graph.nodes:
        read = [_asked(name, made, graph.weights) for name in node.inputs]
        for table, most in ((SIZES, bounds.elements), (FACTORS, MOST_TIMES)):
            for place in table.get(node.operator, ()):
                if place < len(read) and not read[place] <= most:
                    raise InputError(
                        f"operator {node.operator} that makes {shown(''.join(node.outputs[:1]))}: expected a "
                        f"size of at most {most} by its constants, found {read[place]:.7g}"
                    )
        made.update(dict.fromkeys(node.outputs, _combined(node.operator, read)))


def _asked(name: str, made: dict[str, float], weights: Mapping[str, Weight]) -> float:
    """How large the numbers of a tensor are, all multiplied, but for sizes of other tensors.

    Returns:
        Infinity or NaN where that cannot be told.
    """
    if name not in made:
        weight = weights.get(name)
        known = (
            weight is not None
            and weight.place is None
            and weight.dtype != FLOAT8  # which no size of ours has
            and math.prod(weight.shape) <= MOST_NUMBERS
        )
        values = weight.values().tolist() if weight is not None and known else [math.inf]
        made[name] = math.prod(max(abs(float(v)), abs(1 / v) if v else 1.0, 1.0) for v in values)
    return made[name]


def _combined(operator: str, read: list[float]) -> float:
    """The same of what a node makes of its inputs."""
    if operator == "Shape":
        return 1.0
    if operator in CHOOSERS:
        return read[0] if read else 1.0
    if operator == "Pow" and read[:1] == [1]:
        return math.prod(read)
    if operator not in ARITHMETIC:
        return math.inf
    return math.prod(read) * (2 if operator in ("Add", "Sub") else 1)
