"""How far the exported bundles are from the reference model, and the tool that says so."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.noise import SeededNoise
from hart_runtime.compare.cli import main
from hart_runtime.compare.metrics import IDENTICAL_PSNR, compare_tensors, lpips, psnr, ssim
from hart_runtime.compare.record import Source, capture, describe
from hart_runtime.compare.recorded import in_order
from hart_runtime.compare.reference import Reference, load_reference, save_reference
from hart_runtime.compare.report import arithmetic
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.families.hart import GRAPHS
from hart_runtime.runtime.families.names import DECODER, FAST, RESIDUAL_STEP, TRANSFORMER
from tests.conftest import ExportOnce
from tests.golden_runs import HERE, Run, variants
from tests.imports import ROOT

ROUNDING = 3e-6
"""Of a sum of probabilities in float32."""
GATES = json.loads((Path(__file__).parent / "gates.json").read_text(encoding="utf-8"))


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments] + ["--device", "cpu"])


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def record_golden(variant: Path, bundle_folder: Path) -> Reference:
    """The reference model on a recorded variant's text features; it has no text encoder."""
    manifest = open_bundle(bundle_folder).manifest
    checkpoint = find_checkpoint(variant, ema=manifest.averaged)
    model, _ = Source.of(checkpoint, manifest).load(torch.float32, "cpu")
    recorded = Run(sorted((variant / "golden").glob("run_*.safetensors"))[0]).tensors()
    features = torch.from_numpy(np.asarray(recorded["ctx.features"], np.float32))
    mask = torch.from_numpy(np.asarray(recorded["ctx.mask"], np.bool_))
    for first in range(0, 1000, len(mask)):
        noise = SeededNoise(range(first, first + len(mask)))
        tensors = capture(model, [features, mask], noise, manifest.sampling, manifest)
        if farthest_rounding(tensors) > ROUNDING:
            return describe(checkpoint, manifest, manifest.sampling, [tensors], "cpu")
    raise AssertionError("every seed draws a code on the border of another")


def farthest_rounding(tensors: Mapping[str, Any]) -> float:
    """How far every draw is from being another code, in probability: nearer ones fall on either side,
    by the processor's way to round.
    """
    nearest = 1.0
    for name in [name for name in tensors if name.endswith(".logits_kept")]:
        shares = torch.from_numpy(np.asarray(tensors[name])).flatten(0, -2).softmax(-1).double().cumsum(-1)
        drawn = torch.from_numpy(np.asarray(tensors[name.replace("logits_kept", "u")])).flatten().double()
        nearest = min(nearest, float((shares - drawn[:, None] * shares[:, -1:]).abs().min()))
    return nearest


