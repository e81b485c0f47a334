"""What a graph file declares: its nodes, weights, inputs and outputs, read without the onnx package.

Everything is taken from the bytes that were hashed, before another library sees the file. Whatever no
graph of ours has (a graph inside a node, functions, weights in other encodings) is refused here, so that
those who look at what was read need not think of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, shown
from hart_runtime.runtime.spec import TensorSpec

# Numbers of the types of tensors and of the fields of messages, after onnx.proto.
FLOAT8 = "float8_e4m3fn"
"""A type that numpy does not have."""
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 17: FLOAT8}
MODEL_OPSETS, MODEL_GRAPH = 8, 7
MODEL_REFUSED = {20: "training steps", 25: "functions"}
GRAPH_NODE, GRAPH_TENSOR, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
GRAPH_REFUSED = {14: "quantized values", 15: "sparse weights"}
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_INTS = 1, 3, 8
ATTRIBUTE_FIELDS = {1, 2, 3, 4, 7, 8, 9, 13, 20}
"""Names, numbers, text and lists of them: no tensors, and no graphs."""
LARGEST = 1 << 20
"""Whole number of an attribute."""
VARINT, BYTES = 0, 2
FIXED_WIDTH = {1: 8, 5: 4}
LONGEST_VARINT = 10

Field = tuple[int, int, int, int]
"""Number, kind of encoding, and the value; of bytes, where they begin and end."""


class Node(NamedTuple):
    """One operation."""

    operator: str
    """Its type; behind its domain where that is not ONNX's own."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Weight(NamedTuple):
    """A tensor that is part of the graph, in its file or beside it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None
    place: tuple[str, int, int] | None
    """File, offset and length of one beside the graph."""

    @property
    def size(self) -> int:
        """Bytes that its shape and type stand for."""
        return math.prod(self.shape) * (1 if self.dtype == FLOAT8 else np.dtype(self.dtype).itemsize)

    def values(self) -> NDArray[np.generic]:
        """Of one in the graph's file that is not in 8-bit floating point."""
        return np.frombuffer(self.data or b"", self.dtype)


class _External(NamedTuple):
    """Where a weight lies outside, as the file spells it."""

    location: str = ""
    offset: str = "0"
    length: str = "-1"


class GraphFile(NamedTuple):
    """Contents of a file."""

    opsets: dict[str, int]
    nodes: list[Node]
    weights: dict[str, Weight]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Known(NamedTuple):
    """Parts that were read before: the forms of a graph share most of them."""

    nodes: dict[bytes, Node]
    weights: dict[bytes, Weight]


