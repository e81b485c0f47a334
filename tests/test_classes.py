"""Pictures of classes: a pipeline and hart-run with a VAR bundle do what they do with HART's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hart_runtime import InputError, Pipeline, Scale
from hart_runtime.common.settings import VAR_FID
from hart_runtime.runtime.cli import main
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.png import read_origin


@pytest.fixture(scope="module")
def pipeline(var_bundle: Path) -> Pipeline:
    return Pipeline.load(var_bundle, device="cpu")


def run(bundle: Path, *arguments: object) -> Result:
    given = ["--engine", bundle, "--device", "cpu", *arguments]
    return CliRunner().invoke(main, [str(argument) for argument in given])


def test_numbers_and_names_draw_the_same(pipeline: Pipeline) -> None:
    same: list[Any] = [2, "2", "golden retriever", np.int64(2)]
    pictures = [pipeline(label, seed=3)[0].tobytes() for label in same]
    assert len(set(pictures)) == 1
    others = [pipeline(1, seed=3)[0].tobytes(), pipeline("none", seed=3)[0].tobytes()]
    assert len({pictures[0], *others}) == 3
    result = pipeline.generate(["cup", 3, "none"], seed=1, num_images=2)
    assert result.prompts == [n for n in ("Cup (5)", "Labrador retriever (3)", "none") for _ in range(2)]
    assert result.seeds == [1, 2] * 3


def test_pictures_do_not_depend_on_the_batch(pipeline: Pipeline) -> None:
    labels: list[str | int] = [0, 3, "none", 6, 2]
    together = pipeline(labels, seed=7, batch=4)
    for label, picture in zip(labels, together, strict=True):
        assert pipeline(label, seed=7, batch=1)[0].tobytes() == picture.tobytes()


def test_previews_end_with_the_picture(pipeline: Pipeline) -> None:
    """There is nothing behind the last scale."""
    seen: list[tuple[int, bytes]] = []

    def keep(scale: Scale) -> None:
        assert scale.images is not None
        seen.append((scale.index, scale.images[0].tobytes()))

    watched = pipeline(1, callback=keep, previews=True)
    assert [index for index, _ in seen] == [0, 1, 2]
    assert seen[-1][1] == watched[0].tobytes() == pipeline(1)[0].tobytes()
    assert len({picture for _, picture in seen}) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residual": True}, "`residual`: this model has no residual, its image tokenizer is discrete"),
        ({"steps": 4}, "`steps`: this model has no residual"),
        ({"preset": "sharp"}, "`preset='sharp'`: expected demo or fid"),
        ({"top_k": 97}, "`top_k`: expected 1 to 96"),
    ],
)
def test_what_a_model_of_classes_does_not_have(
    pipeline: Pipeline, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(2, **options)
    assert words in str(caught.value)


def test_there_are_no_text_features(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="this bundle draws classes, and takes no text features"):
        pipeline.from_features(np.zeros((1, 1, 1), np.float32), np.ones((1, 1), np.bool_))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (9, "class 9: expected 0 to 6"),
        ([0, "crane"], "label 2: class 'crane': 2 classes have this name; give 0 (crane bird) or 4 (crane)"),
        (["cup", 2.5], "label 2: expected the number or the name of a class, found 2.5"),
        ([], "no prompt was given"),
        ({"label": 3}, "expected a text or a list of texts"),
    ],
)
def test_labels_that_there_are_not(pipeline: Pipeline, labels: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(labels)
    assert words in str(caught.value)


def test_presets_and_what_is_said_beside_them(pipeline: Pipeline) -> None:
    settings = pipeline.generate(0, preset="fid").settings
    assert (settings.guidance, settings.top_p, settings.top_k) == (1.5, VAR_FID.top_p, 96)
    assert pipeline.generate(0, preset="fid", guidance=2.0).settings.guidance == 2.0
    assert pipeline.generate(0).settings == pipeline.generate(0, preset="demo").settings


def test_hart_has_no_classes_and_no_presets(demo: Pipeline) -> None:
    for prompts, options in ((7, {}), ("a red circle", {"preset": "fid"})):
        with pytest.raises(InputError, match=r"expected a text|this model has none"):
            demo(prompts, **options)  # type: ignore[arg-type]


def test_by_command(var_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    done = run(var_bundle, "--label", "2", "--label", "none", "Cup", "--output", out, "--json")
    assert done.exit_code == 0, done.output
    images = json.loads(done.stdout)["images"]
    assert [image["prompt"] for image in images] == ["Cup (5)", "golden retriever (2)", "none"]
    assert "text encoder" not in json.loads(done.stdout)["seconds"]
    origin = read_origin(tmp_path / "x-1.png")
    assert (origin.prompt, origin.settings.steps) == ("golden retriever (2)", "0")
    again = run(var_bundle, "--from-image", tmp_path / "x-1.png", "--output", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    first, second = (Image.open(tmp_path / name).tobytes() for name in ("x-1.png", "again.png"))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--label", "crane"], "give 0 (crane bird) or 4 (crane)"),
        (["--label", "retriever"], "near it: golden retriever (2), Labrador retriever (3)"),
        (["--label", "11"], "class 11: expected 0 to 6"),
        (["a red circle"], "class 'a red circle': there is no class of this name among 7"),
        (["2", "--steps", "4"], "--steps: this model has no residual, its image tokenizer is discrete"),
        (["2", "--residual"], "--residual: this model has no residual"),
        (["2", "--safety-model", "google/shieldgemma-2b"], "--safety-model: reads texts, and"),
        (["2", "--preset", "sharp"], "--preset sharp: expected demo or fid"),
        ([], "no prompt: give one as an argument"),
    ],
)
def test_what_hart_run_refuses(var_bundle: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run(var_bundle, *arguments, "--output", tmp_path / "x.png")
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


def test_a_class_of_a_bundle_that_draws_texts(demo_bundle: Path, tmp_path: Path) -> None:
    done = run(demo_bundle, "--label", "207", "--output", tmp_path / "x.png")
    assert (done.exit_code, "draws texts and has no classes" in done.stderr) == (2, True)


def test_bundles_are_told_apart_by_what_they_draw(var_bundle: Path) -> None:
    (var_bundle.parent / "other").mkdir()
    (var_bundle.parent / "other" / MANIFEST).write_bytes((var_bundle / MANIFEST).read_bytes())
    done = run(var_bundle.parent, "2")
    assert "6 x 6 pictures from 7 classes, fp32" in done.stderr
    (var_bundle.parent / "other" / MANIFEST).unlink()
    (var_bundle.parent / "other").rmdir()
