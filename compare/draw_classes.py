"""Pictures of every class, as many of each, to measure a distance on.

``python -m hart_runtime.compare.draw_classes --engine BUNDLE --output FOLDER --preset fid``. Every picture
has a seed of its own, which its class and its number in it decide: pictures depend neither on their batch
nor on how many there are. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.console import PATH, WORD, command
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.options import backend_option, bundle_option, device_option, threads_option

if TYPE_CHECKING:
    from hart_runtime.runtime.png import Origin

MOST_OF_EACH = 10_000


def place(folder: Path, label: int, number: int) -> Path:
    """Where the picture of a class lies that has this number in it."""
    return folder / f"{label:04}" / f"{number:04}.png"


def _is_there(path: Path, wanted: Origin) -> bool:
    """Whether a picture was drawn before; raises InputError if another lies in its place."""
    from hart_runtime.runtime.png import read_origin

    if not path.exists():
        return False
    found = read_origin(path)
    for what in ("identity", "prompt", "seed", "settings"):
        if getattr(found, what) != getattr(wanted, what):
            raise InputError(
                f"{path}: is another picture than asked for, its {what} is {getattr(found, what)!r} and not "
                f"{getattr(wanted, what)!r}; give another `output`"
            )
    return True


@command()
@bundle_option
@click.option("--output", required=True, type=PATH, help="Folder, which gets a folder for each class.")
@click.option("--each", type=click.IntRange(1, MOST_OF_EACH), default=50, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True, help="Of the first one.")
@click.option("--preset", type=WORD, help="Settings by a name, such as VAR's fid. [default: the bundle's]")
@device_option
@backend_option
@threads_option
def main(
    bundle: Path,
    output: Path,
    each: int,
    seed: int,
    preset: str | None,
    device: str,
    backend: str,
    threads: int | None,
) -> None:
    """Draw EACH pictures of every class; what is there already is not drawn again."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from hart_runtime.runtime.backends.registry import open_backend
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.call import checked_settings
    from hart_runtime.runtime.class_names import ClassNames
    from hart_runtime.runtime.pipeline import Pipeline
    from hart_runtime.runtime.png import Origin, PngWriter, means

    opened = open_bundle(bundle)
    manifest, count = opened.manifest, opened.manifest.model.num_classes
    if not count:
        raise InputError(f"{bundle}: draws texts and has no classes")
    words = [ClassNames.of(opened).words(label) for label in range(count)]
    settings = checked_settings(manifest, words, seed, each, preset=preset)
    pipeline = Pipeline(opened, open_backend(opened, device, threads, backend), threads)
    drawn_with = means(pipeline.backend)

    def origin(word: str, number: int) -> Origin:
        return Origin(word, number, settings, manifest.name, opened.identity, drawn_with=drawn_with)

    todo: list[tuple[Path, Origin]] = []
    for label, word in enumerate(words):
        for number in range(each):
            wanted, path = origin(word, seed + number * count + label), place(output, label, number)
            if not _is_there(path, wanted):
                todo.append((path, wanted))
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, PngWriter() as files:
        task = bar.add_task("pictures", total=count * each, completed=count * each - len(todo))
        places = iter(todo)
        for result in pipeline.jobs([(wanted.prompt, wanted.seed) for _, wanted in todo], settings):
            for image, (path, wanted) in zip(result.images, places, strict=False):
                path.parent.mkdir(parents=True, exist_ok=True)
                files.save(image, path, wanted)
            bar.advance(task, len(result.images))
    click.echo(f"{output}: {count} classes, {each} pictures of each, {len(todo)} drawn now")


if __name__ == "__main__":
    main()
