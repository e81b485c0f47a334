"""Graphs that somebody changed and sealed again: refused by what they declare, before anything opens them."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart.demo import CLASS_DEMO, DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import WRITTEN_OUT, graph_file
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import (
    CONTEXT,
    DECODER,
    ENCODER,
    FAST,
    LATENT,
    MASKED_TRANSFORMER,
    NEXT_SCALE,
    SAMPLE,
    TEXT_ENCODER,
    TRANSFORMER,
)
from hart_runtime.runtime.families.operators import EVERYWHERE
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.graph_file import read_graph
from tests.conftest import ExportOnce
from tests.golden_runs import HERE
from tests.test_bundle import reseal
from tests.test_variants import VARIANTS, write_random_checkpoint

Model = onnx.ModelProto
Change = Callable[[Model], object]
BODY = helper.make_graph([helper.make_node("Identity", ["f_hat"], ["inner"])], "body", [], [])


def with_node(operator: str, *inputs: str, domain: str = "", **attributes: Any) -> Change:
    """A node more, beside the others."""

    def change(model: Model) -> None:
        node = helper.make_node(operator, inputs, ["added"], domain=domain, **attributes)
        model.graph.node.append(node)

    return change


def with_size(operator: str, *sizes: object, data: str = "f_hat") -> Change:
    """A node more whose further inputs are constants."""

    def change(model: Model) -> None:
        names = []
        for number, size in enumerate(sizes):
            names.append(f"size_{number}" if size is not None else "")
            if size is not None:
                array = np.asarray(size, np.float32 if isinstance(size, list) and 0.5 in size else np.int64)
                model.graph.initializer.append(numpy_helper.from_array(array, names[-1]))
        with_node(operator, data, *names)(model)

    return change


def multiplied(model: Model) -> None:
    """A size of a thousand, squared until it is large enough."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1000], np.int64), "n0"))
    for number in range(3):
        model.graph.node.append(helper.make_node("Mul", [f"n{number}"] * 2, [f"n{number + 1}"]))
    with_node("Expand", "f_hat", "n3")(model)


def doubled(model: Model) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "n0"))
    for number in range(40):
        model.graph.node.append(helper.make_node("Add", [f"n{number}"] * 2, [f"n{number + 1}"]))
    with_node("Expand", "f_hat", "n40")(model)


def divided(model: Model) -> None:
    """One over almost nothing."""
    for name, value in (("one", 1.0), ("little", 1e-12)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), name))
    model.graph.node.append(helper.make_node("Div", ["one", "little"], ["much"]))
    model.graph.node.append(helper.make_node("Cast", ["much"], ["size"], to=TensorProto.INT64))
    with_node("Expand", "f_hat", "size")(model)


def out_of_the_weights(model: Model) -> None:
    """A size that stands in the weight file."""
    weight = TensorProto(
        name="size", data_type=TensorProto.INT64, dims=[1], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", WEIGHTS), ("offset", "0"), ("length", "8")):
        weight.external_data.add(key=key, value=value)
    model.graph.initializer.append(weight)
    with_node("Expand", "f_hat", "size")(model)


def external(**places: str) -> Change:
    """Some weight in another place."""

    def change(model: Model) -> None:
        weight = next(t for t in model.graph.initializer if t.data_location == 1)
        for entry in weight.external_data:
            entry.value = places.get(entry.key, entry.value)

    return change


def with_rows(count: int) -> Change:
    """An embedding that ends early."""

    def change(model: Model) -> None:
        weight = next(t for t in model.graph.initializer if t.name.endswith("embed_tokens.weight"))
        size = TensorProto.DataType.Name(weight.data_type)
        weight.dims[0] = count
        for entry in weight.external_data:
            if entry.key == "length":
                entry.value = str(count * weight.dims[1] * {"FLOAT16": 2, "FLOAT": 4}[size])

    return change


def moved_ids(model: Model) -> None:
    """Token ids with something added before they are looked up."""
    node = next(node for node in model.graph.node if "input_ids" in node.input)
    model.graph.node.insert(0, helper.make_node("Add", ["input_ids", "input_ids"], ["moved"]))
    node.input[1] = "moved"


def table_that_is_computed(model: Model) -> None:
    node = next(node for node in model.graph.node if "input_ids" in node.input)
    model.graph.node.insert(0, helper.make_node("Transpose", [node.input[0]], ["table"]))
    node.input[0] = "table"


def with_sparse_weight(model: Model) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [9]))


