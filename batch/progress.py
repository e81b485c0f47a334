"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from hart_runtime.batch.output import Finished

EVERY = 30.0
"""Seconds between two lines."""


class Rate:
    """How fast pictures come: counted from the first that came, before which everything was being opened."""

    def __init__(self) -> None:
        self.came = 0
        self._began = self._last = 0.0

    def add(self, pictures: int, now: float) -> None:
        if self._began:
            self.came += pictures
        self._began, self._last = self._began or now, now

    def __call__(self) -> float:
        """Pictures a second; 0 while it cannot be told."""
        return self.came / (self._last - self._began) if self.came else 0.0


def counted(batches: Iterable[list[Finished]], total: int, before: int) -> Iterator[Finished]:
    """Pictures as they come, told of on stderr.

    Args:
        total: pictures of the run.
        before: those that are finished already.
    """
    console, rate, done, said = Console(stderr=True), Rate(), before, time.monotonic()
    columns = (TextColumn("pictures"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(sentence(done, total, 0.0), total=total, completed=done)
        for batch in batches:
            now = time.monotonic()
            rate.add(len(batch), now)
            done += len(batch)
            progress.update(task, completed=done, description=sentence(done, total, rate()))
            if not console.is_terminal and now - said >= EVERY:
                click.echo(sentence(done, total, rate()), err=True)
                said = now
            yield from batch


def sentence(done: int, total: int, rate: float) -> str:
    """How far it is, in words; the time left is that of the rate."""
    said = f"{done} of {total}"
    if rate:
        said += f", {rate:.2f} a second, {timedelta(seconds=round((total - done) / rate))} left"
    return said
