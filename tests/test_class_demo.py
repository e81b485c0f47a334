"""The demo of classes: what it draws on seeds it never saw, and every command with its bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hart_runtime import Pipeline, Scale
from hart_runtime.bench.cli import main as bench_main
from hart_runtime.common.checkpoint import CLASS_NAMES, find_checkpoint
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.cli import main as compare_main
from hart_runtime.export.request import Request
from hart_runtime.hart import checkpoints
from hart_runtime.hart.demo import CLASS_DEMO, CLASS_VAR
from hart_runtime.hart.demo.checker import look
from hart_runtime.hart.demo.class_report import main as report_main
from hart_runtime.hart.demo.draw import draw_scene
from hart_runtime.hart.demo.judging import Array, features, frechet
from hart_runtime.hart.demo.scenes import CLASSES, all_scenes
from hart_runtime.hart.find import find
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.cli import main as run_main
from hart_runtime.runtime.png import read_origin
from hart_runtime.runtime.tensorrt.cli import main as build_main
from tests.serving import serving
from tests.test_class_hart import follow
from tests.test_compare import within_float32_gates

SEED, EACH = 5000, 2
"""Of the first picture, and pictures of each class: the card's are of seeds from 0 on."""
RIGHT = 64
"""Pictures of 90 with the colour and the shape that were asked for."""


@pytest.fixture(scope="module")
def pipeline(class_bundle: Path) -> Pipeline:
    return Pipeline.load(class_bundle, device="cpu")


def called(command: Any, *arguments: object) -> Result:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output + done.stderr
    return done


def arrays(images: list[Image.Image]) -> Array:
    return np.stack([np.asarray(image, np.float32) for image in images]) / np.float32(255)


@pytest.fixture(scope="module")
def drawn(pipeline: Pipeline) -> dict[bool, Array]:
    """Pictures of all classes with the residual, and without."""
    names = [name for name in CLASSES for _ in range(EACH)]
    return {
        residual: arrays(
            [
                image
                for start in range(0, len(names), 8)
                for image in pipeline(names[start : start + 8], seed=SEED + start, residual=residual)
            ]
        )
        for residual in (True, False)
    }


def test_the_colour_and_the_shape_asked_for_are_drawn(drawn: dict[bool, Array]) -> None:
    verdicts = [look(picture) for picture in drawn[True]]
    asked = [name for name in CLASSES for _ in range(EACH)]
    right = sum(f"{v.color} {v.shape}" == name for v, name in zip(verdicts, asked, strict=True))
    assert right >= RIGHT, f"{right} of {len(asked)}"