def with_function(model: Model) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    opset = helper.make_opsetid("", 20)
    model.functions.append(helper.make_function("mine", "Mine", ["x"], ["y"], [node], [opset]))


def with_typed_numbers(model: Model) -> None:
    model.graph.initializer.append(helper.make_tensor("typed", TensorProto.INT64, [1], [1 << 40]))


def with_two_of_a_name(model: Model) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def shortened(model: Model) -> None:
    weight = next(t for t in model.graph.initializer if t.raw_data)
    weight.raw_data = weight.raw_data[:-1]


def retyped(model: Model) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def reshaped(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


def named_for_ever(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "9**9**9**9"


def in_a_sequence(model: Model) -> None:
    model.graph.output[0].type.sequence_type.elem_type.tensor_type.elem_type = 1


def newer(model: Model) -> None:
    model.opset_import[0].version = 99


def of_another_domain(model: Model) -> None:
    model.opset_import.append(helper.make_opsetid("evil.example", 1))


Case = tuple[str, Change, str]
CASES: dict[str, Case] = {
    "a loop": (
        LATENT,
        with_node("Loop", "", "", body=BODY),
        "operator 'Loop': attribute 'body': expected numbers",
    ),
    "a branch": (
        LATENT,
        with_node("If", "c", then_branch=BODY, else_branch=BODY),
        "'If': attribute 'else_branch'",
    ),
    "a scan": (LATENT, with_node("Scan", "x", body=BODY, num_scan_inputs=1), "operator 'Scan'"),
    "a loop without a body": (
        LATENT,
        with_node("Loop", "", ""),
        "operators: expected those of the graph latent, found 'Loop'",
    ),
    "an operator of nobody": (
        LATENT,
        with_node("Mine", "f_hat", domain="mine"),
        "found 'mine:Mine' beside them",
    ),
    "one of another graph": (LATENT, with_node("Resize", "f_hat"), "found 'Resize' beside them"),
    "one that asks for a size": (LATENT, with_node("ConstantOfShape", "n"), "found 'ConstantOfShape'"),
    "a constant inside a node": (
        LATENT,
        with_node("Constant", value=numpy_helper.from_array(np.zeros(1))),
        "attribute 'value': expected numbers or text",
    ),
    "much padding": (
        LATENT,
        with_node("Transpose", "f_hat", pads=[0, 1 << 40]),
        "attribute 'pads': expected at most",
    ),
    "a giant Expand": (
        LATENT,
        with_size("Expand", [1 << 20, 1 << 20]),
        "operator Expand that makes 'added': expected a size",
    ),
    "a negative one": (LATENT, with_size("Expand", [-(1 << 40)]), "found 1.099512e+12"),
    "a giant Tile": (
        NEXT_SCALE,
        with_size("Tile", [1, 1, 100, 100]),
        "operator Tile that makes 'added': expected a size of at most 4",
    ),
    "a giant Range": (SAMPLE, with_size("Range", 1 << 40, 1, data="top_k"), "found 1.099512e+12"),
    "a giant Pad": (NEXT_SCALE, with_size("Pad", [0, 0, 0, 0, 0, 0, 0, 1 << 40]), "operator Pad"),
    "a size that is computed": (LATENT, multiplied, "found 1e+24"),
    "a size that is added up": (LATENT, doubled, "found inf"),
    "a size that is divided": (LATENT, divided, "operator Expand"),
    "a size out of the weights": (LATENT, out_of_the_weights, "found inf"),
    "weights of somebody else": (
        TRANSFORMER,
        external(location="../../secret.bin"),
        "'../../secret.bin', outside the bundle's weights.bin; refused",
    ),
    "weights by an absolute path": (
        TRANSFORMER,
        external(location="/etc/passwd"),
        "'/etc/passwd', outside the bundle's",
    ),
    "weights behind the end": (TRANSFORMER, external(offset=str(1 << 60)), "expected a place within the"),
    "weights before the beginning": (TRANSFORMER, external(offset="-4096"), "bytes from -4096 on"),
    "weights of another length": (TRANSFORMER, external(length="12"), "found 12"),
    "a place that is no number": (
        TRANSFORMER,
        external(offset="far"),
        "expected an ONNX graph, found a damaged",
    ),
    "sparse weights": (LATENT, with_sparse_weight, "found sparse weights"),
    "functions": (LATENT, with_function, "found functions"),
    "numbers in another encoding": (LATENT, with_typed_numbers, "weight 'typed': expected raw numbers"),
    "two weights of a name": (LATENT, with_two_of_a_name, "expected one of that name, found two"),
    "a weight too short": (LATENT, shortened, "expected 4 bytes for float32 [], found 3"),
    "an input of another type": (
        LATENT,
        retyped,
        "inputs: expected 'f_hat' float32 ['batch', 32, 8, 8], found 'f_hat' float16",
    ),
    "an input of another shape": (LATENT, reshaped, "found 'f_hat' float32 ['batch', 7, 8, 8]"),
    "a dimension that takes a day": (LATENT, named_for_ever, "found 'f_hat' float32 ['9**9**9**9'"),
    "an output that is no tensor": (LATENT, in_a_sequence, "'f_hat_out': expected a tensor"),
    "a shorter embedding": (TEXT_ENCODER, with_rows(338), "table of 339, found 'Gather' of (338, 128)"),
    "a much shorter one": (TEXT_ENCODER, with_rows(1), "table of 339, found 'Gather' of (1, 128)"),
    "token ids that are moved": (TEXT_ENCODER, moved_ids, "input input_ids: expected rows of a table of 339"),
    "a computed embedding": (TEXT_ENCODER, table_that_is_computed, "found 'Gather' of 'table'"),
    "a newer opset": (LATENT, newer, "opset: expected 20, found {'': 99}"),
    "an opset of nobody": (LATENT, of_another_domain, "opset: expected 20, found"),
}


@pytest.fixture(scope="module")
def copy(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("copy") / "bundle"))


def refused(folder: Path, file: str, data: bytes) -> str:
    """What is said of a bundle with another graph, sealed; it is as it was afterwards."""
    path = folder / file
    before = path.read_bytes()
    path.write_bytes(data)
    reseal(folder, file)
    try:
        with pytest.raises(InputError) as caught:
            open_bundle(folder)
    finally:
        path.write_bytes(before)
        reseal(folder, file)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; export the bundle again")
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", CASES)
def test_what_no_graph_of_ours_declares(copy: Path, name: str) -> None:
    graph, change, words = CASES[name]
    model = onnx.load(copy / graph_file(graph), load_external_data=False)
    change(model)
    began = time.perf_counter()
    assert words in refused(copy, graph_file(graph), model.SerializeToString())
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("rows", [338, 340, 1 << 20])
def test_a_manifest_of_another_vocabulary(copy: Path, rows: int) -> None:
    """Token ids are checked against its number, and some libraries read whatever lies behind a table."""
    file = copy / MANIFEST
    before = file.read_text()
    values = json.loads(before)
    values["checkpoint"]["text_encoder"]["vocab_size"] = rows
    file.write_text(json.dumps(values))
    try:
        with pytest.raises(InputError, match=rf"text_encoder.onnx: input input_ids: .* table of {rows}, "):
            open_bundle(copy)
    finally:
        file.write_text(before)


def test_every_form_is_checked(copy: Path) -> None:
    file = graph_file(TRANSFORMER, WRITTEN_OUT)
    model = onnx.load(copy / file, load_external_data=False)
    with_node("Loop", "", "")(model)
    assert "'Loop'" in refused(copy, file, model.SerializeToString())
    file = graph_file(TEXT_ENCODER, WRITTEN_OUT)
    model = onnx.load(copy / file, load_external_data=False)
    with_rows(10)(model)
    assert "expected rows of a table of 339" in refused(copy, file, model.SerializeToString())


@pytest.mark.parametrize("name", [b"f_hat", b"h", b"val_3", b"permute"])
def test_names_that_are_no_text(copy: Path, name: bytes) -> None:
    file = graph_file(LATENT)
    data = (copy / file).read_bytes()
    assert name in data
    changed = data.replace(bytes([len(name)]) + name, bytes([len(name)]) + b"\xff" * len(name))
    assert "found a damaged or truncated one" in refused(copy, file, changed)


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"\xff" * 64, b"\x3a" + b"\xff" * 9 + b"\x01"])
def test_what_is_no_graph(copy: Path, data: bytes) -> None:
    refused(copy, graph_file(LATENT), data)


