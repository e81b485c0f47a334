"""hart-batch with given pictures: the files of hart-run, what is refused, and what changes on the way."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hart_runtime.batch.output import open_output
from hart_runtime.batch.plan import in_batches, make_plan
from hart_runtime.batch.rows import read_rows
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.manifest import Manifest, read_manifest
from tests.batches import FEW, batch, check_whole, drawn, hart_run, table
from tests.test_batch import PROMPTS, RUN, check_refused, written

NAMES = ("prompt", "seed", "image", "mask", "outpaint", "vary", "anew", "fit", "paste")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a picture and a mask beside the rows, and another picture elsewhere."""
    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    white = np.zeros((64, 64), np.uint8)
    white[8:40, 16:48] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    Image.fromarray(white).save(tmp_path / "in" / "mask.png")
    Image.fromarray(pixels[::-1, :50].copy()).save(tmp_path / "b.png")
    return tmp_path


@pytest.fixture
def manifest(demo_bundle: Path) -> Manifest:
    return read_manifest(demo_bundle)[0]


def rows_of(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in NAMES} for row in rows]


def test_every_way_draws_what_hart_run_draws(demo_bundle: Path, manifest: Manifest, folder: Path) -> None:
    """Rows with a picture and rows without, in one file; the words of CSV are those of JSON."""
    rows = rows_of(
        {"prompt": PROMPTS[0], "image": "in/a.png", "mask": "in/mask.png"},
        {"prompt": PROMPTS[1]},
        {"prompt": PROMPTS[2], "image": str(folder / "b.png"), "vary": 2},
        {"prompt": PROMPTS[0], "image": "b.png", "outpaint": "4,0,4,0", "anew": 1, "paste": False},
        {"prompt": PROMPTS[1], "seed": 9, "image": "in/a.png", "mask": "in/mask.png", "fit": "stretch"},
    )
    plans = []
    for kind in ("jsonl", "csv", "parquet"):
        file = written(folder / f"rows.{kind}", rows)
        plans.append(make_plan(read_rows(file), file, manifest, steps="2"))
    assert plans[0] == plans[1] == plans[2]
    assert [picture.source for picture in plans[0].pictures] == [0, None, 1, 2, 3]
    out = folder / "out"
    drawn(folder / "rows.csv", "--engine", demo_bundle, "--output", out, *FEW)
    files = check_whole(out, 5)
    image, masked = ("--image", folder / "in" / "a.png"), ("--mask", folder / "in" / "mask.png")
    other = ("--image", folder / "b.png")
    for number, options in enumerate(
        [
            (*image, *masked),
            (),
            (*other, "--vary", 2),
            (*other, "--outpaint", "4,0,4,0", "--anew", 1, "--no-paste"),
            (*image, *masked, "--fit", "stretch"),
        ]
    ):
        row = table(out)[number]
        alone = hart_run(demo_bundle, folder, row["prompt"], "--seed", row["seed"], *options, *FEW)
        assert files[number] == alone, number


def test_pictures_that_start_from_others_are_drawn_together(manifest: Manifest, folder: Path) -> None:
    """And not with those that start from nothing."""
    rows = [{"prompt": "x", "count": 2, **more} for more in ({"image": "b.png", "vary": 1}, {}) * 2]
    plan = make_plan(rows, folder / "rows.jsonl", manifest)
    assert [picture.source for picture in plan.pictures] == [0, 0, None, None] * 2
    assert len(plan.sources) == 1, "it is read once"
    with open_output(folder / "out", plan, RUN) as output:
        parts = [[picture.number for picture in part] for part in in_batches(output.left, 8)]
    assert parts == [[2, 3, 6, 7], [0, 1, 4, 5]]


def test_another_picture_is_another_run(demo_bundle: Path, folder: Path) -> None:
    file = written(folder / "rows.jsonl", [{"prompt": "a star", "image": "b.png", "vary": 1}])
    words = (file, "--engine", demo_bundle, *FEW)
    drawn(*words, "--output", folder / "out")
    before = check_whole(folder / "out", 1)
    drawn(*words, "--output", folder / "out")
    Image.open(folder / "b.png").rotate(180).save(folder / "b.png")
    check_refused(folder, "belongs to another run, whose prompts is", *words)
    assert check_whole(folder / "out", 1) == before


