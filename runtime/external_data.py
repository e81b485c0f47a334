"""Finds the files an ONNX graph refers to, without the onnx package.

A graph may name any path for its weights. Only the bundle's own weight file is accepted, and
that is decided before the graph reaches ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hart_runtime.common.errors import InputError

# Message -> {field number: message type of that field}, after onnx.proto.
NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
FIXED_WIDTH = {1: 8, 5: 4}


def external_files(model: bytes) -> set[str]:
    """Every external file that a serialized ONNX model names.

    Raises:
        InputError: the bytes are not a protobuf message.
    """
    try:
        return set(_locations(memoryview(model), "model"))
    except (IndexError, KeyError, UnicodeDecodeError, RecursionError):
        raise InputError("not an ONNX graph, or a truncated one") from None


def _locations(data: memoryview, kind: str) -> Iterator[str]:
    if kind == "entry":
        entry = {field: bytes(value) for field, value in _fields(data)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode()
        return
    nested = NESTED[kind]
    for field, value in _fields(data):
        if field in nested:
            yield from _locations(value, nested[field])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Length-delimited fields of one message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise IndexError
            yield field, data[position : position + length]
            position += length
        else:
            position += FIXED_WIDTH[wire]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def refuse_outside(path: Path, allowed: str) -> None:
    """Refuse a graph file that reads anything but ``allowed`` beside it.

    Raises:
        InputError: it does, or it is not a whole graph.
    """
    try:
        outside = external_files(path.read_bytes()) - {allowed}
    except InputError as error:
        raise InputError(f"{path}: {error}; export the bundle again") from None
    if outside:
        raise InputError(f"{path}: reads {sorted(outside)}, outside the bundle's {allowed}; refused")