def read_graph(data: bytes, known: Known | None = None) -> GraphFile:
    """Read a serialized ONNX model.

    Raises:
        InputError: it is none, or holds what no graph of a bundle does; without the name of the file.
    """
    try:
        return _model(data, known or Known({}, {}))
    except (IndexError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("expected an ONNX graph, found a damaged or truncated one") from None


def _model(data: bytes, known: Known) -> GraphFile:
    opsets: dict[str, int] = {}
    graphs: list[tuple[int, int]] = []
    for number, wire, one, other in _fields(data, 0, len(data)):
        if number in MODEL_REFUSED:
            raise InputError(f"expected one graph, found {MODEL_REFUSED[number]}")
        if number == MODEL_GRAPH:
            graphs.append(_bytes(wire, one, other))
        elif number == MODEL_OPSETS:
            entry = _once(data, *_bytes(wire, one, other))
            opsets[_text(data, entry.get(1))] = _number(entry.get(2))
    if len(graphs) != 1:
        raise InputError(f"expected one graph, found {len(graphs)}")
    return _graph(data, *graphs[0], opsets, known)


def _graph(data: bytes, start: int, end: int, opsets: dict[str, int], known: Known) -> GraphFile:
    found = GraphFile(opsets, [], {}, [], [])
    for number, wire, one, other in _fields(data, start, end):
        if number == GRAPH_NODE:
            raw = data[slice(*_bytes(wire, one, other))]
            node = known.nodes.get(raw)
            if node is None:
                node = known.nodes[raw] = _node(raw)
            found.nodes.append(node)
        elif number == GRAPH_TENSOR:
            raw = data[slice(*_bytes(wire, one, other))]
            weight = known.weights.get(raw)
            if weight is None:
                weight = known.weights[raw] = _weight(raw)
            if weight.name in found.weights:
                raise InputError(f"weight {shown(weight.name)}: expected one of that name, found two")
            found.weights[weight.name] = weight
        elif number in (GRAPH_INPUT, GRAPH_OUTPUT):
            listed = found.inputs if number == GRAPH_INPUT else found.outputs
            listed.append(_value(data, *_bytes(wire, one, other)))
        elif number in GRAPH_REFUSED:
            raise InputError(f"expected weights and nodes, found {GRAPH_REFUSED[number]}")
    return found


def _node(data: bytes) -> Node:
    names: tuple[list[str], list[str]] = ([], [])
    attributes: list[tuple[int, int]] = []
    texts = {3: "", 4: "", 7: ""}  # its name, which messages show, its operator and domain
    for number, wire, start, end in _fields(data, 0, len(data)):
        if wire != BYTES:
            raise IndexError
        if number <= 2:
            names[number - 1].append(data[start:end].decode())
        elif number in texts:
            if texts[number]:
                raise IndexError
            texts[number] = data[start:end].decode()
        elif number == 5:
            attributes.append((start, end))
    domain = "" if texts[7] in ("", "ai.onnx") else f"{texts[7]}:"
    operator = f"{domain}{texts[4]}"
    for start, end in attributes:
        _check_attribute(data[start:end], operator)
    return Node(operator, tuple(names[0]), tuple(names[1]))


@functools.lru_cache(1 << 10)  # few are written often
def _check_attribute(data: bytes, operator: str) -> None:
    """Refuse one that is a graph, a tensor or a number larger than any that is needed, such as of padding."""
    name, numbers = "", []
    for number, wire, one, other in _fields(data, 0, len(data)):
        if number == ATTRIBUTE_NAME:
            name = data[slice(*_bytes(wire, one, other))].decode()
        elif number == ATTRIBUTE_INT or (number == ATTRIBUTE_INTS and wire == VARINT):
            numbers.append(_number((wire, one, other)))
        elif number == ATTRIBUTE_INTS:
            numbers += _packed(data, *_bytes(wire, one, other))
        elif number not in ATTRIBUTE_FIELDS:
            raise InputError(
                f"operator {shown(operator)}: attribute {shown(name)}: expected numbers or text, found a "
                f"graph or a tensor"
            )
    if numbers and not -LARGEST <= min(numbers) <= max(numbers) <= LARGEST:
        raise InputError(
            f"operator {shown(operator)}: attribute {shown(name)}: expected at most {LARGEST}, found "
            f"{shown(numbers)}"
        )


def _weight(data: bytes) -> Weight:
    shape: list[int] = []
    entries: dict[str, str] = {}
    once: dict[int, tuple[int, int, int]] = {}
    for number, wire, one, other in _fields(data, 0, len(data)):
        if number == 1:
            shape += [_number((wire, one, other))] if wire == VARINT else _packed(data, one, other)
        elif number == 13:
            entry = _once(data, *_bytes(wire, one, other))
            key = _text(data, entry.get(1))
            if key in entries:
                raise IndexError
            entries[key] = _text(data, entry.get(2))
        elif number in once:
            raise IndexError
        elif number != 16:  # notes
            once[number] = (wire, one, other)
    name = _text(data, once.get(8))
    place, inline = _number(once.get(14, (VARINT, 0, 0))), once.get(9)
    kind = DTYPES.get(_number(once.get(2, (VARINT, 0, 0))))
    if kind is None or min(shape, default=0) < 0 or once.keys() - {2, 8, 9, 12, 14}:
        raise InputError(f"weight {shown(name)}: expected raw numbers, found another type or encoding")
    if place:
        told = _External(**{key: entries[key] for key in _External._fields if key in entries})
        where = told.location, int(told.offset), int(told.length)
        found = Weight(name, kind, tuple(shape), None, where)
        length = where[2]
    else:
        found = Weight(name, kind, tuple(shape), data[slice(*_bytes(*inline))] if inline else b"", None)
        length = len(found.data or b"")
    if found.size != length or (place != 0) != bool(entries) or (place and inline):
        raise InputError(
            f"weight {shown(name)}: expected {found.size} bytes for {kind} {shown(shape)}, found {length}"
        )
    return found


def _value(data: bytes, start: int, end: int) -> TensorSpec:
    entry = _once(data, start, end)
    name = _text(data, entry.get(1))
    kind = _once(data, *_bytes(*entry[2]))
    if set(kind) - {1, 6}:
        raise InputError(f"{shown(name)}: expected a tensor, found a sequence or another type")
    tensor = _once(data, *_bytes(*kind[1]))
    shape: list[int | str] = []
    for number, wire, one, other in _fields(data, *_bytes(*tensor[2])):
        if number == 1:
            dimension = _once(data, *_bytes(wire, one, other))
            size = dimension.get(1)
            shape.append(_text(data, dimension.get(2)) if size is None else _number(size))
    number = _number(tensor[1])
    return TensorSpec(name, DTYPES.get(number, f"type {number}"), tuple(shape))


def _once(data: bytes, start: int, end: int) -> dict[int, tuple[int, int, int]]:
    """The fields of a message whose first two may not come twice."""
    found: dict[int, tuple[int, int, int]] = {}
    for number, wire, one, other in _fields(data, start, end):
        if number in found and number <= 2:
            raise IndexError
        found[number] = (wire, one, other)
    return found


def _bytes(wire: int, start: int, end: int) -> tuple[int, int]:
    if wire != BYTES:
        raise IndexError
    return start, end


def _text(data: bytes, field: tuple[int, int, int] | None) -> str:
    return "" if field is None else data[slice(*_bytes(*field))].decode()


def _number(field: tuple[int, int, int] | None) -> int:
    """A whole number of 64 bits with its sign."""
    if field is None or field[0] != VARINT:
        raise IndexError
    return field[1] - (1 << 64) if field[1] >> 63 else field[1]


def _packed(data: bytes, start: int, end: int) -> list[int]:
    found = []
    while start < end:
        value, start = _varint(data, start)
        found.append(_number((VARINT, value, 0)))
    return found


def _fields(data: bytes, position: int, end: int) -> Iterator[Field]:
    """The fields of one message."""
    while position < end:
        tag = data[position]
        position += 1
        if tag > 0x7F:
            tag, position = _varint(data, position - 1)
        wire = tag & 7
        if wire == BYTES:
            length = data[position]
            position += 1
            if length > 0x7F:
                length, position = _varint(data, position - 1)
            start, position = position, position + length
            if position > end:
                raise IndexError
            yield tag >> 3, BYTES, start, position
        elif wire == VARINT:
            value = data[position]
            position += 1
            if value > 0x7F:
                value, position = _varint(data, position - 1)
            yield tag >> 3, VARINT, value, 0
        else:
            position += FIXED_WIDTH[wire]
            yield tag >> 3, wire, 0, 0
    if position != end:
        raise IndexError


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for count in range(LONGEST_VARINT):
        byte = data[position + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + count + 1
    raise IndexError