def test_the_residual_brings_pictures_closer_to_drawn_ones(drawn: dict[bool, Array]) -> None:
    rng = np.random.default_rng(SEED)
    scenes = sorted(all_scenes(), key=lambda scene: scene.label)
    truth = np.stack([draw_scene(scene, rng) for scene in scenes[:: len(scenes) // 360]])
    with_it, without = (frechet(features(truth), features(drawn[residual])) for residual in (True, False))
    assert with_it < 0.9 * without
    changed = np.abs(drawn[True] - drawn[False]).mean((1, 2, 3))
    assert (changed > 0.003).all()  # of every picture
    assert changed.mean() < 0.1  # it mends, and draws no other picture


def test_what_ships(tmp_path: Path) -> None:
    """Both checkpoints can be exported: names, defaults and files are those of their layouts."""
    hart, var = find_checkpoint(CLASS_DEMO), find(CLASS_VAR)
    for checkpoint in (hart, var):
        request = Request(checkpoint, "fp16")
        request.check()
        checkpoints.check(checkpoint)
        assert tuple(request.names) == CLASSES
    assert (hart.sampling.residual, var.sampling.residual) == (True, False)
    assert hart.sampling.guidance == var.sampling.guidance
    assert vars(var.llm_config).items() <= vars(hart.llm_config).items()  # of equal width and depth
    files = [file for file in CLASS_DEMO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in {file.resolve() for file in files}) <= 15e6
    assert all((CLASS_DEMO / name).is_file() for name in ("README.md", CLASS_NAMES))


def test_graphs_follow_the_reference(class_bundle: Path) -> None:
    follow(class_bundle, CLASS_DEMO, find_checkpoint(CLASS_DEMO).sampling)


def test_classes_by_name_number_and_batch(pipeline: Pipeline) -> None:
    labels: list[str | int] = ["red circle", 0, "none", "White Star", 44]
    together = pipeline(labels, seed=7, batch=5)
    for label, picture in zip(labels, together, strict=True):
        assert pipeline(label, seed=7, batch=1)[0].tobytes() == picture.tobytes()
    assert together[0].tobytes() == together[1].tobytes()
    assert len({picture.tobytes() for picture in together}) == 4


def test_previews_end_before_the_residual(pipeline: Pipeline) -> None:
    seen: list[bytes] = []

    def keep(scale: Scale) -> None:
        assert scale.images is not None
        seen.append(scale.images[0].tobytes())

    picture = pipeline("blue ring", seed=1, callback=keep, previews=True)[0].tobytes()
    assert len({*seen, picture}) == 6
    assert seen[-1] == pipeline("blue ring", seed=1, residual=False)[0].tobytes()
    assert picture == pipeline("blue ring", seed=1)[0].tobytes()


def test_by_command(class_bundle: Path, tmp_path: Path) -> None:
    base = ("--engine", class_bundle, "--device", "cpu")
    told = called(
        run_main, *base, "--label", 7, "green star", "--output", tmp_path / "x.png", "--json"
    ).stdout
    assert [image["prompt"] for image in json.loads(told)["images"]] == [
        "green star (8)",
        "green triangle (7)",
    ]
    origin = read_origin(tmp_path / "x-1.png")
    assert (origin.prompt, origin.settings.residual) == ("green triangle (7)", True)
    called(run_main, *base, "--from-image", tmp_path / "x-1.png", "--output", tmp_path / "again.png")
    called(run_main, *base, "--label", 7, "--no-residual", "--seed", 1, "--output", tmp_path / "plain.png")
    first, second, plain = (Image.open(tmp_path / n).tobytes() for n in ("x-1.png", "again.png", "plain.png"))
    assert first == second != plain


def test_the_comparison_finds_its_checkpoint(class_bundle: Path, tmp_path: Path) -> None:
    """Without one being named: it is the package's."""
    called(compare_main, "--engine", class_bundle, "--device", "cpu", "--output", tmp_path / "out")
    (run,) = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["runs"]
    assert {row["graph"] for row in run["graphs"]} == open_bundle(class_bundle).manifest.engined.keys()
    within_float32_gates(run)


def test_a_dry_run_of_engines(class_bundle: Path) -> None:
    dry = called(build_main, "--engine", class_bundle, "--dry-run", "--batch", 1).output
    assert all(name in dry for name in open_bundle(class_bundle).manifest.engined)


@pytest.mark.slow
def test_the_bench(class_bundle: Path, tmp_path: Path) -> None:
    options = ("--batch", 1, "--iterations", 1, "--warmup", 1, "--threads", 1, "--against", "torch-eager")
    called(bench_main, "--engine", class_bundle, "--device", "cpu", *options, "--output", tmp_path / "result")
    found = json.loads((tmp_path / "result" / "bench.json").read_text())
    stages = [stage["name"] for stage in found["breakdown"]["stages"]]
    assert {"residual condition", "residual step 7"} <= set(stages), stages
    assert (found["against"][0]["psnr"] or 99.0) > 60


def test_the_server(class_bundle: Path) -> None:
    with serving("--engine", class_bundle, "--threads", 1) as server:
        (plain,), (mended,) = (server.drawn(prompt="red circle", residual=r) for r in (False, True))
        assert plain != mended
        assert server.post({"prompt": "", "label": "no such thing"}).status_code == 400


def test_the_report_compares_three(tmp_path: Path) -> None:
    done = called(report_main, "--images", 10, "--output", tmp_path / "numbers.json")
    rows = json.loads((tmp_path / "numbers.json").read_text())["models"]
    assert [*rows] == ["HART", "HART without its residual", "VAR of equal width", "drawn by the project"]
    assert rows["drawn by the project"]["both"] == 100
    assert all(0 < rows[name]["milliseconds"] < 1e5 for name in [*rows][:3])
    assert done.stdout.count("|\n") == 6
    assert SamplingSettings().steps in done.stdout
