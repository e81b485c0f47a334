"""Changes of ONNX files, where a graph has nodes, weights, tensors and versions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.torture.changes import Change, change_bytes


def change_onnx(data: bytes, rng: random.Random) -> Change:
    """A node, tensor, name or version of a graph."""
    import onnx

    model = onnx.load_model_from_string(data)
    edit = rng.choice((*EDITS, None, None))
    said = edit(model, rng) if edit else None
    if said is not None:
        return Change(model.SerializeToString(), said, ("words",) if said in WITHOUT_EFFECT else ())
    if rng.random() < 0.5:
        return change_bytes(data, rng)
    name = rng.choice([node.output[0] for node in model.graph.node]).encode()
    return Change(data.replace(name, b"\xff" * len(name)), "a name that is no text")


def _node(model: Any, rng: random.Random) -> str:
    nodes = model.graph.node
    number = rng.randrange(len(nodes))
    node = nodes[number]
    kind = rng.choice(
        ("type", "other type", "gone", "twice", "later", "domain", "input", "no input", "output")
    )
    if kind == "type":
        node.op_type = rng.choice(
            ("Loop", "If", "Scan", "Expand", "Tile", "Nothing", "MemcpyToHost", "Pad", "")
        )
    elif kind == "other type":
        node.op_type = rng.choice(nodes).op_type
    elif kind == "gone":
        del nodes[number]
    elif kind == "twice":
        nodes.add().CopyFrom(node)
    elif kind == "later":
        moved = type(node).FromString(node.SerializeToString())
        del nodes[number]
        nodes.append(moved)
    elif kind == "domain":
        node.domain = rng.choice(("com.microsoft", "ai.onnx", "x", "com.microsoft.nchwc", "\n"))
    elif kind == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = (
            rng.choice(rng.choice(nodes).output) if rng.random() < 0.8 else "x"
        )
    elif kind == "no input" and node.input:
        node.input[rng.randrange(len(node.input))] = ""
    else:
        node.output[rng.randrange(len(node.output))] = rng.choice(("x", "", rng.choice(nodes).output[0]))
    return f"node {number}: {kind}"


def _attribute(model: Any, rng: random.Random) -> str | None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return None
    node = rng.choice(nodes)
    attribute = rng.choice(node.attribute)
    kind = rng.choice(("number", "numbers", "name", "kind", "graph", "text", "unknown"))
    if kind == "number":
        attribute.i = rng.choice((0, -1, 1, 2, 7, 2**31, 2**63 - 1, -(2**63)))
    elif kind == "numbers":
        attribute.ints.append(rng.choice((0, -1, 1, 2**31, 2**62)))
    elif kind == "name":
        attribute.name += "x"
    elif kind == "kind":
        attribute.type = rng.randrange(15)
    elif kind == "graph":
        attribute.g.name, attribute.type = "inside", 5
    elif kind == "text":
        attribute.s, attribute.type = rng.choice((b"x", b"\xff", b"cubic", b"reflect")), 3
    else:
        node.attribute.add(name="surprise", i=1, type=2)
    return f"attribute {attribute.name} of {node.op_type}: {kind}"


def _weight(model: Any, rng: random.Random) -> str:
    weight = rng.choice(model.graph.initializer)
    kind = rng.choice(("shape", "type", "name", "numbers", "place", "gone", "huge", "beside", "length"))
    if kind == "shape":
        weight.dims[:] = rng.choice(([], [0], [-1], [2**40], [*weight.dims][::-1], [*weight.dims, 1]))
    elif kind == "type":
        weight.data_type = rng.randrange(25)
    elif kind == "name":
        weight.name = rng.choice(("", weight.name + "x", rng.choice(model.graph.initializer).name))
    elif kind == "numbers" and weight.raw_data:
        weight.raw_data = rng.choice((rng.randbytes, bytes))(len(weight.raw_data))
    elif kind in ("place", "length") and weight.external_data:
        entry = rng.choice(weight.external_data)
        entry.value = rng.choice(
            ("0", "-1", "4096", str(2**62), "../../etc/passwd", "x", "weights.bin", "1e3")
        )
    elif kind == "gone":
        model.graph.initializer.remove(weight)
    elif kind == "beside":
        weight.float_data.append(1.0)
    else:
        weight.dims[:], weight.data_location = [2**20, 2**20], 0
    return f"weight {weight.name}: {kind}"


def _interface(model: Any, rng: random.Random) -> str:
    values = rng.choice((model.graph.input, model.graph.output))
    value = rng.choice(values)
    kind = rng.choice(("shape", "type", "name", "gone", "twice", "sequence"))
    tensor = value.type.tensor_type
    if kind == "shape" and tensor.shape.dim:
        dimension = rng.choice(tensor.shape.dim)
        if rng.random() < 0.5:
            dimension.dim_value = rng.choice((0, -1, 1, 3, 2**40))
        else:
            dimension.dim_param = rng.choice(("?", "x", "batch", "past", "length", "9**9"))
    elif kind == "type":
        tensor.elem_type = rng.randrange(25)
    elif kind == "name":
        value.name += "x"
    elif kind == "twice":
        values.add().CopyFrom(value)
    elif kind == "sequence":
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        values.remove(value)
    return f"tensor {value.name}: {kind}"


def _whole(model: Any, rng: random.Random) -> str:
    kind = rng.choice(
        ("opset", "opset of another", "function", "words", "version", "props", "sparse", "notes")
    )
    if kind == "opset":
        model.opset_import[0].version = rng.choice((0, 1, 13, 19, 99, 2**31))
    elif kind == "opset of another":
        model.opset_import.add(
            domain=rng.choice(("x", "com.microsoft", "ai.onnx.ml")), version=rng.choice((1, 2))
        )
    elif kind == "function":
        model.functions.add(name="Mul", domain="")
    elif kind == "words":
        model.doc_string = "changed"
    elif kind == "version":
        model.ir_version = rng.choice((0, 1, 3, 9, 99))
    elif kind == "props":
        model.metadata_props.add(key="ep.threads", value="9" * 20)
    elif kind == "sparse":
        model.graph.sparse_initializer.add()
    else:
        model.graph.node[0].doc_string = "x\ny" * 1000
    return f"graph: {kind}"


def _giant(model: Any, rng: random.Random) -> str:
    """A constant that asks for a tensor of terabytes, before an output."""
    from onnx import helper

    output = rng.choice(model.graph.output).name
    for node in model.graph.node:
        node.output[:] = [f"{name}_small" if name == output else name for name in node.output]
        node.input[:] = [f"{name}_small" if name == output else name for name in node.input]
    sizes = rng.choice(([2**20, 2**20], [2**40], [2**31], [-1, 2**33]))
    model.graph.initializer.append(helper.make_tensor("giant", 7, [len(sizes)], sizes))
    kind = rng.choice(("Expand", "Tile", "ConstantOfShape", "Reshape"))
    inputs = ["giant"] if kind == "ConstantOfShape" else [f"{output}_small", "giant"]
    model.graph.node.append(helper.make_node(kind, inputs, [output]))
    return f"a giant {kind} before {output}"


EDITS: tuple[Callable[[Any, random.Random], str | None], ...] = (
    *(_node, _node, _node, _attribute, _weight, _weight, _interface, _whole, _giant),
)
WITHOUT_EFFECT = {"graph: words", "graph: notes", "graph: props"}
