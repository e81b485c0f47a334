"""The image decoder of int8 bundles: convolutions in whole numbers, and ranges of what they see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.export import calibration, strips
from hart_runtime.export.calibration import Range, Seen, calibrate, convolutions
from hart_runtime.export.convolutions import affine, convolve_integers, quantize_filters
from hart_runtime.export.graphs import build_graphs
from hart_runtime.export.writer import WeightFile, write_graph
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.model import Hart
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import DEQUANTIZED, graph_file
from hart_runtime.runtime.families.names import DECODER
from tests.conftest import ExportOnce

Array = NDArray[np.float32]
PADS = [1, 1, 1, 1]


def convolution_of(weight: Array, bias: Array | None, seen: Seen) -> ir.Model:
    """A convolution as an int8 bundle has it, and the shape of the map it makes behind it."""
    outputs, inputs = weight.shape[:2]
    x = ir.Value(name="x", shape=ir.Shape(["b", inputs, 6, 6]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        ir.Value(name=f"part.conv.{name}", const_value=ir.tensor(value, name=name))
        for name, value in (("weight", weight), ("bias", bias))
        if value is not None
    ]
    node = ir.node("Conv", [x, *constants], {"pads": PADS}, name="conv")
    y = node.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["b", outputs, 6, 6]), ir.DataType.FLOAT
    size = ir.node("Shape", [y], name="size")
    n = size.outputs[0]
    n.name, n.shape, n.dtype = "n", ir.Shape([4]), ir.DataType.INT64
    graph = ir.Graph(
        [x], [y, n], nodes=[node, size], initializers=constants, opset_imports={"": 20}, name="g"
    )
    return convolve_integers(
        quantize_filters(ir.Model(graph, ir_version=10), {"part.conv": seen}), {"part.conv": seen}
    )


def by_hand(x: Array, weight: Array, bias: Array, seen: Seen) -> Array:
    """The same in whole numbers that cannot overflow."""
    (step, zero), (made_step, made_zero) = affine(seen.taken), affine(seen.made)
    columns = np.abs(weight).max((1, 2, 3)) / np.float32(63)
    q = np.rint(weight / columns[:, None, None, None]).astype(np.int64)
    levels = (np.rint(x / step) + zero).clip(0, 255).astype(np.int64) - int(zero)
    padded = np.pad(levels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    total = np.zeros((len(x), len(weight), height, width), np.int64)
    for i in range(3):
        for j in range(3):
            total += np.einsum("bchw,oc->bohw", padded[:, :, i : i + height, j : j + width], q[:, :, i, j])
    total += np.rint(bias / (step * columns)).astype(np.int64)[:, None, None]
    made = np.rint(total * (step * columns / made_step)[:, None, None]) + made_zero
    return ((made.clip(0, 255) - made_zero) * made_step).astype(np.float32)


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "everything at its largest"])
def test_a_convolution_is_that_of_whole_numbers(extreme: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = (
        rng.standard_normal((2, 32, 6, 6), np.float32),
        rng.standard_normal((48, 32, 3, 3), np.float32),
    )
    bias = rng.standard_normal(48, np.float32)
    if extreme:  # 255 * 127 + 255 * 127 would not fit into the 16 bits of older processors
        x, weight = np.full_like(x, 4), np.ones_like(weight)
    exact = torch.nn.functional.conv2d(
        torch.tensor(x), torch.tensor(weight), torch.tensor(bias), padding=1
    ).numpy()
    seen = Seen(Range(-0.28, 4), Range(float(exact.min()), float(exact.max())))
    x = x.clip(-0.28, None)
    model = convolution_of(weight, bias, seen)
    found, size = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})
    expected, (step, _) = by_hand(x, weight, bias, seen), affine(seen.made)
    off = np.abs(found - expected) / step
    assert off.max() < 1.01, "a level, where a half is rounded to the other side"
    assert (off > 0.5).mean() < 0.01
    assert [*size] == [*found.shape]
    kinds = {node.name: node for node in model.graph}
    assert kinds["size"].inputs[0] is kinds["conv/int8"].outputs[0], "not of numbers made for it alone"


def test_a_picture_does_not_change_its_neighbour() -> None:
    rng = np.random.default_rng(1)
    x, weight = (
        rng.standard_normal((3, 32, 6, 6), np.float32),
        rng.standard_normal((32, 32, 3, 3), np.float32),
    )
    seen = Seen(Range(-2, 2), Range(-40, 40))
    session = ort.InferenceSession(ir.to_proto(convolution_of(weight, None, seen)).SerializeToString())
    together = session.run(["y"], {"x": x})[0]
    x[1] *= 100
    assert np.array_equal(session.run(["y"], {"x": x})[0][[0, 2]], together[[0, 2]])
    assert np.array_equal(session.run(["y"], {"x": x[2:]})[0][0], together[2])


@pytest.fixture(scope="module")
def demo_model() -> Hart:
    return load_hart(find_checkpoint(DEMO_CHECKPOINT))


@pytest.fixture(scope="module")
def seen(demo_model: Hart) -> dict[str, Seen]:
    return calibrate(demo_model, SamplingSettings(), demo_model.transformer.config.patch_nums)


def test_which_convolutions(export_once: ExportOnce, demo_model: Hart) -> None:
    folder = export_once(DEMO_CHECKPOINT, "int8")
    names = [name for name, _ in convolutions(demo_model.tokenizer.decoder)]
    assert len(names) == 2 * (2 + 3 * 4) + 3
    graph = ir.load(folder / graph_file(DECODER)).graph
    integer = {node.inputs[3].name for node in graph if node.op_type == "QLinearConv"}
    assert integer == {f"{name}.int8" for name in names}
    weights = [value for value in graph.initializers.values() if value.name.endswith(".int8")]
    assert max(np.abs(value.const_value.numpy()).max() for value in weights) == 63
    floating = {node.inputs[1].name for node in graph if node.op_type == "Conv"}
    assert {"tokenizer.decoder.conv_in.weight", "tokenizer.decoder.conv_out.weight"} <= floating
    grown = {node.inputs[0].producer().op_type for node in graph if node.op_type == "Resize"}
    assert grown == {"QuantizeLinear"}, "cells are repeated in 8 bits"
    second = ir.load(folder / graph_file(DECODER, DEQUANTIZED)).graph
    assert {node.inputs[0].name for node in second if node.op_type == "DequantizeLinear"} == integer


def test_pictures_stay_close(export_once: ExportOnce, demo_model: Hart) -> None:
    """Of latents that nothing was measured with."""
    folder = export_once(DEMO_CHECKPOINT, "int8")
    session = ort.InferenceSession(open_bundle(folder).path(graph_file(DECODER)))
    with torch.inference_mode():
        latents = demo_latents(demo_model, 100)
        exact = (demo_model.tokenizer.decode(latents) + 1) / 2
    found = session.run(None, {"f_hat": latents.numpy()})[0]
    assert np.square(found - exact.numpy()).mean((1, 2, 3)).max() < 10**-3.4  # PSNR
    one = session.run(None, {"f_hat": latents[1:2].numpy()})[0]
    assert np.array_equal(one[0], found[1])


def demo_latents(model: Hart, seed: int) -> torch.Tensor:
    """Of two pictures."""
    assert isinstance(model, Hart)
    drawn: dict[str, torch.Tensor] = {}
    config = model.transformer.config
    features = torch.randn(
        2, config.context_token, config.context_dim, generator=torch.Generator().manual_seed(seed)
    )
    given = [features, torch.ones(2, config.context_token, dtype=torch.bool)]
    checkpoints.draw(model, given, SeededNoise([seed, seed + 1]), SamplingSettings(), None, drawn.__setitem__)
    return drawn["final.f_hat"]


def test_strips_have_the_same_weights(
    demo_model: Hart, seen: dict[str, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "LARGE", 1 << 17)  # the last level alone
    build = build_graphs(demo_model, None, demo_model.transformer.config.patch_nums)[DECODER]
    with WeightFile(tmp_path) as weights:
        write_graph(build(), tmp_path, weights, [DEQUANTIZED], seen=seen)
    graph = ir.load(tmp_path / graph_file(DECODER)).graph
    nodes = [node for node in graph if node.op_type == "QLinearConv"]
    assert len({node.inputs[3] for node in nodes}) == len(seen)
    assert len(nodes) == len(seen) + (strips.STRIPS - 1) * 7, "six of blocks and the one that made the map"
    with torch.inference_mode():
        latents = demo_latents(demo_model, 7)[:1]
        exact = (demo_model.tokenizer.decode(latents) + 1) / 2
    found = ort.InferenceSession(tmp_path / graph_file(DECODER)).run(None, {"f_hat": latents.numpy()})[0]
    assert np.square(found - exact.numpy()).mean() < 10**-3.4


def test_a_part_of_a_large_model(
    demo_model: Hart, seen: dict[str, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all scales are too many, what is seen is about the same."""
    sizes = demo_model.transformer.config.patch_nums
    decoded: list[torch.Tensor] = []
    decode = demo_model.tokenizer.decode

    def watched(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(latents)
        return decode(latents)

    monkeypatch.setattr(demo_model.tokenizer, "decode", watched)
    monkeypatch.setattr(calibration, "MOST_TOKENS", sum(n * n for n in sizes) - 1)
    monkeypatch.setattr(calibration, "LARGEST_SIDE", 5)
    part = calibrate(demo_model, SamplingSettings(), sizes)
    assert {tuple(latents.shape) for latents in decoded} == {(1, 32, 5, 5)}
    assert len(decoded) == calibration.MOST_CELLS // 25
    assert part.keys() == seen.keys()
    for name, one in part.items():
        for a, b in ((one.made, seen[name].made), (one.taken, seen[name].taken)):
            assert 0.4 < (a.high - a.low) / (b.high - b.low) < 2.5, name


def test_a_model_that_draws_nothing_finite(demo_model: Hart) -> None:
    model = load_hart(find_checkpoint(DEMO_CHECKPOINT))
    with torch.no_grad():
        model.tokenizer.quantize.embedding.weight.fill_(torch.inf)
    with pytest.raises(InputError, match="latents that are not finite"):
        calibrate(model, SamplingSettings(), model.transformer.config.patch_nums)
