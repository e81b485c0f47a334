"""What every command and option does with a bundle or a checkpoint of each family: works, or says why not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hart_runtime.batch.cli import main as batch
from hart_runtime.bench.cli import main as bench
from hart_runtime.common.checkpoint import CLASS_NAMES
from hart_runtime.compare.cli import main as compare
from hart_runtime.compare.recorded import recorded_names
from hart_runtime.export.cli import main as export
from hart_runtime.hart.demo import CLASS_DEMO, DEMO_CHECKPOINT
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.manifest import NOT_PRUNED, manifest_of
from hart_runtime.runtime.memory.plan import make_plan
from hart_runtime.runtime.spec import ModelSpec, check_model
from hart_runtime.runtime.tensorrt.cli import main as build
from hart_runtime.runtime.tensorrt.profiles import make_profiles
from hart_runtime.serve.cli import main as serve

COMMANDS = {
    "run": run,
    "export": export,
    "build": build,
    "compare": compare,
    "bench": bench,
    "serve": serve,
    "batch": batch,
}
HART, VAR, CLASS_HART, MAR = ALL = "hart", "var", "class-hart", "mar"


@dataclass(frozen=True)
class Cell:
    """An option, with words behind it where it is tried, and what is said where a family has not got it."""

    words: tuple[str, ...] = ()
    hart: str | None = None
    var: str | None = None
    class_hart: str | None = None
    mar: str | None = None

    def said(self, family: str) -> str | None:
        return {HART: self.hart, VAR: self.var, CLASS_HART: self.class_hart, MAR: self.mar}[family]


NO_RESIDUAL = "this model has no residual, its image tokenizer is discrete"
NO_TEXT, NO_TEXT_ENCODER = "reads texts, and", "draws classes and has no text encoder"
NO_PROMPT, OURS = "this checkpoint draws classes", "HART's lies in tokenizer/, beside llm/"
ONE_SIZE = "belong to its scales and draw 64 pixels alone"
NO_PRESET, NO_AVERAGE = "this model has none", "expected averaged weights"
NO_CODES, NO_SCALES = "this model draws continuous tokens", "this model has no scales"
NOT_MASKED, NO_HEADS = "this model draws whole scales", "only MAR's files do not tell how many there are"
NO_PICTURES, NO_FILE = "this bundle takes no pictures", "there is no such file in"
ALIKE = Cell()
"""Whatever is drawn, it is the same: the tests of the command have it."""
PICTURE = Cell(mar=NO_PICTURES)
"""The same of what is done with a picture."""


def of_masked(*words: str) -> Cell:
    """Of models that draw masked tokens alone."""
    return Cell(words, hart=NOT_MASKED, var=NOT_MASKED, class_hart=NOT_MASKED)


RUN: dict[str, Cell] = {
    "prompts": ALIKE,
    "--engine": ALIKE,
    "--label": Cell(("--label", "2"), hart="draws texts and has no classes; give a PROMPT"),
    "--prompts-file": Cell(("--prompts-file", "FILE")),
    "--from-image": ALIKE,
    "--image": PICTURE,
    "--mask": PICTURE,
    "--outpaint": Cell(("--outpaint", "0,0,8,0", "--image", "PICTURE"), mar=NO_PICTURES),
    "--vary": Cell(("--vary", "1", "--image", "PICTURE"), mar=NO_PICTURES),
    "--anew": Cell(("--anew", "1", "--outpaint", "8,0,0,0", "--image", "PICTURE"), mar=NO_PICTURES),
    "--fit": Cell(("--fit", "contain", "--vary", "1", "--image", "PICTURE"), mar=NO_PICTURES),
    "--paste": Cell(("--no-paste", "--outpaint", "8,0,0,0", "--image", "PICTURE"), mar=NO_PICTURES),
    "--reconstruct": PICTURE,
    "--num-images": Cell(("--num-images", "2")),
    "--seed": Cell(("--seed", "5")),
    "--preset": Cell(("--preset", "fid"), hart=NO_PRESET, class_hart=NO_PRESET),
    "--guidance": Cell(("--guidance", "2")),
    "--top-k": Cell(("--top-k", "9"), mar=NO_CODES),
    "--top-p": Cell(("--top-p", "0.5"), mar=NO_CODES),
    "--smooth": Cell(("--smooth",), mar=NO_CODES),
    "--residual": Cell(("--residual",), var=NO_RESIDUAL, mar="there is no residual behind them"),
    "--steps": Cell(("--steps", "2"), var=NO_RESIDUAL),
    "--prune": Cell(("--prune",), var=NOT_PRUNED, class_hart=NOT_PRUNED, mar=NO_SCALES),
    "--keep": Cell(("--keep", "1,0.5"), var=NOT_PRUNED, class_hart=NOT_PRUNED, mar=NO_SCALES),
    "--unguided-scales": Cell(("--unguided-scales", "1"), mar=NO_SCALES),
    "--iterations": of_masked("--iterations", "3"),
    "--guidance-schedule": of_masked("--guidance-schedule", "constant"),
    "--temperature": of_masked("--temperature", "0.5"),
    "--speed": Cell(("--speed", "fast")),
    "--size": ALIKE,
    "--batch": Cell(("--batch", "1")),
    "--output": ALIKE,
    "--device": ALIKE,
    "--backend": Cell(("--backend", "onnxruntime")),
    "--strict": Cell(("--strict",)),
    "--tf32": Cell(("--tf32",)),
    "--safety-model": Cell(var=NO_TEXT, class_hart=NO_TEXT, mar=NO_TEXT),
    "--threads": Cell(("--threads", "1")),
    "--json": Cell(("--json",)),
}
EXPORT: dict[str, Cell] = {
    "checkpoint": ALIKE,
    "--precision": Cell(("--precision", "int8")),
    "--text-encoder": Cell(
        ("--text-encoder", "TEXT"),
        var=NO_TEXT_ENCODER,
        class_hart=NO_TEXT_ENCODER,
        mar=NO_TEXT_ENCODER,
    ),
    "--system-prompt": Cell(("--system-prompt", "none"), var=NO_PROMPT, class_hart=NO_PROMPT, mar=NO_PROMPT),
    "--revision": Cell(("--revision", "main"), *4 * ("only hub ids have revisions",)),
    "--file": Cell(("--file", "var_d2.pth"), hart=NO_FILE, class_hart=NO_FILE, mar=NO_FILE),
    "--tokenizer": Cell(
        ("--tokenizer", "TOKENIZER"), hart=OURS, class_hart=OURS, mar="expected MAR's image tokenizer"
    ),
    "--heads": Cell(("--heads", "4,2"), hart=NO_HEADS, var=NO_HEADS, class_hart=NO_HEADS),
    "--class-names": Cell(("--class-names", "NAMES"), hart="this checkpoint draws texts and has no classes"),
    "--demo": Cell(("--demo", "classes"), *4 * ("found a CHECKPOINT beside it; give one of them",)),
    "--output": ALIKE,
    "--max-batch": Cell(("--max-batch", "2")),
    "--size": Cell(
        ("--size", "16"),
        var="expected a multiple of 2 from 4 to 6",
        class_hart=ONE_SIZE,
        mar="expected a multiple of 2 from 4 to 8",
    ),
    "--ema": Cell(
        ("--ema",), hart=NO_AVERAGE, var="VAR's files hold one set of weights", class_hart=NO_AVERAGE
    ),
    "--encoder": Cell(("--no-encoder",)),
    "--backend": ALIKE,
    "--force": Cell(("--force",)),
    "--dry-run": ALIKE,
    "--check": ALIKE,
    "--report": ALIKE,
}


def all_of(options: str, cell: Cell = ALIKE) -> dict[str, Cell]:
    return dict.fromkeys(options.split(), cell)


BUILD = all_of(
    "--engine --backend --batch --scales --compute-capability --workspace --top-k --tf32 --force --dry-run"
) | {"--keep": Cell(("--keep", "0.5,0.25"), var=NOT_PRUNED, class_hart=NOT_PRUNED, mar=NO_SCALES)}
COMPARE = all_of(
    "--engine --checkpoint --device --backend --prompts-file --num-prompts --reference --save-reference"
    " --speed --factor --layers --output"
) | {
    "--text-encoder": Cell(
        ("--text-encoder", "TEXT"),
        var=NO_TEXT_ENCODER,
        class_hart=NO_TEXT_ENCODER,
        mar=NO_TEXT_ENCODER,
    ),
    "--tokenizer": Cell(("--tokenizer", "TOKENIZER"), hart=OURS, class_hart=OURS),
}
BENCH = all_of(
    "--engine --device --backend --size --batch --iterations --warmup --threads --against --checkpoint"
    " --sustained --output"
)
SERVE = all_of(
    "--engine --host --port --device --workers --backend --threads --max-loaded --queue --timeout --grace"
    " --api-key-file --insecure --allow-origin --root-path --log-prompts"
) | {"--safety-model": Cell(var=NO_TEXT, class_hart=NO_TEXT, mar=NO_TEXT)}
BATCH = all_of(
    "prompts --engine --output --seed --count --preset --guidance --top-k --top-p --smooth --residual --steps"
    " --prune --keep --unguided-scales --iterations --guidance-schedule --temperature"
    " --speed --size --batch --shards --device --backend --threads"
    " --safety-model --ray --actors --cpus --encoders --push"
)
TABLE = {
    "run": RUN,
    "export": EXPORT,
    "build": BUILD,
    "compare": COMPARE,
    "bench": BENCH,
    "serve": SERVE,
    "batch": BATCH,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_is_whole(name: str) -> None:
    """An option more is a row more."""
    options = {max(option.opts, key=len) for option in COMMANDS[name].params} - {"--version"}
    assert options == TABLE[name].keys()


@pytest.fixture
def places(
    demo_bundle: Path,
    var_bundle: Path,
    class_bundle: Path,
    mar_bundle: Path,
    var_model: Path,
    mar_model: Path,
    tmp_path: Path,
) -> dict[str, dict[str, str]]:
    """What stands for a family's own files."""
    tokenizer = next(var_model.glob("vae_*"))
    found = {}
    names = var_model.parent / "names.txt"
    for family, bundle, checkpoint, asked, named in (
        (HART, demo_bundle, DEMO_CHECKPOINT, "a red circle", names),
        (VAR, var_bundle, var_model, "2", names),
        (CLASS_HART, class_bundle, CLASS_DEMO, "red circle", CLASS_DEMO / CLASS_NAMES),
        (MAR, mar_bundle, mar_model, "2", names),
    ):
        (tmp_path / f"{family}.txt").write_text(f"{asked}\n")
        Image.new("RGB", (48, 32), "red").save(tmp_path / "picture.png")
        found[family] = {
            "BUNDLE": str(bundle),
            "CHECKPOINT": str(checkpoint),
            "ASKED": asked,
            "FILE": str(tmp_path / f"{family}.txt"),
            "TEXT": str(DEMO_CHECKPOINT / "text_encoder"),
            "TOKENIZER": str(tokenizer),
            "NAMES": str(named),
            "OUT": str(tmp_path / "out.png"),
            "PICTURE": str(tmp_path / "picture.png"),
            "FOLDER": str(tmp_path / "folder"),
        }
    return found


