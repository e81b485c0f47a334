"""Values that cannot be meant are refused before anything runs, wherever they stand."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hart_runtime import InputError, Pipeline, SamplingSettings
from hart_runtime.bench.cli import main as bench
from hart_runtime.common.checkpoint import SAMPLING_FILE
from hart_runtime.compare.cli import main as compare
from hart_runtime.export.cli import main as export
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.call import MAX_SEED
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.png import Origin, read_origin, save_png
from hart_runtime.runtime.tensorrt.build import parse_range
from hart_runtime.runtime.tensorrt.cli import main as build
from hart_runtime.runtime.tensorrt.cli import parse_capabilities

PROMPT = "a red circle on a white background"
COMMANDS = {"run": run, "export": export, "build": build, "compare": compare, "bench": bench}


def test_numbers_of_numpy_are_numbers(demo: Pipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"guidance": np.float32(2.5), "top_k": np.int64(9), "steps": np.int32(4)}
    drawn = demo.generate(PROMPT, seed=np.int64(3), num_images=np.int16(2), batch=np.uint8(1), **options)
    assert drawn.settings == SamplingSettings(
        2.5, 9, demo.bundle.manifest.sampling.top_p, steps="4", smooth=drawn.settings.smooth
    )
    assert drawn.seeds == [3, 4]
    save_png(drawn.images[0], tmp_path / "x.png", Origin("p", drawn.seeds[0], drawn.settings, "b", "i"))
    assert read_origin(tmp_path / "x.png").settings == drawn.settings


@pytest.mark.parametrize("width", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
def test_seeds_do_not_wrap_around(demo: Pipeline, width: type[np.integer[Any]]) -> None:
    """The last number of every type; of the widest, the last that two pictures can be drawn from."""
    last = min(int(np.iinfo(width).max), MAX_SEED - 1)
    drawn = demo.generate(PROMPT, seed=width(last), num_images=2, steps=2)  # type: ignore[arg-type]
    assert drawn.seeds == [last, last + 1]
    assert drawn.images[1].tobytes() == demo(PROMPT, seed=last + 1, steps=2)[0].tobytes()


@pytest.mark.parametrize("value", [1, 0, "yes", "False", None, 2.0, np.int8(1)])
@pytest.mark.parametrize("name", ["strict", "tf32", "previews"])
def test_words_are_no_switches(demo: Pipeline, name: str, value: Any) -> None:
    called: Any = Pipeline.load if name != "previews" else demo
    words = demo.bundle.folder if name != "previews" else PROMPT
    with pytest.raises(InputError, match=f"`{name}`: expected True or False, found"):
        called(words, **{name: value})


@pytest.mark.parametrize("name", ["seed", "num_images", "batch"])
@pytest.mark.parametrize("value", [0.5, 1.5, float("nan"), np.float32(1.5), "1", None, [1], np.array([1])])
def test_numbers_that_are_not_whole(demo: Pipeline, name: str, value: Any) -> None:
    if (name, value) == ("batch", None):
        return  # as many as fit
    with pytest.raises(InputError, match=f"`{name}`: expected"):
        demo(PROMPT, **{name: value})


def test_drawing_from_features(demo: Pipeline) -> None:
    """What bundles without a text encoder are drawn with: the same pictures as from the prompts."""
    features, mask = demo.encode([PROMPT, "a green ring"])
    features = np.asarray(demo.backend.to_host(features))
    drawn = demo.from_features(features, mask, seed=3, guidance=2.0, steps=3)
    assert drawn.seeds == [3, 4]
    for prompt, seed, image in zip([PROMPT, "a green ring"], drawn.seeds, drawn.images, strict=True):
        assert demo(prompt, seed=seed, guidance=2.0, steps=3)[0].tobytes() == image.tobytes()
    wrong: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "`features`: expected (B, 16, 128)": (features[:, :5], mask, {}),
        "and a mask (B, 16)": (features, mask[:1], {}),
        "`features`: hold NaN": (features * np.nan, mask, {}),
        "`features`: expected 1 to 8 rows": (np.tile(features, (5, 1, 1)), np.tile(mask, (5, 1)), {}),
        "unknown num_images; there are guidance": (features, mask, {"num_images": 2}),
        "unknown batch": (features, mask, {"batch": 1}),
        "`top_k`: expected 1 to 512": (features, mask, {"top_k": 0}),
        "`seed`: expected": (features, mask, {"seed": -1}),
    }
    for words, (rows, padding, options) in wrong.items():
        with pytest.raises(InputError, match=re.escape(words)):
            demo.from_features(rows, padding, **options)


HUGE = 10**400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({name: HUGE}, f"`{name}`: expected")
            for name in ("seed", "num_images", "batch", "guidance", "top_k", "top_p")
        ),
        ({"seed": 10**5000}, "a number of thousands of digits"),
        ({"steps": "9" * 5000}, "`steps`: expected a number such as 8"),
        ({"seed": 2**63 - 1, "num_images": 2}, f"`seed`: expected 0 to {2**63 - 2}"),
        ({"manifest": 1}, "unknown manifest"),
        ({"callback": "x"}, "`callback`: expected a function"),
        ({"watch": "x"}, "`watch`: expected a function"),
        ({"threads": 1}, "unknown threads"),
    ],
)
def test_values_beyond_reason(demo: Pipeline, options: dict[str, Any], words: str) -> None:
    """Told at the call, before the first of the pictures is asked for."""
    with pytest.raises(InputError) as caught:
        demo.batches(PROMPT, **options)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("prompt", ["\ud800 a", "\udcff\U0001f600", "a\udc80", "\udfff"])
def test_prompts_that_are_no_unicode(demo: Pipeline, prompt: str) -> None:
    with pytest.raises(InputError, match="prompt 1 is not valid UTF-8"):
        demo(prompt)


@pytest.mark.parametrize("prompt", ["a\0", "\0 a", "a\0 \0b"])
def test_prompts_with_nul(demo: Pipeline, prompt: str) -> None:
    """Python can hold them; a file of prompts that does is refused too."""
    with pytest.raises(InputError, match="prompt 1 holds a NUL character"):
        demo(prompt)


@pytest.mark.parametrize("place", [None, 5, b"x", ["x"], True, "", "  "])
def test_places_that_are_none(place: Any) -> None:
    with pytest.raises(InputError, match="`bundle`: expected a path"):
        Pipeline.load(place)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2", float("nan"), [1], 2**31, HUGE])
def test_threads(demo_bundle: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="`threads`: expected"):
        Pipeline.load(demo_bundle, threads=threads)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("name", "option"), [("compare", "--factor"), ("build", "--workspace")])
def test_numbers_that_are_not_finite(demo_bundle: Path, name: str, option: str, value: str) -> None:
    done = CliRunner().invoke(COMMANDS[name], ["--engine", str(demo_bundle), option, value])
    assert done.exit_code == 2
    assert option in done.stderr


CAPABILITIES = [
    "8.\u00b2",
    "sm89",
    "8.",
    ".6",
    "8.6.1",
    "08.6",
    "8.60",
    "-8.6",
    "999.9",
    ",",
    "9" * 5000,
    "\uff18.6",
]
RANGES = ["1..", "..4", "1..2..3", "-1", "1.5", "1e1", "1_0", "\u0664", "", " ", "9" * 5000, "nan"]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_capabilities, text) for text in CAPABILITIES),
        *((functools.partial(parse_range, "`batches`"), text) for text in RANGES),
    ],
)
def test_words_that_are_no_numbers_of_a_build(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(InputError, match=r"^`(compute_capabilities|batches)`: expected ") as caught:
        parse(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": 100000}, "top_k: expected 1 to 512, found 100000"),
        ({"guidance": -3}, "guidance: expected 0 to 1000, found -3"),
        ({"guidance": float("nan")}, "not a readable JSON file (NaN is no number"),
        ({"steps": "x"}, "steps: expected a number such as 8"),
        ({"steps": 1}, "steps: the residual diffusion needs at least 2"),
        ({"smooth": "yes"}, "smooth: expected True or False"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_defaults_that_cannot_be_drawn_are_not_exported(
    tmp_path: Path, values: dict[str, Any], words: str, more: list[str]
) -> None:
    root = Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint"))
    (root / SAMPLING_FILE).write_text(json.dumps(values))
    done = CliRunner().invoke(export, [str(root), "--output", str(tmp_path / "x"), *more])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {root / SAMPLING_FILE}: {words}")
    assert "`" not in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7.9}, "seed 7.9"),
        ({"seed": True}, "seed True"),
        ({"seed": float("inf")}, "seed inf"),
        ({"prompt": None}, "prompt None"),
        ({"prompt": ["a"]}, "prompt ['a']"),
        ({"settings": {}}, "no guidance, residual, smooth, steps, top_k, top_p among its settings"),
        ({"settings": None}, "damaged"),
        ({"settings": {**asdict(SamplingSettings()), "gain": 2}}, "unknown gain"),
    ],
)
def test_a_damaged_record_draws_no_other_picture(
    demo_bundle: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    record = {**asdict(Origin("p", 1, SamplingSettings(), "b", "i")), **change}
    info = PngInfo()
    info.add_itxt("hart", json.dumps(record))
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=info)
    done = CliRunner().invoke(run, ["--engine", str(demo_bundle), "--from-image", str(tmp_path / "x.png")])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'x.png'}: its prompt and seed are damaged (")
    assert words in done.stderr


def test_a_record_out_of_range_blames_the_picture(demo_bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    identity = open_bundle(demo_bundle).identity
    save_png(Image.new("RGB", (2, 2)), image, Origin("p", 1, SamplingSettings(top_k=0), "b", identity))
    done = CliRunner().invoke(run, ["--engine", str(demo_bundle), "--from-image", str(image)])
    assert done.exit_code == 2
    assert done.stderr == f"error: {image}: top_k: expected 1 to 512, found 0\n"


def test_features_that_are_none(demo: Pipeline) -> None:
    features, mask = demo.encode([PROMPT])
    features = np.asarray(demo.backend.to_host(features))
    wrong: list[tuple[Any, Any]] = [
        *(
            (value, mask)
            for value in ("x", [[1], [1, 2]], features.astype(complex), features.astype(str), None)
        ),
        *((features, value) for value in ("x", [[True], [True, False]], mask.astype(str), mask * 2, None)),
    ]
    for given in wrong:
        with pytest.raises(InputError, match=r"`(features|mask)`"):
            demo.from_features(*given)
    demo.from_features(features.astype(np.float64).tolist(), mask.astype(int).tolist(), steps=2)
