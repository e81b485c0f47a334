"""Pictures of several sizes from one bundle: which scales they have, what is shared, who knows the size."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from hart_runtime import InputError, Pipeline, RunError
from hart_runtime.batch.cli import main as batch
from hart_runtime.bench.cli import main as bench
from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.pyramids import pyramid_of
from hart_runtime.export.cli import main as export
from hart_runtime.export.request import Request, differences
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.demo import CLASS_DEMO, DEMO_CHECKPOINT
from hart_runtime.hart.demo.report import main as report
from hart_runtime.hart.generate import generate
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.families.names import (
    DECODER,
    ENCODER,
    LATENT,
    NEXT_SCALE,
    RESIDUAL_CONDITION,
    RESIDUAL_STEP,
)
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.manifest import read_manifest
from hart_runtime.runtime.png import read_origin
from tests.serving import serving

PROMPT = "a red circle on a white background"
SHRUNK = (1, 2, 3, 4, 6)
ALONE = ("--device", "cpu", "--threads", 1)


def said(command: Any, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2, result.output
    assert sentence in result.output.splitlines()[-1], result.output


@pytest.fixture(scope="module")
def opened(sized_bundle: Path) -> Bundle:
    return open_bundle(sized_bundle)


@pytest.fixture(scope="module")
def small(sized_bundle: Path) -> Pipeline:
    return Pipeline.load(sized_bundle, device="cpu", size=48)


def test_there_are_as_many_scales_as_before(full: Path) -> None:
    published = find_checkpoint(full)

    def sides(size: int) -> tuple[int, ...]:
        return pyramid_of(published.llm_config, published.tokenizer_config, size)

    assert sides(1024) == published.llm_config.patch_nums
    assert sides(512) == (1, 1, 2, 2, 3, 4, 5, 6, 8, 11, 14, 18, 24, 32)
    assert sides(32) == (1,) * 11 + (2,) * 3


@pytest.mark.parametrize("size", [0, -16, 16, 500, 1040, 2048, True])
def test_sizes_that_no_pyramid_makes(size: int, full: Path) -> None:
    published = find_checkpoint(full)
    with pytest.raises(InputError, match="expected a multiple of 16 from 32 to 1024, the pixels"):
        pyramid_of(published.llm_config, published.tokenizer_config, size)


def test_only_graphs_of_the_maps_are_there_twice(opened: Bundle) -> None:
    (other,) = opened.manifest.other_sizes
    of_maps = {NEXT_SCALE, RESIDUAL_CONDITION, RESIDUAL_STEP, LATENT, DECODER, ENCODER}
    assert other.patch_nums == SHRUNK
    assert {*other.graphs} == of_maps
    files = {file for graph in other.graphs.values() for file in graph.files}
    assert all("_48px" in file for file in files)
    assert files <= opened.manifest.files.keys()


def test_weights_are_there_once(opened: Bundle) -> None:
    """What a further size adds are matrices of the encoder, by which maps become smaller and larger."""
    from hart_runtime.runtime.graph_file import Known, read_graph

    shared, more = (
        {
            weight.place
            for graph in graphs.values()
            for file in graph.files
            for weight in read_graph(opened.path(file).read_bytes(), Known({}, {})).weights.values()
            if weight.place is not None
        }
        for graphs in (opened.manifest.graphs, opened.manifest.other_sizes[0].graphs)
    )
    added = sum(length for _, _, length in more - shared)
    assert added < 0.01 * opened.manifest.files[WEIGHTS].size


def test_it_draws_what_the_reference_draws(small: Pipeline) -> None:
    """With positions spread as the weights know them."""
    model = load_hart(find_checkpoint(DEMO_CHECKPOINT))
    settings = small.bundle.manifest.sampling
    features, mask = small.encode([PROMPT])
    given = torch.from_numpy(small.backend.to_host(features)), torch.from_numpy(mask)
    found = small(PROMPT, seed=3)[0]

    def drawn(extent: int | None) -> float:
        pixels = generate(model, *given, SeededNoise([3]), settings, SHRUNK, extent=extent)[0]
        return float(np.abs(pixels.permute(1, 2, 0).numpy() * 255 - np.asarray(found)).max())

    assert found.size == (48, 48)
    assert drawn(8) <= 1
    assert drawn(None) > 10


def test_a_smaller_picture_is_of_the_same_scene(sized_bundle: Path, small: Pipeline) -> None:
    large = Pipeline.load(sized_bundle, device="cpu")
    prompts = [PROMPT, "a large yellow square on a blue background", "a green ring on a black background"]

    def pixels(images: list[Image.Image]) -> Any:
        return np.stack([np.asarray(image.resize((48, 48), Image.Resampling.BOX), float) for image in images])

    one, other = pixels(large(prompts, seed=5)), pixels(small(prompts, seed=5))
    same, shifted = (np.square(one - np.roll(other, by, axis=0)).mean() for by in (0, 1))
    assert same < shifted / 4


def test_pictures_do_not_depend_on_their_batch(small: Pipeline) -> None:
    together = small(PROMPT, num_images=3, seed=1, batch=3)
    assert together[2].tobytes() == small(PROMPT, seed=3)[0].tobytes()


def test_parts_of_smaller_pictures_are_drawn_anew(small: Pipeline) -> None:
    given = small(PROMPT, seed=1)[0]
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 48, 24))
    edited = small.edit(given, mask, "a blue star on a white background", seed=2)[0]
    assert np.array_equal(np.asarray(edited)[24:], np.asarray(given)[24:])
    assert not np.array_equal(np.asarray(edited)[:24], np.asarray(given)[:24])


def test_the_picture_tells_its_size_and_is_drawn_again(sized_bundle: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    engine = ("--engine", sized_bundle, "--device", "cpu")
    done = said(run, *engine, PROMPT, "--size", 48, "--output", first)
    assert done.exit_code == 0, done.output
    assert read_origin(first).size == 48
    assert said(run, *engine, "--from-image", first, "--output", again).exit_code == 0
    assert again.read_bytes() == first.read_bytes()
    refused(said(run, *engine, "--from-image", first, "--size", 64), "found --size beside it")


@pytest.mark.parametrize("size", [40, 0, 4800])
def test_sizes_that_a_bundle_has_not(sized_bundle: Path, size: int) -> None:
    done = said(run, "--engine", sized_bundle, PROMPT, "--size", size)
    refused(done, f"error: --size {size}: bundle {sized_bundle.name} draws 64 or 48 pixels")
    refused(done, "hart-export --size N makes one that draws others")


def test_in_python_it_is_said_of_any_value(sized_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"`size='48'`: bundle .* draws 64 or 48 pixels"):
        Pipeline.load(sized_bundle, size="48")  # type: ignore[arg-type]
    assert Pipeline.load(sized_bundle, size=np.int64(48)).bundle.manifest.model.image_size == 48


def test_bundles_of_one_size_know_it(demo_bundle: Path, demo: Pipeline) -> None:
    with pytest.raises(InputError, match="draws 64 pixels"):
        Pipeline.load(demo_bundle, size=48)
    assert demo.bundle.at_size(64).manifest == demo.bundle.manifest


def test_engines_are_of_the_first_size(opened: Bundle) -> None:
    with pytest.raises(InputError, match="`size=48`: engines draw a bundle's first size alone; use"):
        open_backend(opened.at_size(48), "cuda", backend="tensorrt-rtx")
    for size in (None, 64):
        with pytest.raises((InputError, RunError), match=r"GPU|CUDA|tensorrt"):
            open_backend(opened.at_size(size), "cuda", backend="tensorrt-rtx")


def test_a_server_draws_all_sizes(sized_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "drawn.png"
    done = said(run, "--engine", sized_bundle, PROMPT, "--size", 48, "--seed", 7, "--output", file, *ALONE)
    assert done.exit_code == 0, done.output
    body = {"prompt": PROMPT, "seed": 7}
    with serving("--engine", sized_bundle, "--max-loaded", 2, *ALONE[2:]) as server:
        (model,) = server.get("/v1/models").json()["data"]
        assert (model["size"], model["sizes"]) == ("64x64", ["64x64", "48x48"])
        answers = {size: server.post({**body, "size": size}) for size in ("48x48", "64x64", "auto", "40x40")}
    small, own, auto, other = (answer.json() for answer in answers.values())
    assert base64.b64decode(small["data"][0]["b64_json"]) == file.read_bytes()
    assert [small["size"], own["size"], auto["size"]] == ["48x48", "64x64", "64x64"]
    assert own["data"] == auto["data"]
    assert (
        other["error"]["message"]
        == f"size: {sized_bundle.name} draws 64x64 or 48x48 (or auto), found '40x40'"
    )


def test_a_batch_is_of_one_size(sized_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="part of the batch extra")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n")
    given = (prompts, "--engine", sized_bundle, "--output", tmp_path / "out", *ALONE)
    assert said(batch, *given, "--size", 48).exit_code == 0
    (picture,) = (tmp_path / "out" / "pictures").rglob("*.png")
    file = tmp_path / "drawn.png"
    said(run, "--engine", sized_bundle, PROMPT, "--size", 48, "--output", file, *ALONE)
    assert picture.read_bytes() == file.read_bytes()
    refused(said(batch, *given), "belongs to another run, whose size is 48, here it is None")
    refused(said(batch, *given, "--size", 40), "--size 40: bundle")


def test_a_size_is_measured(sized_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="part of the bench extra")
    given = ("--engine", sized_bundle, *ALONE, "--output", tmp_path / "result")
    refused(said(bench, *given, "--size", 40), f"error: --size 40: bundle {sized_bundle.name} draws 64 or 48")
    refused(said(bench, *given, "--size", 48, "--sustained", "1s"), "found --size beside it")


def test_sizes_are_judged_beside_each_other() -> None:
    done = said(report, "--size", 48, "--images", 4)
    assert done.exit_code == 0, done.output
    assert "full size, scaled to 48 and back" in done.output
    assert "difference of all: " in done.output.splitlines()[-1]


def test_what_is_there_already(opened: Bundle) -> None:
    checkpoint = find_checkpoint(DEMO_CHECKPOINT)
    asked = Request(checkpoint, "fp32", sizes=(64, 48))
    assert differences(asked, opened.manifest) == []
    for sizes in ((), (64,), (48, 64), (64, 40)):
        (found,) = differences(dataclasses.replace(asked, sizes=sizes), opened.manifest)
        assert "scales [[1, 2, 3, 5, 8], [1, 2, 3, 4, 6]], asked for" in found


def test_classes_have_one_size(tmp_path: Path, var_model: Path) -> None:
    for given, size, own in ((CLASS_DEMO, 32, 64), (var_model, 4, 6)):
        done = said(export, given, "--size", size, "--output", tmp_path / "bundle")
        refused(
            done, f"the weights of this checkpoint belong to its scales and draw {own} pixels alone; only"
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", 60], "error: --size 60: expected a multiple of 8 from 16 to 64, the pixels"),
        (["--size", 72], "error: --size 72: expected a multiple of 8 from 16 to 64, the pixels"),
        (["--size", 48, "--size", 48], "expected each size once, found 48 twice"),
    ],
)
def test_sizes_that_are_not_exported(words: list[object], sentence: str, tmp_path: Path) -> None:
    for more in (["--output", tmp_path / "bundle"], ["--dry-run"]):
        refused(said(export, *words, *more), sentence)
    assert not (tmp_path / "bundle").exists()


def test_a_level_table_belongs_to_its_scales(root: Path) -> None:
    config = root / "llm" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_timestep_embed": False}))
    found = find_checkpoint(root)
    size = found.llm_config.patch_nums[-1] * found.tokenizer_config.downsample
    assert Request(found, "fp32", sizes=(size,)).models
    with pytest.raises(InputError, match="belong to its scales"):
        Request(found, "fp32", sizes=(size - found.tokenizer_config.downsample,)).check(weights=False)


def nothing(other: dict[str, Any]) -> None:
    other["patch_nums"] = []


def the_same(other: dict[str, Any]) -> None:
    other["patch_nums"] = [1, 2, 3, 4, 8]


def shrinking(other: dict[str, Any]) -> None:
    other["patch_nums"] = [1, 4, 3, 4, 6]


def without_a_decoder(other: dict[str, Any]) -> None:
    del other["graphs"][DECODER]


def another_side(other: dict[str, Any]) -> None:
    other["patch_nums"] = [1, 2, 3, 4, 5]


def anothers_file(other: dict[str, Any]) -> None:
    other["graphs"][DECODER]["file"] = "decoder.onnx"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (nothing, "patch_nums: expected sides that do not shrink"),
        (the_same, "patch_nums: expected another size than 64 pixels again"),
        (shrinking, "patch_nums: expected sides that do not shrink"),
        (without_a_decoder, "graphs decoder missing"),
        (another_side, "as the weights know"),
        (anothers_file, "graph decoder: files expected"),
    ],
)
def test_manifests_that_contradict_themselves(
    change: Callable[[dict[str, Any]], None], sentence: str, sized_bundle: Path, tmp_path: Path
) -> None:
    values = json.loads((sized_bundle / MANIFEST).read_text())
    change(values["other_sizes"][0])
    copy = Path(
        shutil.copytree(sized_bundle, tmp_path / "copy", copy_function=lambda a, b: Path(b).symlink_to(a))
    )
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(InputError, match=sentence) as error:
        open_bundle(copy)
    assert "export the bundle again" in str(error.value)


def test_graphs_of_all_sizes_are_looked_into(sized_bundle: Path, tmp_path: Path) -> None:
    """Even of those that are not drawn now."""
    copy = Path(shutil.copytree(sized_bundle, tmp_path / "copy"))
    with (copy / "decoder_48px.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"decoder_48px\.onnx"):
        open_bundle(copy)


def test_each_size_is_as_if_it_were_alone(sized_bundle: Path) -> None:
    manifest, _ = read_manifest(sized_bundle)
    own, small = manifest.at_size(None), manifest.at_size(48)
    assert own.model.extent == 0
    assert (small.model.patch_nums, small.model.extent, small.model.reach) == (SHRUNK, 8, 8)
    assert small.model.resized(own.model.patch_nums) == own.model
    assert small.scale_dims(1)[-1]["side"] == 6
    with pytest.raises(InputError, match="draws 48 pixels"):
        small.at_size(64)