def test_two_graphs_that_a_parser_would_merge(copy: Path) -> None:
    more = onnx.ModelProto()
    more.graph.node.append(helper.make_node("Loop", [], []))
    data = (copy / graph_file(LATENT)).read_bytes() + more.SerializeToString()
    assert [node.op_type for node in onnx.load_from_string(data).graph.node][-1] == "Loop"
    assert "expected one graph, found 2" in refused(copy, graph_file(LATENT), data)


def test_the_reader_agrees_with_onnx(demo_bundle: Path) -> None:
    for file in demo_bundle.glob("*.onnx"):
        theirs, ours = onnx.load(file, load_external_data=False), read_graph(file.read_bytes())
        domains = [f"{n.domain}:" if n.domain else "" for n in theirs.graph.node]
        nodes = zip(domains, theirs.graph.node, strict=True)
        listed = [(domain + n.op_type, tuple(n.input), tuple(n.output)) for domain, n in nodes]
        assert [tuple(node) for node in ours.nodes] == listed
        assert [*ours.weights] == [tensor.name for tensor in theirs.graph.initializer]
        for tensor in theirs.graph.initializer:
            weight = ours.weights[tensor.name]
            assert weight.shape == tuple(tensor.dims)
            if tensor.data_location != TensorProto.EXTERNAL:
                array = numpy_helper.to_array(tensor)
                assert np.array_equal(weight.values().reshape(weight.shape), array, equal_nan=True)


