"""``python -m tests.torture``: runs the campaigns and prints one table; exit code 1 if anything is bad."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from tests.torture.fuzz import SUBJECTS, fuzz
from tests.torture.ground import prepare
from tests.torture.kills import everything, kill
from tests.torture.outcomes import BAD, Trial, table
from tests.torture.places import places
from tests.torture.soak import soak

CAMPAIGNS = ("fuzz", "kills", "places", "soak")
SEED = 27


@click.command()
@click.option(
    "--trials", default=1000, show_default=True, help="Changed bundles, checkpoints, pictures, engines."
)
@click.option("--kills", default=100, show_default=True, help="Exports, builds and runs that are killed.")
@click.option("--pictures", default=2000, show_default=True, help="Of the soak.")
@click.option("--seed", default=SEED, show_default=True)
@click.option("--trial", type=int, help="Only this trial of the fuzzer; its files are kept.")
@click.option("--only", type=click.Choice(CAMPAIGNS), multiple=True, help="[default: all]")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle of the demo. [default: exported now]")
@click.option("--quick", is_flag=True, help="Without exports, and with a third of the places.")
@click.option("--workers", default=2, show_default=True)
def main(
    trials: int,
    kills: int,
    pictures: int,
    seed: int,
    trial: int | None,
    only: tuple[str, ...],
    bundle: Path | None,
    quick: bool,
    workers: int,
) -> None:
    """Try to break everything, and print how each trial ended."""
    console = Console(width=150)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    console.print(f"seed {seed}, files below {folder}")
    ground = prepare(folder, bundle)
    chosen = ("fuzz",) if trial is not None else only or CAMPAIGNS
    done: list[Trial] = []

    def campaigns() -> Iterator[Trial]:
        if "fuzz" in chosen:
            yield from fuzz(
                ground, seed, range(trials) if trial is None else [trial], workers, trial is not None
            )
        if "kills" in chosen:
            yield from kill(ground, everything(ground, kills, quick), seed, workers, pair=not quick)
        if "places" in chosen:
            yield from places(ground, workers, quick)
        if "soak" in chosen:
            yield from soak(ground, pictures, seed)

    start = time.monotonic()
    for found in campaigns():
        done.append(found)
        if found.outcome in BAD or trial is not None or found.campaign == "soak":
            fuzzed = found.campaign in (*SUBJECTS, "fuzz")
            again = f"  (again: --seed {seed} --trial {found.number})" if fuzzed else ""
            console.print(f"{found}{again}", markup=False, highlight=False)
    console.print(table(done, f"seed {seed}, {time.monotonic() - start:.0f} s"))
    bad = any(found.outcome in BAD for found in done)
    if not bad and trial is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
