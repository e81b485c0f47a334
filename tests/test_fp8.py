"""Bundles with products in 8-bit floating point: the arithmetic, what stays in half, and where they run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from hart_runtime import Pipeline
from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.config import TokenizerConfig, TransformerConfig
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.cli import main as hart_compare
from hart_runtime.export.cli import main as hart_export
from hart_runtime.export.dry_run import forecast
from hart_runtime.export.float8 import calibrate, products, round_products, scale_of, sensitive
from hart_runtime.export.request import Request
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.model import Hart
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.families.names import FAST, TRANSFORMER
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.graph_file import FLOAT8, read_graph
from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.spec import GraphSpec, TensorSpec
from hart_runtime.runtime.tensorrt.builder import BuildOptions, build_engine
from hart_runtime.runtime.tensorrt.cli import main as hart_build
from hart_runtime.runtime.tensorrt.float8 import USUAL, for_float8, lacking
from hart_runtime.runtime.tensorrt.package import Package
from hart_runtime.runtime.tensorrt.profiles import make_profiles
from tests.conftest import ExportOnce
from tests.test_variants import write_random_checkpoint

Half = NDArray[np.float16]
GATES = json.loads((Path(__file__).parent / "gates.json").read_text(encoding="utf-8"))["fp8"]
AMPERE = Gpu("NVIDIA GeForce RTX 3060", "8.6", 28, 12_000_000_000)
ADA = Gpu("NVIDIA GeForce RTX 4060", "8.9", 24, 8_585_216_000)
PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def demo_fp8(export_once: ExportOnce) -> Path:
    return export_once(DEMO_CHECKPOINT, "fp8")


def product_of(weight: Half, scale: float) -> ir.Model:
    """``y = x @ weight`` as an fp8 bundle has it, of two rows of 64 tokens."""
    inputs, outputs = weight.shape
    x = ir.Value(name="x", shape=ir.Shape([2, 64, inputs]), type=ir.TensorType(ir.DataType.FLOAT16))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    product = ir.node("MatMul", [x, w], name="part/MatMul")
    y = product.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape([2, 64, outputs]), ir.DataType.FLOAT16
    graph = ir.Graph([x], [y], nodes=[product], initializers=[w], opset_imports={"": 20}, name="g")
    model = round_products(ir.Model(graph, ir_version=10), {"part": scale})
    assert [node.op_type for node in model.graph] == [
        *("QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul")
    ]
    return model


def to_e4m3(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """The nearest number with 3 bits behind its first, at least 2^-9 apart, and at most 448: what the format
    is (arXiv 2209.05433).
    """
    x = x.astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def test_a_product_is_that_of_rounded_numbers() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 64, 96)) * rng.choice([1e-3, 1, 8], (2, 64, 96))).astype(np.float16)
    weight = rng.standard_normal((96, 80)).astype(np.float16)
    x[0, 0, 0] = 100  # beyond what was seen, and cut off
    scale, own = scale_of(40), scale_of(float(np.abs(weight).max()))
    session = ort.InferenceSession(ir.to_proto(product_of(weight, scale)).SerializeToString())
    (found,) = session.run(None, {"x": x})
    taken = to_e4m3(x / scale) * scale
    assert taken[0, 0, 0] == 448 * scale < 100
    expected = taken @ (to_e4m3(weight / own) * own)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    exact = x.astype(np.float64) @ weight
    error = np.linalg.norm((found - exact)[1]) / np.linalg.norm(exact[1])
    assert 0.01 < error < 0.05, "what three bits lose"
    x[1, 2, 3] = np.nan
    (spoiled,) = session.run(None, {"x": x})
    assert np.isnan(spoiled[1, 2]).all()
    assert np.array_equal(np.delete(spoiled[1], 2, 0), np.delete(found[1], 2, 0)), "of one token alone"


@pytest.mark.parametrize("largest", [0.0, 1e-30, 0.02, 0.03, 1.0, 447.0, 448.0, 449.0, 65504.0])
def test_scales_round_nothing(largest: float) -> None:
    scale = scale_of(largest)
    assert math.frexp(scale)[0] == 0.5, "a power of two"
    assert float(np.float16(scale)) == scale
    assert largest / scale <= 448
    assert largest / scale > 224 or scale == 2.0**-14, "as small as it can be, and not lost in half"


def test_what_is_sensitive_is_a_matter_of_weights() -> None:
    errors, weights = {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 100, "b": 100, "c": 100}
    assert sensitive(errors, weights) == []
    assert sensitive({**errors, "c": 3.0}, weights) == ["c"]
    assert sensitive({**errors, "c": 3.0}, {**weights, "c": 300}) == [], "it is worth as much more"


def small_model(folder: Path, width: int = 64) -> Hart:
    """HART with random weights, as small as products in 8 bits can be."""
    llm = TransformerConfig(
        attn_type="llama",
        mlp_type="llama",
        disable_aln=True,
        depth=3,
        embed_dim=width,
        num_heads=2,
        context_token=6,
        context_dim=20,
        diff_width=24,
        diff_depth=1,
        patch_nums=(1, 2, 3),
        num_sampling_steps="2",
    )
    image = TokenizerConfig(
        vocab_size=64, ch=32, ch_mult=(1,), quantizer_type="var_hybrid", v_patch_nums=(1, 2, 3)
    )
    write_random_checkpoint(folder, llm, image)
    return load_hart(find_checkpoint(folder))


@pytest.mark.parametrize("name", ["transformer.blocks.1.ffn.down_proj", "transformer.blocks.1.attn.qkv_proj"])
def test_what_stays_in_half_is_measured(tmp_path: Path, name: str) -> None:
    """Whichever product adds much more to its tokens than others of its kind."""
    model = small_model(tmp_path)
    before = calibrate(model, SamplingSettings(), (1, 2, 3))
    found = dict(products(model.transformer))
    assert {*before.scales, *before.in_half} == {*found}
    assert len(found) == 3 * 5
    assert name not in before.in_half
    with torch.no_grad():
        found[name].weight *= 6
    weight = found[name].weight.clone()
    after = calibrate(model, SamplingSettings(), (1, 2, 3))
    assert name in after.in_half
    assert name not in after.scales
    assert 0.01 < after.in_half[name] < 0.5
    assert torch.equal(found[name].weight, weight), "what was rounded to look at it is as it was"


def test_scales_are_of_what_is_seen(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    plain = calibrate(model, SamplingSettings(), (1, 2, 3))
    behind_norms = ("qkv_proj", "gate_proj", "up_proj")
    with torch.no_grad():
        for name, parameter in model.transformer.blocks.named_parameters():
            if name.endswith("ln_wo_grad.weight"):
                parameter.mul_(8)
            elif name.endswith(tuple(f"{product}.weight" for product in behind_norms)):
                parameter.div_(8)
    raised = calibrate(model, SamplingSettings(), (1, 2, 3))
    assert raised.in_half.keys() == plain.in_half.keys(), "powers of two change nothing else"
    for name, scale in plain.scales.items():
        assert raised.scales[name] == scale * (8 if name.endswith(behind_norms) else 1), name


def test_a_model_without_such_products(tmp_path: Path) -> None:
    model = small_model(tmp_path, width=72)
    with pytest.raises(InputError, match=r"no product .* multiples of 16 .* give `precision='fp16'`"):
        calibrate(model, SamplingSettings(), (1, 2, 3))


def test_a_model_that_computes_nothing_finite(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    with torch.no_grad():
        dict(products(model.transformer))["transformer.blocks.0.ffn.up_proj"].weight.fill_(torch.inf)
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.down_proj: takes what is not finite"):
        calibrate(model, SamplingSettings(), (1, 2, 3))


def test_the_demo_stays_close_to_the_reference(demo_fp8: Path, tmp_path: Path) -> None:
    command = ["--engine", str(demo_fp8), "--backend", "onnxruntime", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(hart_compare, command)
    assert done.exit_code == 0, done.output
    (run,) = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["runs"]
    assert run["candidate"]["arithmetic"] == (
        "8-bit floating point emulated, the rest in rounded weights, float32 arithmetic"
    )
    for forced in run["teacher_forced"]:
        assert forced["total_agreement"] >= GATES["teacher_forced_index_agreement"]
        assert forced["pictures"]["psnr"] >= GATES["teacher_forced_psnr"]


def test_weights_are_stored_once_and_in_a_byte(demo_fp8: Path, demo_bundle: Path) -> None:
    manifest = open_bundle(demo_fp8).manifest
    model = load_hart(find_checkpoint(DEMO_CHECKPOINT))
    found = dict(products(model.transformer))
    assert len(found) == 5 * manifest.model.depth
    assert 0 < len(manifest.in_half) < len(found) / 3
    assert manifest.in_half.keys() <= found.keys()
    places: dict[str, set[tuple[str, int, int]]] = {}
    for name, graph in manifest.graphs.items():
        for file in graph.files:
            weights = read_graph((demo_fp8 / file).read_bytes()).weights.values()
            eight = {weight.name: weight for weight in weights if weight.dtype == FLOAT8 and weight.shape}
            assert bool(eight) == (name in (TRANSFORMER, FAST)), file
            for key, weight in eight.items():
                assert weight.place is not None
                assert weight.place[2] == found[key.removesuffix(".float8")].weight.numel()
                places.setdefault(key, set()).add(weight.place)
    assert {key.removesuffix(".float8") for key in places} == found.keys() - manifest.in_half.keys()
    assert all(len(where) == 1 for where in places.values()), "of all graphs and forms"
    saved = sum(found[key.removesuffix(".float8")].weight.numel() for key in places)
    fewer = open_bundle(demo_bundle).manifest.files[WEIGHTS].size - manifest.files[WEIGHTS].size
    assert fewer == pytest.approx(saved, rel=0.02)  # files align their tensors
    planned = forecast(Request(find_checkpoint(DEMO_CHECKPOINT), "fp8")).weights["fp8"].nbytes
    planned += sum(found[name].weight.numel() for name in manifest.in_half)  # known when it was measured
    assert planned == pytest.approx(manifest.files[WEIGHTS].size, rel=0.04)


def test_pictures_do_not_depend_on_their_batch(demo_fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline = Pipeline.load(demo_fp8, device="cpu")
    assert "are emulated on the CPU" in caplog.text
    prompts = [PROMPT, "a green ring"]
    together = pipeline.generate(prompts, seed=3, batch=2).images
    for prompt, image in zip(prompts, together, strict=True):
        assert pipeline(prompt, seed=3)[0].tobytes() == image.tobytes()
    fast = pipeline(PROMPT, seed=3, unguided_scales=1)[0]
    difference = np.asarray(fast, np.float64) - np.asarray(together[0], np.float64)
    assert 10 * math.log10(255**2 / np.square(difference).mean()) > 18, "the other graph, the same weights"


def test_where_it_does_not_run_it_says_so(demo_fp8: Path) -> None:
    bundle = open_bundle(demo_fp8)
    with pytest.raises(InputError, match=r"`backend='openvino'`: .* fp8 bundle, which runs in engines"):
        open_backend(bundle, backend="openvino")
    with pytest.raises(InputError, match=r"`backend='onnxruntime'`: .* fp8 bundle, which runs in engines"):
        open_backend(bundle, device="cuda", backend="onnxruntime")
    done = CliRunner().invoke(
        hart_build, ["--engine", str(demo_fp8), "--dry-run", "--compute-capability", "8.6,8.9"]
    )
    assert done.exit_code == 2
    assert "needs compute capability 8.9 or newer" in done.stderr
    assert done.stderr.rstrip().endswith("found 8.6")


def test_which_gpus_engines_are_for(demo_fp8: Path, demo_bundle: Path) -> None:
    fp8, fp16 = (open_bundle(folder).manifest for folder in (demo_fp8, demo_bundle))
    none = BuildOptions()
    assert for_float8(fp8, True, none, None).compute_capabilities == USUAL
    assert for_float8(fp8, True, none, ADA) == none
    assert for_float8(fp8, False, none, None) == none, "built where it runs, and nothing is here"
    named = BuildOptions(compute_capabilities=("12.0",))
    assert for_float8(fp8, True, named, AMPERE) == named
    with pytest.raises(InputError, match=r"8\.9 or newer \(.*`precision='fp16'`\), .*RTX 3060.* has 8\.6"):
        for_float8(fp8, True, none, AMPERE)
    assert lacking(fp8, ADA) is None
    assert lacking(fp8, None) is None
    for gpu in (None, ADA, AMPERE):
        assert for_float8(fp16, True, none, gpu) == none
        assert lacking(fp16, gpu) is None


def test_engines_are_built_for_gpus_that_have_it(demo_fp8: Path, rtx: Package) -> None:
    bundle = open_bundle(demo_fp8)
    graph = bundle.manifest.graphs[TRANSFORMER]
    profiles = make_profiles(bundle.manifest, TRANSFORMER, (1, 1), per_scale=False)

    def build(*capabilities: str) -> None:
        options = BuildOptions(compute_capabilities=capabilities)
        build_engine(rtx, bundle.path(graph.file), graph, profiles, options)

    build(*USUAL)
    with pytest.raises(RunError, match=r"cannot build an engine .*fp8_e4m3"):
        build("8.6")


def test_an_engine_keeps_weights_in_a_byte(tmp_path: Path, rtx: Package) -> None:
    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float16)
    ir.save(product_of(weight, 0.125), file := tmp_path / "product.onnx")
    x, y = (TensorSpec(name, "float16", (2, 64, 1024)) for name in ("x", "y"))
    options = BuildOptions(compute_capabilities=("8.9",))
    built = build_engine(rtx, file, GraphSpec(file.name, 20, (x,), (y,)), [], options)
    assert weight.size < len(built.serialized) < 1.5 * weight.size


def test_what_an_export_says(tmp_path: Path, demo_fp8: Path, var_model: Path) -> None:
    """Of a bundle that is there already nothing is measured again; of a new one, what stays in half."""
    again = ["--precision", "fp8", "--backend", "onnxruntime", "--output", str(demo_fp8)]
    done = CliRunner().invoke(hart_export, again)
    assert (done.exit_code, "is there already" in done.stdout) == (0, True), done.output
    command = [str(var_model), "--precision", "fp8", "--backend", "onnxruntime"]
    done = CliRunner().invoke(hart_export, [*command, "--output", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(tmp_path / "bundle").manifest
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fp8: ")]
    assert all(name in line for name in manifest.in_half)
    assert line.endswith("none") == (not manifest.in_half)