EXPORTED = [
    (HERE / "t2i_main", "fp32"),
    (HERE / "t2i_adaln", "fp32"),
    (DEMO_CHECKPOINT, "fp16"),
    (DEMO_CHECKPOINT, "int8"),
    (DEMO_CHECKPOINT, "fp8"),
    (HERE / "var_plain", "fp32"),
    (HERE / "var_plain", "int8"),
    (HERE / "var_plain", "fp8"),
    (CLASS_DEMO, "fp32"),
    (CLASS_DEMO, "int8"),
]


@pytest.mark.parametrize(("checkpoint", "precision"), EXPORTED)
def test_what_is_exported_passes(export_once: ExportOnce, checkpoint: Path, precision: str) -> None:
    """Every form of every graph, with a pooled condition and without."""
    assert open_bundle(export_once(checkpoint, precision)).manifest.precision == precision


_DECODER = {"Pow", "Reciprocal", "ReduceMean", "ReduceSum"}  # of norms over strips
_PRODUCTS = {"Abs", "DequantizeLinear", "Max", "QuantizeLinear", "ReduceMax"}
_PRODUCTS |= {"com.microsoft:MatMulIntegerToFloat"}  # in 8 bits, of larger matrices
_ENCODER = {"Pad", "Reciprocal", "ReduceMean"}  # of borders and norms of strips
IN_OTHERS: dict[str, dict[str, set[str]]] = {
    "hart": {
        CONTEXT: {"LessOrEqual", "Range"},  # of running sums too long for a stored triangle
        TEXT_ENCODER: {"Cos", "Sin"},  # of more tokens than the exporter computes ahead
        TRANSFORMER: {"Clip", "Gelu", "ReduceL2"},  # attention on unit vectors, GPT-2's MLP
        FAST: {"Clip", "Gelu", "ReduceL2"},
        DECODER: _DECODER,
        ENCODER: _ENCODER,
    },
    "var": {DECODER: _DECODER, ENCODER: _ENCODER},
    "class-hart": {DECODER: _DECODER, ENCODER: _ENCODER},
    "mar": {MASKED_TRANSFORMER: _PRODUCTS, DECODER: _DECODER},
}
"""What graphs of larger models and of variants have, and none of those above."""


def test_nothing_is_allowed_that_is_not_exported(
    export_once: ExportOnce, mar_in: Callable[[str], Path]
) -> None:
    exported: dict[tuple[str, str], set[str]] = defaultdict(set)
    folders = [export_once(checkpoint, precision) for checkpoint, precision in EXPORTED]
    for folder in (*folders, *map(mar_in, ("fp32", "fp16", "int8"))):
        manifest = open_bundle(folder).manifest
        for name, graph in manifest.graphs.items():
            for file in (graph.file, *graph.forms.values()):
                operators = {node.operator for node in read_graph((folder / file).read_bytes()).nodes}
                exported[manifest.family, name] |= operators
    assert {*exported} == {(family.name, graph) for family in FAMILIES.values() for graph in family.graphs}
    # An exporter may leave an Identity, and it does no harm.
    assert EVERYWHERE - set().union(*exported.values()) <= {"Identity"}
    for (family, name), found in exported.items():
        allowed = FAMILIES[family].graphs[name].operators
        assert allowed - EVERYWHERE - found == IN_OTHERS[family].get(name, set()), (family, name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_exported_of_variants_passes(tmp_path: Path, variant: str, precision: str) -> None:
    write_random_checkpoint(tmp_path / "model", *VARIANTS[variant])
    export_bundle(Request(find_checkpoint(tmp_path / "model"), precision), tmp_path / "bundle")
    assert open_bundle(tmp_path / "bundle").manifest.precision == precision