@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_float32_gates_of_the_recorded_variants(
    variant: Path, export_once: ExportOnce, tmp_path: Path
) -> None:
    bundle = export_once(variant, "fp32")
    save_reference(record_golden(variant, bundle), open_bundle(bundle).manifest, tmp_path / "reference")
    done = compare("--engine", bundle, "--reference", tmp_path / "reference", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    run = report(tmp_path / "out")["runs"][0]
    assert {row["graph"] for row in run["graphs"]} == set(GRAPHS) - {"text_encoder", FAST}
    within_float32_gates(run)


def within_float32_gates(run: dict[str, Any]) -> None:
    gates = GATES["fp32"]
    for row in run["graphs"]:
        assert row["finite"]
        assert row["error"] <= gates["relative_error"], row
    for forced, free in zip(run["teacher_forced"], run["free_running"], strict=True):
        assert forced["total_agreement"] >= gates["teacher_forced_index_agreement"]
        assert free["pictures"]["max_pixel_error"] <= gates["free_running_pixel_error"]


@pytest.fixture(scope="module")
def saved(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """The demo in fp16, compared and its reference kept: report, reference, how it ended."""
    folder = tmp_path_factory.mktemp("demo-fp16")
    done = compare(
        *("--engine", demo_bundle, "--output", folder / "out", "--save-reference", folder / "reference")
    )
    return folder / "out", folder / "reference", done


def test_half_precision_gates_of_the_demo(saved: tuple[Path, Path, Result]) -> None:
    output, _, done = saved
    assert done.exit_code == 0, done.output
    run = report(output)["runs"][0]
    assert run["candidate"]["arithmetic"] == "rounded weights, float32 arithmetic"
    gates = GATES["fp16"]
    for forced in run["teacher_forced"]:
        assert forced["total_agreement"] >= gates["teacher_forced_index_agreement"]
        assert forced["pictures"]["psnr"] >= gates["teacher_forced_psnr"]


def test_float32_gates_of_the_demo(
    export_once: ExportOnce, saved: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    """Against the reference that the half-precision bundle was compared with."""
    bundle = export_once(DEMO_CHECKPOINT, "fp32")
    done = compare("--engine", bundle, "--reference", saved[1], "--output", tmp_path)
    assert done.exit_code == 0, done.output
    run = report(tmp_path)["runs"][0]
    assert run["not_run"] == [FAST]
    within_float32_gates(run)


@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_what_leaves_something_out_is_compared(export_once: ExportOnce, tmp_path: Path, speed: str) -> None:
    bundle, kept = export_once(DEMO_CHECKPOINT, "fp32"), tmp_path / "reference"
    asked = ("--engine", bundle, "--speed", speed, "--num-prompts", 2, "--save-reference", kept)
    done = compare(*asked, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = report(tmp_path / "out")
    run = found["runs"][0]
    assert run["not_run"] == [TRANSFORMER]
    outputs = {row["output"].rstrip("0123456789") for row in run["graphs"] if row["graph"] == FAST}
    remembered = {"branch_attn_", "branch_ffn_"} if speed == "fast" else set()
    assert outputs == {"hidden", "new_key_", "new_value_"} | remembered
    within_float32_gates(run)
    assert found["reference"]["settings"]["unguided_scales"] > 0
    again = compare("--engine", bundle, "--reference", kept, "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert report(tmp_path / "again")["runs"][0]["graphs"] == run["graphs"]


def test_keys_are_compared_without_their_order() -> None:
    keys = np.random.default_rng(0).standard_normal((9, 2, 5)).astype(np.float32)
    moved = keys[::-1].copy()
    assert np.array_equal(in_order("new_key_0", keys), in_order("new_key_0", moved))
    assert not np.array_equal(in_order("hidden", keys), in_order("hidden", moved))
    moved[3, 1, 2] += 0.1
    assert 0 < np.abs(in_order("new_key_0", keys) - in_order("new_key_0", moved)).max() <= 0.1001


def test_the_report(saved: tuple[Path, Path, Result]) -> None:
    output, _, done = saved
    found = report(output)
    assert (found["schema"], found["passed"]) == (1, True)
    run = found["runs"][0]
    assert run["first_failure"] is None
    fields = "batch graph call output tolerance passed shape dtype finite error reference_min reference_max"
    fields += " max_abs mean_abs median_abs p99_abs max_rel mean_rel median_rel p99_rel cosine"
    assert all(set(row) == set(fields.split()) for row in run["graphs"])
    assert {row["graph"] for row in run["graphs"]} == set(GRAPHS) - {FAST}
    assert [len(t["agreement"]) for t in run["free_running"]] == [5]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 * 5
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    for words in ("teacher-forced: ", "free-running: ", "within tolerance", "rounded weights"):
        assert words in done.output


def test_a_saved_reference_needs_no_torch(
    demo_bundle: Path, saved: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    """As on a machine that has none: every import of torch fails."""
    script = (
        "import sys, importlib.abc\n"
        "class NoTorch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from hart_runtime.compare.cli import main\n"
        "main()\n"
    )
    given = ["--engine", demo_bundle, "--reference", saved[1], "--output", tmp_path, "--device", "cpu"]
    command = [sys.executable, "-c", script, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert report(tmp_path)["runs"][0]["graphs"] == report(saved[0])["runs"][0]["graphs"]


def test_torch_in_half_precision_is_a_backend(export_once: ExportOnce, tmp_path: Path) -> None:
    variant = HERE / "t2i_main"
    bundle = export_once(variant, "fp32")
    save_reference(record_golden(variant, bundle), open_bundle(bundle).manifest, tmp_path / "reference")
    given = ("--engine", bundle, "--reference", tmp_path / "reference", "--checkpoint", variant)
    done = compare(*given, "--backend", "torch-fp16", "--output", tmp_path)
    run = report(tmp_path)["runs"][0]
    assert run["candidate"]["arithmetic"] == "float16"
    assert all(row["passed"] for row in run["graphs"]), done.output
    assert max(row["error"] for row in run["graphs"] if row["graph"] == "transformer") > 1e-4


def test_layers_on_request(demo_bundle: Path, saved: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """Of every backend: looking into one leaves the sealed files as they are."""
    given = ("--engine", demo_bundle, "--reference", saved[1], "--checkpoint", DEMO_CHECKPOINT)
    both = ("--backend", "onnxruntime", "--backend", "openvino")
    done = compare(*given, *both, "--layers", "residual_condition", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    for run in report(tmp_path)["runs"]:
        assert run["layers"]["first"] is None
        assert "transformer.decoder_norm" in {layer["module"] for layer in run["layers"]["layers"]}
    assert done.output.count("residual_condition at residual condition: all") == 2


def test_bad_input(
    demo_bundle: Path, saved: tuple[Path, Path, Result], export_once: ExportOnce, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        done = compare(*arguments, "--output", tmp_path / "out")
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
        assert not (tmp_path / "out").exists()
        return done.stderr

    golden = export_once(HERE / "t2i_main", "fp32")
    engine = ("--engine", demo_bundle)
    assert "no bundle here" in refused("--engine", tmp_path)
    other = refused(*engine, "--checkpoint", HERE / "t2i_main")
    assert "t2i_main" in other
    assert "was exported from model.safetensors" in other
    assert "not the demo checkpoint; give its folder as --checkpoint" in refused("--engine", golden)
    assert "--layers nonsense: expected one of" in refused(*engine, "--layers", "nonsense")
    assert "exported from" in refused("--engine", golden, "--reference", saved[1])
    assert "no such file" in refused(*engine, "--reference", tmp_path)
    assert "brings its own prompts" in refused(*engine, "--reference", saved[1], "--num-prompts", 1)
    assert "brings its own settings" in refused(*engine, "--reference", saved[1], "--speed", "fast")
    assert "only 4 prompts" in refused(*engine, "--num-prompts", 9)
    assert "no text encoder" in refused("--engine", golden, "--checkpoint", HERE / "t2i_main")
    damaged = Path(shutil.copytree(saved[1], tmp_path / "damaged"))
    (damaged / "trajectory.json").write_text("{}")
    assert "damaged" in refused(*engine, "--reference", damaged)


def test_a_reference_comes_back_as_it_was_saved(
    export_once: ExportOnce, saved: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    manifest = open_bundle(export_once(DEMO_CHECKPOINT, "fp16")).manifest
    loaded = load_reference(saved[1], manifest)
    assert loaded.prompts[0] == "a red circle on a white background"
    assert loaded.half_errors
    save_reference(loaded, manifest, tmp_path / "again")
    again = load_reference(tmp_path / "again", manifest)
    for first, second in zip(loaded.batches, again.batches, strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != FAST])
def test_polygraphy_reads_every_graph(
    graph: str, demo_bundle: Path, saved: tuple[Path, Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own command line, on the graphs as they are and on a captured call of each."""
    from polygraphy.tools import main as polygraphy

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["polygraphy", *map(str, arguments)])
        assert polygraphy() == 0

    file = demo_bundle / f"{graph}.onnx"
    fed = ("--load-inputs", saved[1] / "calls" / f"{graph}.inputs.json")
    expected = ("--load-outputs", saved[1] / "calls" / f"{graph}.outputs.json")
    run("inspect", "model", file, "--show", "layers")
    run("check", "lint", file, *fed)
    if graph == "sample":  # truncated logits are -inf, whose difference Polygraphy takes for an error
        run("run", file, "--onnxrt", *fed)
    else:
        run("run", file, "--onnxrt", *fed, *expected, "--atol", 0.05, "--rtol", 0.05)


def test_the_three_graphs_in_the_words_of_the_docs(
    demo_bundle: Path, saved: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polygraphy's commands of docs/backends.md, as somebody copies them; and on the forms for TensorRT."""
    from polygraphy.tools import main as polygraphy

    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("polygraphy run ")]
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "demo").symlink_to(demo_bundle)
    (tmp_path / "reference").symlink_to(saved[1])
    monkeypatch.chdir(tmp_path)
    told = [Path(command[2]).stem for command in commands]
    assert told == [DECODER, TRANSFORMER, RESIDUAL_STEP]
    graphs = open_bundle(demo_bundle).manifest.graphs
    for name, command in zip(told, commands, strict=True):
        for file in graphs[name].files:
            monkeypatch.setattr(sys, "argv", [*command[:2], f"engines/demo/{file}", *command[3:]])
            assert polygraphy() == 0


def test_error_statistics() -> None:
    reference = np.array([[1.0, -4.0, 2.0]], np.float32)
    found = compare_tensors(reference, reference + np.array([0, 0.4, 0], np.float32))
    assert found.error == pytest.approx(0.1)
    assert found.max_abs == pytest.approx(0.4)
    assert found.median_abs == 0
    assert found.mean_rel == pytest.approx(0.1 / 3)
    assert compare_tensors(reference, reference, 1.0).error == 0
    assert compare_tensors(reference, reference + np.float32(0.4), np.full(3, 0.4)).error == pytest.approx(
        0, abs=1e-6
    )
    poisoned = compare_tensors(reference, np.full_like(reference, np.nan))
    assert (poisoned.finite, poisoned.error) == (False, None)
    assert compare_tensors(reference, reference.T).error is None
    assert compare_tensors(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])).error == 0.25


def test_a_cut_on_the_other_side_of_a_tie_is_a_small_error() -> None:
    reference = np.array([[3.0, 2.0, 1.999, -np.inf]], np.float32)
    near = np.array([[3.0, 2.0, -np.inf, -np.inf]], np.float32)
    wrong = np.array([[3.0, -np.inf, -np.inf, -np.inf]], np.float32)
    assert compare_tensors(reference, reference).error == 0
    assert 0 < (compare_tensors(reference, near).error or 0) < 1e-3
    assert (compare_tensors(reference, wrong).error or 0) > 0.3


def test_picture_metrics() -> None:
    rng = np.random.default_rng(0)
    picture = rng.random((3, 32, 32), np.float32)
    assert psnr(picture, picture) == IDENTICAL_PSNR
    assert psnr(picture, picture + np.float32(0.1)) == pytest.approx(20, abs=1e-3)
    assert ssim(picture, picture) == pytest.approx(1)
    assert (ssim(picture, picture[:, ::-1]) or 0) < 0.2
    assert ssim(picture[:, :8], picture[:, :8]) is None


def test_lpips_is_left_out_without_its_package() -> None:
    picture = np.zeros((3, 64, 64), np.float32)
    assert lpips(picture, picture) in (None, 0.0)


def test_half_precision_on_the_cpu_is_not_called_so() -> None:
    assert arithmetic("fp32", "onnxruntime", "cpu") == "float32"
    assert arithmetic("fp16", "onnxruntime", "cpu") == "rounded weights, float32 arithmetic"
    assert arithmetic("fp16", "openvino", "cpu") == "rounded weights, float32 arithmetic"
    assert arithmetic("fp16", "onnxruntime", "cuda") == "float16"
    assert arithmetic("fp16", "torch-fp16", "cpu") == "float16"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from hart_runtime.compare.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'polygraphy', 'skimage', 'torch'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
