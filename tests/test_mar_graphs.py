"""MAR through its graphs: what the reference draws, whatever the batch, and what it has and has not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from hart_runtime import InputError, Pipeline, Scale
from hart_runtime.common.checkpoint import SAMPLING_FILE
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.cli import main as compare
from hart_runtime.compare.recorded import recording
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart import checkpoints
from hart_runtime.hart.find import find
from hart_runtime.hart.mar_checkpoint import load_mar
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.call import checked_settings
from hart_runtime.runtime.cli import main
from hart_runtime.runtime.families.masked import AT_ONCE
from hart_runtime.runtime.families.names import BEGIN, CONTEXT, DENOISE, MASKED_TRANSFORMER, PLACE
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.fields import checked
from hart_runtime.serve.models import find_models
from hart_runtime.serve.requests import asked_for
from tests.golden_mar import MarRun, heads_of, mar_runs
from tests.mar_models import HEADS, SAMPLING, VARIANTS, MarShape, write_random_mar


def exported(shape: MarShape, folder: Path, precision: str = "fp32") -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    write_random_mar(shape, folder / "mar_small")
    usual = {**SAMPLING, "iterations": min(shape.transformer.tokens, 5)}
    (folder / "mar_small" / SAMPLING_FILE).write_text(json.dumps(usual))
    heads = f"{shape.transformer.encoder_heads},{shape.transformer.decoder_heads}"
    checkpoint = find(folder / "mar_small", heads=heads)
    export_bundle(Request(checkpoint, precision, max_batch=4), folder / precision)
    return folder / "mar_small", folder / precision


@pytest.fixture(scope="module")
def both(mar_model: Path, mar_bundle: Path) -> tuple[Path, Path]:
    return mar_model, mar_bundle


@pytest.fixture(scope="module")
def pipeline(both: tuple[Path, Path]) -> Pipeline:
    return Pipeline.load(both[1], device="cpu")


def run(bundle: Path, *arguments: object) -> Result:
    given = ["--engine", bundle, "--device", "cpu", *arguments]
    return CliRunner().invoke(main, [str(argument) for argument in given])


def by_reference(
    checkpoint: Path, labels: list[int], seeds: list[int], settings: SamplingSettings, heads: tuple[int, int]
) -> NDArray[np.float32]:
    model = load_mar(checkpoint / "checkpoint-last.pth", checkpoint / "kl16.ckpt", heads=heads)
    given = (torch.tensor(labels),)
    return checkpoints.draw(model, given, SeededNoise(seeds), settings).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 1.0},
        {"guidance_schedule": "constant", "temperature": 0.5},
        {"iterations": 1},
        {"iterations": 16, "steps": "3,3,4"},
        {"steps": f"{AT_ONCE + 1},{AT_ONCE + 3}"},
    ],
    ids=str,
)
def test_the_reference_draws_the_same(
    both: tuple[Path, Path], pipeline: Pipeline, options: dict[str, Any]
) -> None:
    checkpoint, _ = both
    settings = checked_settings(pipeline.bundle.manifest, None, **options)
    expected = by_reference(checkpoint, [2, 7], [4, 9], settings, HEADS)
    given = pipeline.given(["2", "none"])
    found = pipeline.drawer(given, [4, 9], settings).images
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize("name", ["patches of four cells", "one buffer token, a picture of one token"])
def test_other_forms_are_exported(name: str, tmp_path: Path) -> None:
    shape = VARIANTS[name]
    checkpoint, bundle = exported(shape, tmp_path)
    opened = Pipeline.load(bundle, device="cpu")
    settings = opened.bundle.manifest.sampling
    heads = (shape.transformer.encoder_heads, shape.transformer.decoder_heads)
    expected = by_reference(checkpoint, [1], [3], settings, heads)
    np.testing.assert_allclose(opened.drawer(opened.given(["1"]), [3], settings).images, expected, atol=5e-4)


@pytest.mark.parametrize("recorded", mar_runs(), ids=lambda recorded: recorded.label)
def test_golden_runs_through_graphs(recorded: MarRun, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every recorded tensor that graphs return, and the bytes of the pictures."""
    name = f"{recorded.variant.name}-{recorded.ema}-{hash(recorded.variant)}"
    place = tmp_path_factory.getbasetemp() / name
    if not place.is_dir():
        heads = ",".join(map(str, heads_of(recorded.variant)))
        export_bundle(Request(find(recorded.variant, ema=recorded.ema, heads=heads), "fp32"), place)
    opened = open_bundle(place)
    manifest = opened.manifest
    settings = recorded.settings(manifest.sampling)
    recorder, found = recording(open_backend(opened, "cpu"), manifest)
    labels = recorded.labels(manifest.model.num_classes)
    program = manifest.program(settings, len(labels))
    images = drawn(draw(recorder, program, {"label": labels}, recorded.noise())).images
    scale = manifest.checkpoint["tokenizer"]["latent_scale"]
    told = {name: value for name, value in found.items() if name not in ("image", "condition")}
    told |= {name: value.reshape(-1, value.shape[-1]) for name, value in found.items() if name.endswith(".z")}
    last = recorded.parameters["n_pred"]
    for step in range(len(last)):
        sampled = found[f"step{step}.diff.after{len(recorded.schedule) - 1}"]
        told[f"step{step}.sampled"] = sampled.reshape(-1, sampled.shape[-1])
    told["latent"] = found["final.f_hat"] * scale
    told["png"] = (images * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert recorded.compare(told, partial=True) >= len(last) + 2


def test_pictures_do_not_depend_on_the_batch(pipeline: Pipeline) -> None:
    labels: list[str | int] = [0, 3, "none", 6, 2]
    together = pipeline(labels, seed=7, batch=3)
    for label, picture in zip(labels, together, strict=True):
        alone = np.asarray(pipeline(label, seed=7, batch=1)[0]).astype(int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1


def test_previews_end_with_the_picture(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, bytes]] = []

    def keep(scale: Scale) -> None:
        assert scale.images is not None
        seen.append((scale.index, scale.total, scale.images[0].tobytes()))

    watched = pipeline(1, callback=keep, previews=True)
    assert [(index, total) for index, total, _ in seen] == [(k, 5) for k in range(5)]
    assert seen[-1][2] == watched[0].tobytes() == pipeline(1)[0].tobytes()
    assert len({picture for _, _, picture in seen}) == 5


def test_runs_of_a_picture(pipeline: Pipeline) -> None:
    """A run of a graph for each of four things in an iteration, but for later denoising steps."""
    manifest = pipeline.bundle.manifest
    for steps, later in (("100", 3), ("34", 1), ("35", 2), ("2", 1)):
        settings = checked_settings(manifest, None, iterations=6, steps=steps)
        counts = Counter(run.graph for run in manifest.program(settings, 2).runs())
        assert counts[CONTEXT] == 1
        assert {counts[name] for name in (MASKED_TRANSFORMER, BEGIN, PLACE)} == {6}
        assert counts[DENOISE] == 6 * later


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 17}, "`iterations`: expected 1 to 16, found 17"),
        ({"iterations": 0}, "`iterations`: expected 1 to 16, found 0"),
        ({"iterations": "many"}, "`iterations`: expected a whole number or None, found 'many'"),
        ({"steps": 1}, "`steps`: the residual diffusion needs at least 2 steps"),
        ({"steps": 1001}, "`steps`: expected a number such as 8"),
        ({"guidance_schedule": "cosine"}, "`guidance_schedule='cosine'`: expected linear or constant"),
        ({"temperature": -1}, "`temperature`: expected 0 to 10"),
        ({"top_k": 5}, "`top_k`: this model draws continuous tokens"),
        ({"residual": True}, "`residual`: this model's tokens are continuous"),
        ({"prune": True}, "`prune`: this model has no scales"),
        ({"unguided_scales": 1}, "`unguided_scales`: this model has no scales"),
    ],
)
def test_bad_options(pipeline: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(2, **options)
    assert words in str(caught.value)


def test_a_label_that_is_not_there(both: tuple[Path, Path]) -> None:
    done = run(both[1], "9")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "expected 0 to 6" in done.stderr


def test_other_families_have_no_iterations(var_bundle: Path) -> None:
    done = run(var_bundle, "2", "--iterations", 4)
    assert done.exit_code == 2
    assert "--iterations: this model draws whole scales, and no masked tokens" in done.stderr


def test_a_picture_is_drawn_again(both: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--iterations", 4, "--steps", "ddim20", "--temperature", 0.8]
    options += ["--guidance-schedule", "constant"]
    assert run(both[1], "3", *options, "--seed", 5, "--output", tmp_path / "one.png").exit_code == 0
    again = run(both[1], "--from-image", tmp_path / "one.png", "--output", tmp_path / "two.png")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_hart_compare(mar_model: Path, mar_in: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    bundle = mar_in(precision)
    (tmp_path / "labels.txt").write_text("2\nnone\n")
    given = ["--engine", bundle, "--checkpoint", mar_model, "--device", "cpu"]
    given += ["--prompts-file", tmp_path / "labels.txt", "--output", tmp_path / "report"]
    done = CliRunner().invoke(compare, [str(argument) for argument in given])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    graphs = {row["graph"] for row in report["runs"][0]["graphs"]}
    assert graphs == set(open_bundle(bundle).manifest.graphs)
    assert done.exit_code == 0, done.stdout


def test_a_server_takes_iterations(mar_bundle: Path) -> None:
    models = find_models([mar_bundle])
    own = {"label": 2, "iterations": 4, "temperature": 0.5, "stream": True}
    asked = asked_for(checked({**own, "partial_images": 4}), models)
    assert (asked.settings.iterations, asked.settings.temperature) == (4, 0.5)
    assert asked.scales == (0, 1, 2, 3)
    assert len(asked_for(checked({**own, "partial_images": 2}), models).scales) == 2
    for more, words in (
        ({"partial_images": 5}, "expected 0 to 4 (the iterations of"),
        ({"iterations": 17}, "expected 1 to 16, found 17"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule"),
        ({"top_k": 3}, "this model draws continuous tokens"),
    ):
        with pytest.raises(Refusal) as caught:
            asked_for(checked({**own, **more}), models)
        assert words in caught.value.message