def test_one_that_changes_while_others_are_drawn(
    demo_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error in the table, and what is drawn is never of another picture than was planned."""
    rows = [
        {"prompt": p, "image": i, "vary": 1}
        for p, i in zip(PROMPTS, ("b.png", "in/a.png", "b.png"), strict=True)
    ]
    file = written(folder / "rows.jsonl", rows)

    def planned(*arguments: Any, **options: Any) -> Any:
        plan = make_plan(*arguments, **options)
        Image.open(folder / "b.png").rotate(180).save(folder / "b.png")
        return plan

    monkeypatch.setattr("hart_runtime.batch.plan.make_plan", planned)
    done = drawn(file, "--engine", demo_bundle, "--output", folder / "out", *FEW)
    assert "2 of 3 pictures have an error in the table" in done.stderr
    errors = [row["error"] for row in table(folder / "out")]
    assert errors[1] is None
    assert all(str(error).startswith("image: is another picture than the one") for error in errors[::2])


BAD = [
    ({"image": "none.png", "vary": 1}, "none.png': cannot be read (No such file"),
    ({"image": "rows.jsonl", "vary": 1}, "is no picture in one of the formats"),
    ({"image": "b.png"}, "image: nothing is said of what to draw"),
    ({"image": "b.png", "mask": "in/mask.png"}, "mask: expected the picture's size, 50 x 64, found 64 x 64"),
    ({"image": "b.png", "vary": 9}, "vary: expected 1 to 4"),
    ({"image": "b.png", "vary": "two"}, "vary: expected 1 to 4"),
    ({"image": "b.png", "outpaint": "1,2"}, "outpaint='1,2': expected pixels to the left"),
    ({"image": "b.png", "outpaint": [1, 2, 3]}, "outpaint: expected four numbers"),
    ({"image": "b.png", "vary": 1, "fit": "bent"}, "fit='bent': expected one of cover, contain, stretch"),
    ({"image": "b.png", "vary": 1, "paste": 1}, "paste: expected True or False"),
    ({"image": 7, "vary": 1}, "image: expected a path, found 7"),
    ({"mask": "in/mask.png"}, "mask: there is no picture; give one with image"),
    ({"strength": 1}, "unknown strength; there are"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_bad_rows_are_refused(manifest: Manifest, folder: Path, row: dict[str, Any], said: str) -> None:
    file = written(folder / "rows.jsonl", [{"prompt": "a star"}, {"prompt": "a ring", **row}])
    with pytest.raises(InputError, match=f"row 1: .*{re.escape(said)}") as caught:
        make_plan(read_rows(file), file, manifest)
    assert "`" not in str(caught.value)


def test_what_refuses_a_row_draws_nothing(
    demo_bundle: Path, manifest: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(folder / "rows.jsonl", [{"prompt": "a star"}, {"prompt": "a ring", "image": "none.png"}])
    check_refused(folder, "row 1: image=", file, "--engine", demo_bundle)
    graphs = {name: spec for name, spec in manifest.graphs.items() if name != ENCODER}
    written(file, [{"prompt": "a star", "image": "b.png", "vary": 1}])
    from hart_runtime.runtime import bundle

    real = bundle.open_bundle

    def without(*arguments: Any, **options: Any) -> Any:
        opened = real(*arguments, **options)
        return replace(opened, manifest=replace(opened.manifest, graphs=graphs))

    monkeypatch.setattr(bundle, "open_bundle", without)
    check_refused(folder, "this bundle takes no pictures, it has no encoder", file, "--engine", demo_bundle)


def test_classes(var_bundle: Path, folder: Path) -> None:
    rows = [{"label": label, "image": "b.png", "vary": 1} for label in ("none", "2")]
    file = written(folder / "rows.jsonl", rows)
    done = batch(file, "--engine", var_bundle, "--output", folder / "out")
    assert done.exit_code == 0, done.output
    for number, label in enumerate(("none", "2")):
        options = ("--image", folder / "b.png", "--vary", 1, "--seed", number)
        assert check_whole(folder / "out", 2)[number] == hart_run(var_bundle, folder, label, *options)