BASES = {
    "run": ("--engine", "BUNDLE", "--device", "cpu", "--output", "OUT", "ASKED"),
    "export": ("CHECKPOINT", "--dry-run", "--output", "FOLDER", "--backend", "onnxruntime"),
    "build": ("--engine", "BUNDLE", "--dry-run"),
    "compare": ("--engine", "BUNDLE", "--checkpoint", "CHECKPOINT", "--output", "FOLDER"),
}
TRIED = [
    (name, option, family)
    for name, cells in TABLE.items()
    for option, cell in cells.items()
    for family in ALL
    if cell.words and (name != "compare" or cell.said(family))
]


@pytest.mark.parametrize(("name", "option", "family"), TRIED)
def test_a_cell(places: dict[str, dict[str, str]], name: str, option: str, family: str) -> None:
    cell = TABLE[name][option]
    heads = ("--heads", "4,2") if (name, family) == ("export", MAR) else ()  # no tensor tells
    done = called(COMMANDS[name], (*BASES[name], *heads, *cell.words), places[family])
    words = cell.said(family)
    if words is None:
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("family", ALL)
def test_the_help_of_a_bundle_is_without_what_it_has_not(
    places: dict[str, dict[str, str]], family: str
) -> None:
    helps = [
        called(run, words, places[family]).output
        for words in (("--engine", "BUNDLE", "--help"), ("--help",), ("--engine", "FOLDER", "--help"))
    ]
    for option, cell in RUN.items():
        if option.startswith("--"):
            shown = [f"{option} " in text or f"{option}/" in text for text in helps]
            assert shown == [cell.said(family) is None, True, True], option


def called(command: click.Command, words: tuple[str, ...], places: dict[str, str]) -> Result:
    return CliRunner().invoke(command, [places.get(word, word) for word in words])


def test_a_family_is_a_combination() -> None:
    """Classes with a hybrid tokenizer: contract, program, plan and profiles follow from the two halves."""
    both = FAMILIES[CLASS_HART]
    assert both.graphs.keys() == FAMILIES[HART].graphs.keys() - {"text_encoder", "unconditional"}
    assert both.lacks.keys() == {"iterations", "guidance_schedule", "temperature"}
    model = ModelSpec((1, 2, 3), 2, 24, 2, 700, 4, 48, diff_width=8, num_classes=5)
    check_model(model, both.own, "model")
    manifest = manifest_of(CLASS_HART, model)
    program = manifest.program(replace(manifest.sampling, steps="3"), 2)
    graphs = [each.graph for each in program.runs()]
    assert graphs.count("residual_step") == 3
    assert make_plan(program).nbytes > 0
    assert len(make_profiles(manifest, "transformer", (1, 2), per_scale=True)) == 3
    assert {"final.diff.embedded", "cond", "modulations"} <= recorded_names(manifest, manifest.sampling)
