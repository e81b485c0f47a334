"""Pictures in: reconstructed, varied, drawn anew in part, through the pipeline and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hart_runtime import InputError, Pipeline, Snapshot
from hart_runtime.export.cli import main as export
from hart_runtime.hart.demo.replacing import Replacement, rates, replacements
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.pictures import source_of
from hart_runtime.runtime.pipeline import to_images
from tests.host_executor import HostExecutor

PROMPT = "a green ring on a white background"


def as_picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 255 + 0.5).astype(np.uint8))


@pytest.fixture(scope="module")
def tasks() -> list[Replacement]:
    return replacements(16)


@pytest.fixture(scope="module")
def picture(tasks: list[Replacement]) -> Image.Image:
    return as_picture(tasks[0].picture)


@pytest.fixture(scope="module")
def mask(tasks: list[Replacement]) -> Image.Image:
    return as_picture(np.repeat(tasks[0].box[..., None], 3, axis=2).astype(np.float32))


def test_reconstruction(demo: Pipeline, tasks: list[Replacement]) -> None:
    """As the model card has it: 27.7 dB, three more than of the codes alone."""
    found = [demo.reconstruct(as_picture(task.picture)) for task in tasks]
    discrete, continuous = (
        -10 * np.log10(np.mean([10 ** (-r.psnr[name] / 10) for r in found]))
        for name in ("discrete", "continuous")
    )
    assert continuous > 27
    assert continuous > discrete + 2.7
    assert found[0].given.tobytes() == as_picture(tasks[0].picture).tobytes()
    error = np.asarray(found[0].images["continuous"], float) - np.asarray(found[0].given, float)
    assert -10 * np.log10(np.square(error / 255).mean()) == pytest.approx(
        found[0].psnr["continuous"], abs=0.1
    )


def test_shapes_are_replaced(demo: Pipeline, tasks: list[Replacement]) -> None:
    """Of 200 the reference replaces nine in ten (docs/editing.md); sixteen show a broken rule."""
    model = demo.bundle.manifest.model
    sources = [source_of(model, as_picture(t.picture), as_picture(t.box.astype(np.float32))) for t in tasks]
    jobs = [(task.new.caption(), seed) for seed, task in enumerate(tasks)]
    results = list(demo.jobs(jobs, demo.bundle.manifest.sampling, sources=sources))
    images = [image for result in results for image in result.images]
    assert (
        min(rates(tasks, [np.asarray(image, np.float32) / np.float32(255) for image in images]).values())
        >= 70
    )
    for image, source in zip(images, sources, strict=True):
        assert np.array_equal(np.asarray(image)[~source.drawn], source.pixels[~source.drawn])
    assert all(result.seconds["encoder"] > 0 for result in results)
    alone = next(iter(demo.jobs(jobs[3:4], demo.bundle.manifest.sampling, sources=sources[3:4])))
    assert alone.images[0].tobytes() == images[3].tobytes(), "whatever others in its batch keep"


def test_the_interface(demo: Pipeline, picture: Image.Image, mask: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "in.png")
    first = demo.edit(tmp_path / "in.png", mask, PROMPT, seed=3, num_images=2)
    assert [image.tobytes() for image in demo.edit(picture, mask, PROMPT, seed=3, num_images=2)] == [
        image.tobytes() for image in first
    ]
    assert first[0].tobytes() != first[1].tobytes()
    assert demo.edit(picture, mask, PROMPT, seed=4)[0].tobytes() == first[1].tobytes()
    plain = demo.edit(picture, mask, PROMPT, seed=3, paste=False)[0]
    inside = np.asarray(mask.convert("L")) > 0
    assert not np.array_equal(np.asarray(plain)[~inside], np.asarray(picture)[~inside])
    anew = demo.edit(picture, mask, PROMPT, seed=3, anew=2)[0]
    assert len({image.tobytes() for image in (*first, plain, anew)}) == 4
    for options in ({"prune": True, "keep": "0.5,0.25"}, {"unguided_scales": 2}, {"residual": False}):
        other = demo.edit(picture, mask, PROMPT, seed=3, **options)[0]  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(other)[~inside], np.asarray(picture)[~inside])
        assert other.tobytes() != first[0].tobytes()


def test_varying_keeps_more_with_more_scales(
    demo: Pipeline, picture: Image.Image, tasks: list[Replacement]
) -> None:
    given = np.asarray(picture, np.float32)
    told = tasks[0].old.caption()
    varied = [demo.vary(picture, k, told, seed=2, num_images=4) for k in (1, 2, 3, 4)]
    errors = [
        float(np.mean([np.square(np.asarray(image, np.float32) - given).mean() for image in images]))
        for images in varied
    ]
    assert errors[0] > errors[1] > max(errors[2:])
    assert errors[0] > 1.2 * errors[-1]


def test_nothing_kept_is_a_plain_drawing(demo: Pipeline, picture: Image.Image) -> None:
    """All is drawn, and the coarsest scale, too: what was given has no part in it."""
    white = Image.new("L", picture.size, 255)
    drawn = demo.edit(picture, white, PROMPT, seed=5, anew=1)[0]
    assert drawn.tobytes() == demo(PROMPT, seed=5)[0].tobytes()


def test_at_planned_addresses(demo: Pipeline, picture: Image.Image, mask: Image.Image) -> None:
    """Maps come from the host where an edit is planned, and from graphs where none is; in turns."""
    bundle = demo.bundle
    planned = Pipeline(bundle, PlannedBackend(bundle, HostExecutor(bundle)))
    other = Pipeline(bundle, on_the_cpu(bundle))
    for _ in range(2):
        assert planned(PROMPT, seed=1)[0].tobytes() == other(PROMPT, seed=1)[0].tobytes()
        one, two = (p.edit(picture, mask, PROMPT, seed=1)[0].tobytes() for p in (planned, other))
        assert one == two


def test_previews_are_pasted(demo: Pipeline, picture: Image.Image, mask: Image.Image) -> None:
    inside = np.asarray(mask.convert("L")) > 0
    seen: list[Image.Image] = []

    def watch(snapshot: Snapshot) -> None:
        seen.extend(to_images(snapshot.decode()))

    source = source_of(demo.bundle.manifest.model, picture, mask)
    result = demo.generate(PROMPT, seed=1, source=source, watch=watch)
    assert len(seen) > 5
    assert all(np.array_equal(np.asarray(i)[~inside], np.asarray(picture)[~inside]) for i in seen)
    assert seen[-1].tobytes() == result.images[0].tobytes()


def test_classes(class_bundle: Path, var_bundle: Path, picture: Image.Image, mask: Image.Image) -> None:
    for folder in (class_bundle, var_bundle):
        pipeline = Pipeline.load(folder, device="cpu")
        size = pipeline.bundle.manifest.model.image_size
        given, white = picture.resize((size, size)), mask.resize((size, size)).convert("L")
        inside = np.asarray(white) >= 128
        for label in ("none", 2):
            found = np.asarray(pipeline.edit(given, white, label, seed=1)[0])
            assert np.array_equal(found[~inside], np.asarray(given)[~inside])
            assert not np.array_equal(found[inside], np.asarray(given)[inside])
        assert set(pipeline.reconstruct(given).images) <= {"discrete", "continuous"}


def test_a_bundle_without_an_encoder(demo: Pipeline, picture: Image.Image) -> None:
    graphs = {name: spec for name, spec in demo.bundle.manifest.graphs.items() if name != ENCODER}
    bundle = replace(demo.bundle, manifest=replace(demo.bundle.manifest, graphs=graphs))
    pipeline = Pipeline(bundle, demo.backend)
    for call in (lambda: pipeline.reconstruct(picture), lambda: pipeline.vary(picture, 1, PROMPT)):
        with pytest.raises(InputError, match="this bundle takes no pictures, it has no encoder; export its"):
            call()


def called(*words: object) -> Result:
    return CliRunner().invoke(run, ["--device", "cpu", *map(str, words)])


@pytest.fixture(scope="module")
def files(picture: Image.Image, mask: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    picture.save(folder / "in.png")
    mask.save(folder / "mask.png")
    picture.rotate(90).save(folder / "other.png")
    return folder


def test_the_command_line(demo_bundle: Path, files: Path, tmp_path: Path) -> None:
    given = ("--engine", demo_bundle, "--image", files / "in.png")
    done = called(*given, "--reconstruct", "--output", tmp_path / "kept.png")
    assert done.exit_code == 0, done.output
    assert "kept-discrete.png: discrete, PSNR 2" in done.output
    assert {p.name for p in tmp_path.iterdir()} == {"kept-discrete.png", "kept-continuous.png"}
    for number, words in enumerate(
        (
            ("--mask", files / "mask.png", PROMPT),
            ("--mask", files / "mask.png", "--no-paste", "--anew", 1, PROMPT),
            ("--outpaint", "16,0,16,8", PROMPT),
            ("--vary", 2, "--num-images", 2, PROMPT),
        )
    ):
        done = called(*given, *words, "--seed", 7, "--json", "--output", tmp_path / f"{number}.png")
        assert done.exit_code == 0, done.output
        drawn = Path(json.loads(done.stdout)["images"][0]["path"])
        again = tmp_path / f"again-{number}.png"
        done = called(
            "--engine", demo_bundle, "--from-image", drawn, "--image", files / "in.png", "--output", again
        )
        assert done.exit_code == 0, done.output
        assert Image.open(again).tobytes() == Image.open(drawn).tobytes()
    first = np.asarray(Image.open(tmp_path / "0.png"))
    outside = np.asarray(Image.open(files / "mask.png").convert("L")) == 0
    assert np.array_equal(first[outside], np.asarray(Image.open(files / "in.png"))[outside])


def test_what_is_refused(demo_bundle: Path, files: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    edit = ("--image", files / "in.png", "--mask", files / "mask.png")
    assert called("--engine", demo_bundle, *edit, PROMPT, "--output", drawn).exit_code == 0
    again = ("--from-image", drawn)
    for words, said in (
        ((*edit[2:], PROMPT), "--mask: there is no picture; give one with --image"),
        (("--reconstruct",), "--reconstruct: there is no picture"),
        ((*edit[:2], PROMPT), "give --mask, --outpaint or --vary"),
        ((*edit, "--vary", 1, PROMPT), "--vary: draws everywhere"),
        ((*edit[:2], "--vary", 9, PROMPT), "--vary: expected 1 to 4"),
        ((*edit[:2], "--outpaint", "1,2", PROMPT), "expected pixels to the left"),
        ((*edit[:2], "--reconstruct", PROMPT), "--reconstruct draws nothing, found a prompt"),
        (edit, "no prompt: give one"),
        ((*edit[:2], "--output", files / "in.png", "--vary", 1, PROMPT), "is what is read"),
        (again, "--from-image: was drawn from another picture: give that one, too (--image)"),
        ((*again, "--image", files / "other.png"), "--image: is another picture than the one"),
        ((*again, *edit), "brings its own prompt, seed and settings, found --mask beside it"),
    ):
        done = called("--engine", demo_bundle, *words)
        assert done.exit_code == 2, (words, done.output)
        assert said in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_exported_without_an_encoder(var_model: Path, var_bundle: Path, files: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    words = [next(var_model.glob("var_*")), "--no-encoder", "--precision", "fp32", "--output", target]
    words += ["--max-batch", 4, "--class-names", var_model.parent / "names.txt", "--backend", "onnxruntime"]
    done = CliRunner().invoke(export, [*map(str, words)])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(target).manifest
    assert manifest.graphs.keys() == open_bundle(var_bundle).manifest.graphs.keys() - {ENCODER}
    shown = called("--engine", target, "--help").output
    assert "--outpaint" not in shown
    done = called("--engine", target, "--image", files / "in.png", "--vary", 1)
    assert done.exit_code == 2
    assert (
        "it has no encoder; export its checkpoint again with this version, and not with --no-encoder"
        in done.stderr
    )
    done = CliRunner().invoke(export, [str(w) for w in words if w != "--no-encoder"])
    assert done.exit_code == 2
    assert "encoder of pictures False, asked for True" in done.stderr
