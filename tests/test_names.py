"""Names that there are not are refused everywhere, in the caller's own words, with what there is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from hart_runtime import InputError, Pipeline, SamplingSettings
from hart_runtime.bench.cli import main as bench
from hart_runtime.bench.measure import Task, measure
from hart_runtime.common.checkpoint import SAMPLING_FILE, find_checkpoint
from hart_runtime.common.console import command, in_options, sampling_options
from hart_runtime.common.errors import InputError as SameError
from hart_runtime.common.errors import one_of, parameter
from hart_runtime.common.settings import LIMITS, Overrides, check_ranges, settings_of
from hart_runtime.compare.cli import main as compare
from hart_runtime.compare.rehearsal import main as rehearsal
from hart_runtime.export.cli import main as export
from hart_runtime.export.request import Request
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.random_checkpoint import read_shape, write_random_checkpoint
from hart_runtime.runtime.backends.names import DEVICES
from hart_runtime.runtime.backends.registry import BACKENDS
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.families.hart import NAME, describe_model
from hart_runtime.runtime.manifest import manifest_of
from hart_runtime.runtime.png import Origin, read_origin, save_png
from hart_runtime.runtime.tensorrt.cli import choose_package, parse_capabilities
from hart_runtime.runtime.tensorrt.cli import main as build
from hart_runtime.runtime.tensorrt.package import import_package

PROMPT = "a red circle on a white background"
COMMANDS = {"run": run, "export": export, "build": build, "compare": compare, "bench": bench}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"device": name}, (f"`device='{name}'`", *DEVICES)) for name in ("gpu", "CUDA", "cuda-0", "")),
        *(({"backend": n}, (f"`backend='{n}'`", *BACKENDS)) for n in ("tensorrt_rtx", "trt", "onnx", "ONNX")),
        ({"backend": "onnx"}, ("did you mean onnxruntime?",)),
        ({"backend": "tensorrt_rtx"}, ("did you mean tensorrt-rtx?",)),
        ({"device": "Cuda"}, ("did you mean cuda?",)),
    ],
)
def test_devices_and_backends(demo_bundle: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        Pipeline.load(demo_bundle, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": 3}, ("unknown guidance_scale", "guidance, top_k, top_p", "is guidance here")),
        ({"num_inference_steps": 3}, ("unknown num_inference_steps", "steps")),
        ({"topk": 3}, ("unknown topk", "did you mean top_k?")),
        ({"seed": [1, 2]}, ("`seed`: expected 0 to ", "[1, 2]")),
        ({"seed": True}, ("`seed`", "True")),
        ({"batch": 100}, ("`batch`: expected 1 to 8", "100")),
        ({"num_images": "2"}, ("`num_images`", "'2'")),
        ({"guidance": "high"}, ("`guidance`: expected a number", "'high'")),
        ({"smooth": 1}, ("`smooth`: expected True or False",)),
        ({"top_k": 2.5}, ("`top_k`: expected a whole number or None",)),
        ({"steps": 0}, ("steps",)),
    ],
)
def test_options_of_a_call(demo: Pipeline, options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        demo(PROMPT, **options)
    for word in words:
        assert word in str(caught.value)
    assert "--" not in str(caught.value)


def test_words_of_a_prompt_are_nobodys_options(demo_bundle: Path, tmp_path: Path) -> None:
    prompt = f"{PROMPT} and then a lot of words `seed` `device='cpu'` that do not fit"
    done = CliRunner().invoke(
        run, ["--engine", str(demo_bundle), prompt, "--output", str(tmp_path / "x.png")]
    )
    assert done.exit_code == 0, done.output
    assert "cut off: " in done.stderr
    assert "seed`" in done.stderr
    assert "--seed" not in done.stderr


@pytest.mark.parametrize("prompts", [7, None, [7], [PROMPT, None]])
def test_prompts_that_are_no_text(demo: Pipeline, prompts: Any) -> None:
    with pytest.raises(InputError, match=r"expected (a )?text"):
        demo(prompts)


def test_precisions_dtypes_shapes_and_references(tmp_path: Path, demo_bundle: Path) -> None:
    found = find_checkpoint(DEMO_CHECKPOINT)
    shape, new = read_shape("mid-256px"), tmp_path / "x"
    model = describe_model(shape.llm, shape.tokenizer, shape.llm.patch_nums)
    (strange := tmp_path / "strange.json").write_text(json.dumps({"llm": {}, "tokenizer": {}, "top_k": 3}))
    calls: list[tuple[Callable[[], object], str]] = [
        (Request(found, "bf16").check, "`precision='bf16'`: expected one of fp32, fp16, int8"),
        (Request(found, "FP16").check, "did you mean fp16?"),
        (Request(found, "fp16", max_batch=0).check, "`max_batch`: expected 1 to 64, found 0"),
        (lambda: write_random_checkpoint(shape, new, dtype="int8"), "`dtype='int8'`: expected fp32 or fp16"),
        (lambda: write_random_checkpoint(shape, new, text_encoder="big"), "`text_encoder='big'`: expected"),
        (lambda: read_shape(str(strange)), "strange.json: unknown top_k; there are llm, tokenizer"),
        (
            lambda: read_shape("mid-256"),
            "`shape='mid-256'`: expected hart-0.7b-1024px or mar-base-256px or ",
        ),
        (lambda: measure(Task(demo_bundle, against=("torch",)), lambda _: None), "`against='torch'`"),
        (lambda: import_package("trt"), "`backend='trt'`: expected tensorrt or tensorrt-rtx"),
        (lambda: choose_package("onnx"), "`backend='onnx'`: expected tensorrt or tensorrt-rtx"),
        (lambda: manifest_of(NAME, model, "bf16"), "`precision='bf16'`: expected one of fp32"),
        (lambda: parse_capabilities("8.6,sm89"), "`compute_capabilities`: expected numbers such as 8.6,8.9"),
    ]
    for call, words in calls:
        with pytest.raises(InputError, match=re.escape(words)):
            call()
    assert list(tmp_path.iterdir()) == [strange]


@pytest.mark.parametrize(
    ("command_name", "arguments"),
    [
        *((name, ["--backend", "onnx"]) for name in COMMANDS),
        *((name, ["--device", "gpu"]) for name in ("run", "compare", "bench")),
        ("export", ["--precision", "int4"]),
        ("compare", ["--layers", "nonsense"]),
        ("bench", ["--against", "torch"]),
    ],
)
def test_on_the_command_line(
    command_name: str, arguments: list[str], demo_bundle: Path, tmp_path: Path
) -> None:
    place = [] if command_name == "export" else ["--engine", str(demo_bundle)]
    prompt = [PROMPT] if command_name == "run" else []
    with CliRunner().isolated_filesystem(tmp_path) as here:
        done = CliRunner().invoke(COMMANDS[command_name], [*prompt, *place, *arguments])
        assert list(Path(here).iterdir()) == []
    assert done.exit_code == 2
    assert arguments[0] in done.stderr
    assert arguments[1] in done.stderr
    assert "Traceback" not in done.output


def backend_choice(command: click.Command) -> click.Choice[str]:
    (option,) = (p for p in command.params if p.name in ("backend", "backends"))
    assert isinstance(option.type, click.Choice)
    return option.type


def test_one_vocabulary_of_backends() -> None:
    choices = {name: set(backend_choice(command).choices) for name, command in COMMANDS.items()}
    assert choices["run"] == choices["bench"] == choices["export"] == set(BACKENDS)
    assert choices["build"] < set(BACKENDS)
    assert choices["compare"] - set(BACKENDS) == {"torch-fp16"}


def test_steps_of_the_rehearsal(tmp_path: Path) -> None:
    done = CliRunner().invoke(rehearsal, ["--folder", str(tmp_path / "x"), "--only", "export fp64"])
    assert done.exit_code == 2
    assert "--only 'export fp64': expected one of checkpoint, export fp32" in done.stderr
    assert not (tmp_path / "x").exists()


def test_settings_in_files(tmp_path: Path) -> None:
    root = Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint"))
    (root / SAMPLING_FILE).write_text(json.dumps({"cfg": 3.0}))
    with pytest.raises(InputError, match=r"sampling\.json: unknown cfg; there are guidance, top_k"):
        _ = find_checkpoint(root).sampling
    (root / SAMPLING_FILE).write_text(json.dumps({"top_p": "0.9"}))
    with pytest.raises(InputError, match=r"sampling\.json: top_p: expected a number, found '0\.9'"):
        _ = find_checkpoint(root).sampling
    picture = tmp_path / "x.png"
    save_png(Image.new("RGB", (2, 2)), picture, Origin("p", 1, SamplingSettings(), "b", "i"))
    carried = json.loads(Image.open(picture).info["hart"])
    assert carried["settings"] == asdict(SamplingSettings())
    assert read_origin(picture).settings == SamplingSettings()


def test_every_setting_is_declared_once() -> None:
    """Its field is all: checks, options and what a PNG carries follow; the typed names of a call agree."""
    names = [f.name for f in fields(SamplingSettings)]
    assert list(LIMITS) == names == list(Overrides.__annotations__)
    hints, called = get_type_hints(SamplingSettings), get_type_hints(Overrides)
    for name in names:
        assert called[name] in (hints[name] | None, hints[name] | int | None)
    options = {p.name for p in run.params}
    assert set(names) < options
    for name, limits in LIMITS.items():
        (option,) = (p for p in run.params if p.name == name)
        assert isinstance(option, click.Option)
        assert option.help is not None
        assert option.help.startswith(limits.help)
    assert settings_of({"steps": 4}, "x").steps == "4"

    class Sizes:
        vocab_size = 10
        num_scales = 5

    check_ranges(SamplingSettings(top_k=10), Sizes)
    with pytest.raises(InputError, match="`top_k`: expected 1 to 10, found 11"):
        check_ranges(SamplingSettings(top_k=11), Sizes)


@pytest.mark.parametrize(
    "given",
    [
        *([f"--{name.replace('_', '-')}", "1"] for name in ("guidance", "top_k", "top_p", "steps", "seed")),
        *([f"--{name}"] for name in ("smooth", "no-smooth", "residual", "no-residual")),
        ["--num-images", "1"],
        ["another prompt"],
        ["--prompts-file", "prompts.txt"],
    ],
)
def test_nothing_that_decides_a_picture_stands_beside_an_image(
    demo_bundle: Path, tmp_path: Path, given: list[str]
) -> None:
    """Every option is refused unless it is known to leave the picture as it is."""
    image = tmp_path / "x.png"
    save_png(Image.new("RGB", (2, 2)), image, Origin("p", 1, SamplingSettings(), "b", "i"))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [str(tmp_path / part) if part.endswith(".txt") else part for part in given]
    done = CliRunner().invoke(run, ["--engine", str(demo_bundle), "--from-image", str(image), *given])
    assert done.exit_code == 2
    assert "--from-image brings its own prompt, seed and settings, found" in done.stderr


def test_a_new_setting_is_refused_beside_an_image_without_being_told(tmp_path: Path) -> None:
    """What ``--from-image`` ignored in silence before: an option that nobody listed."""
    kept = run.params
    image = tmp_path / "x.png"
    save_png(Image.new("RGB", (2, 2)), image, Origin("p", 1, SamplingSettings(), "b", "i"))
    try:
        run.params = [*kept, click.Option(["--gain"], type=float)]
        done = CliRunner().invoke(run, ["--engine", "none", "--from-image", str(image), "--gain", "2"])
    finally:
        run.params = kept
    assert done.exit_code == 2
    assert "found --gain beside it" in done.stderr


def test_messages_are_in_the_words_of_the_caller() -> None:
    assert InputError is SameError
    values = {"top_k": 7, "force": True, "residual": False, "bundle": Path("a b"), "as_json": "x"}
    said = ", ".join(parameter(name, value) for name, value in values.items())
    said += " `smooth`, `precision=FILE`, `checkpoint`, `x`y, `other`, `extent`"
    told: list[str] = []

    @command(words={"extent": "--size"})
    @click.argument("checkpoint")
    @click.option("--engine", "bundle")
    @click.option("--json", "as_json")
    @click.option("--force", is_flag=True)
    @sampling_options("the bundle's")
    def main(**_: object) -> None:
        told.append(in_options(said))
        one_of("bundle", "x", ["a", "b"])

    done = CliRunner().invoke(main, ["c"])
    assert told == [
        "--top-k 7, --force, --no-residual, --engine 'a b', --json x "
        "--smooth, --precision FILE, CHECKPOINT, `x`y, `other`, --size"
    ]
    assert done.exit_code == 2
    assert done.stderr == "error: --engine x: expected a or b\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_version(name: str) -> None:
    import hart_runtime

    done = CliRunner().invoke(COMMANDS[name], ["--version"])
    assert (done.exit_code, done.stdout.split()[-1]) == (0, hart_runtime.__version__)


def test_forgotten_quotes_are_told_of(demo_bundle: Path, tmp_path: Path) -> None:
    words = ["--engine", demo_bundle, "--output", tmp_path / "x.png", "--batch", "3"]
    done = CliRunner().invoke(run, ["a", "red", "circle", *map(str, words)])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("each word is a prompt of its own ('a', 'red', 'circle')") == 1
    done = CliRunner().invoke(run, ["a red circle", "star", *map(str, words)])
    assert "needs quotes" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_word_is_no_place(name: str, tmp_path: Path) -> None:
    """As of a variable that is not set: neither the demo nor the folder we are in is meant."""
    with CliRunner().isolated_filesystem(tmp_path) as here:
        given = ["", "--backend", "onnxruntime"] if name == "export" else ["--engine", ""]
        done = CliRunner().invoke(COMMANDS[name], [*([PROMPT] if name == "run" else []), *given])
        assert list(Path(here).iterdir()) == []
    assert done.exit_code == 2
    assert "empty" in done.stderr
