"""Bundles broken on purpose: the comparison fails and names the culprit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import GraphProto, NodeProto, helper, numpy_helper

from hart_runtime.compare.cli import main
from hart_runtime.compare.reference import save_reference
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.find import WEIGHTS
from tests.conftest import ExportOnce
from tests.golden_runs import HERE
from tests.test_bundle import reseal
from tests.test_compare import record_golden

CHECKPOINT = HERE / "t2i_main"


def nodes(graph: GraphProto, path: str, op: str) -> list[NodeProto]:
    found = [n for n in graph.node if n.name.split("/")[0] == path and n.op_type == op]
    assert found, f"no {op} in {path}"
    return found


def initializer(graph: GraphProto, name: str) -> onnx.TensorProto:
    return next(t for t in graph.initializer if t.name == name)


def one_weight_changed_by_a_hundredth(graph: GraphProto, _: Path) -> None:
    """A single number, the largest gain of a norm."""
    tensor = initializer(graph, "transformer.blocks.1.ln_wo_grad.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[np.abs(values).argmax()] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def one_matrix_changed_by_a_hundredth(graph: GraphProto, folder: Path) -> None:
    """In the shared weight file."""
    tensor = initializer(graph, nodes(graph, "transformer.blocks.1.ffn.down_proj", "MatMul")[0].input[1])
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place["offset"]), int(place["length"])
    data = bytearray((folder / WEIGHTS).read_bytes())
    weights = np.frombuffer(data[start : start + length], np.float32) * np.float32(1.01)
    data[start : start + length] = weights.tobytes()
    (folder / WEIGHTS).write_bytes(data)
    reseal(folder, WEIGHTS)


def rope_halves_swapped(graph: GraphProto, _: Path) -> None:
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    rotations = [
        node
        for node in nodes(graph, "transformer.blocks.1.attn", "Concat")
        if made_by.get(node.input[0]) == "Neg"
    ]
    assert len(rotations) == 2  # queries and keys
    for node in rotations:
        node.input[0], node.input[1] = node.input[1], node.input[0]


def level_of_the_neighbouring_scale(graph: GraphProto, _: Path) -> None:
    (lookup,) = nodes(graph, "lvl_embed", "Gather")
    lookup.input[1] = "scale"  # instead of scale + 1


def softmax_scale_off_by_four(graph: GraphProto, _: Path) -> None:
    (attend,) = nodes(graph, "transformer.blocks.2.attn", "MultiHeadAttention")
    next(a for a in attend.attribute if a.name == "scale").f *= 4


def cache_one_slot_late(graph: GraphProto, _: Path) -> None:
    """Every key lands one slot behind its own, the first one twice."""
    append = next(n for n in graph.node if n.op_type == "Concat" and "past_key_1" in n.input)
    late_name, append.output[0] = append.output[0], "on_time"
    for name, value in {"zero": 0, "one": 1, "minus_one": -1}.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    path = "transformer.blocks.1.attn"
    late = [
        helper.make_node("Slice", ["on_time", "zero", "one", "zero"], ["first"], f"{path}/Slice_first"),
        helper.make_node("Slice", ["on_time", "zero", "minus_one", "zero"], ["rest"], f"{path}/Slice_rest"),
        helper.make_node("Concat", ["first", "rest"], [late_name], f"{path}/Concat_late", axis=0),
    ]
    position = list(graph.node).index(append) + 1
    for node in reversed(late):
        graph.node.insert(position, node)


def nan_in_one_layer(graph: GraphProto, _: Path) -> None:
    tensor = initializer(graph, "transformer.blocks.2.ln_wo_grad.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[5] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def wrong_phi_for_one_scale(graph: GraphProto, _: Path) -> None:
    tensor = initializer(graph, "quant_resi.phi_of_scale")
    chosen = numpy_helper.to_array(tensor).copy()
    assert chosen[2] == 2
    chosen[2] = 3
    tensor.CopyFrom(numpy_helper.from_array(chosen, tensor.name))


def guidance_on_the_variance(graph: GraphProto, _: Path) -> None:
    (join,) = nodes(graph, "guide", "Concat")
    plus, minus = (
        next(n for n in nodes(graph, "guide", "Mul") if name in n.input)
        for name in (nodes(graph, "guide", "Add")[0].output[0], "guidance")
    )
    halves = {name: node for node in graph.node if node.op_type == "Split" for name in node.output}
    weight = next(name for name in plus.input if name not in halves)
    conditional, unconditional = (
        halves[next(name for name in node.input if name in halves)].output[1] for node in (plus, minus)
    )
    assert join.input[1] == conditional
    guided = [
        helper.make_node("Mul", [weight, conditional], ["more"], "guide/Mul_more"),
        helper.make_node("Mul", ["guidance", unconditional], ["less"], "guide/Mul_less"),
        helper.make_node("Sub", ["more", "less"], ["both"], "guide/Sub_both"),
    ]
    position = list(graph.node).index(join)
    for node in reversed(guided):
        graph.node.insert(position, node)
    join.input[1] = "both"


@dataclass(frozen=True)
class Break:
    change: Callable[[GraphProto, Path], None]
    graph: str
    call: str
    module: str


BREAKS = [
    Break(one_weight_changed_by_a_hundredth, "transformer", "scale0", "transformer.blocks.1.ln_wo_grad"),
    Break(one_matrix_changed_by_a_hundredth, "transformer", "scale0", "transformer.blocks.1.ffn.down_proj"),
    Break(rope_halves_swapped, "transformer", "scale0", "transformer.blocks.1.attn"),
    Break(level_of_the_neighbouring_scale, "next_scale", "scale0", "transformer.lvl_embed"),
    Break(softmax_scale_off_by_four, "transformer", "scale0", "transformer.blocks.2.attn"),
    Break(cache_one_slot_late, "transformer", "scale0", "transformer.blocks.1.attn"),
    Break(nan_in_one_layer, "transformer", "scale0", "transformer.blocks.2.ln_wo_grad"),
    Break(wrong_phi_for_one_scale, "next_scale", "scale2", "tokenizer.quantize.quant_resi"),
    Break(guidance_on_the_variance, "residual_step", "step0", "guide"),
]


@pytest.fixture(scope="module")
def healthy(export_once: ExportOnce, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 bundle and what the reference did with its checkpoint."""
    bundle = export_once(CHECKPOINT, "fp32")
    reference = tmp_path_factory.mktemp("catches") / "reference"
    save_reference(record_golden(CHECKPOINT, bundle), open_bundle(bundle).manifest, reference)
    return bundle, reference


@pytest.mark.parametrize("case", BREAKS, ids=lambda case: case.change.__name__)
def test_the_culprit_is_named(case: Break, healthy: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, reference = healthy
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    file = broken / f"{case.graph}.onnx"
    model = onnx.load(file, load_external_data=False)
    case.change(model.graph, broken)
    file.write_bytes(model.SerializeToString())
    reseal(broken, file.name)
    given = ["--engine", broken, "--reference", reference, "--checkpoint", CHECKPOINT]
    done = CliRunner().invoke(main, [*map(str, given), "--device", "cpu", "--output", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    run = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["runs"][0]
    first = run["first_failure"]
    assert (first["graph"], first["call"], first["module"]) == (case.graph, case.call, case.module)
    assert f"the difference begins in {case.module}" in done.output
