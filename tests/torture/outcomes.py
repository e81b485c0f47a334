"""What a trial may end in, and the table of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from rich.table import Table

from hart_runtime.common.errors import InputError, RunError

LONGEST_MESSAGE = 1500
"""Characters of a sentence."""


class Outcome(Enum):
    """Classes of trials; of the last five there may be none."""

    EQUAL = "picture equal"
    EFFECT = "picture within the change's effect"
    REFUSED = "clean refusal"
    TRACEBACK = "traceback"
    HANG = "hang"
    CRASH = "crash"
    HALF = "half-written"
    WRONG = "silent wrong"


BAD = frozenset([Outcome.TRACEBACK, Outcome.HANG, Outcome.CRASH, Outcome.HALF, Outcome.WRONG])


class Trial(NamedTuple):
    """One trial and how it ended."""

    campaign: str
    number: int
    outcome: Outcome
    said: str
    """What was done, and what came of it."""

    def __str__(self) -> str:
        return f"{self.campaign} {self.number}: {self.outcome.value}: {self.said}"


def of_error(error: BaseException) -> tuple[Outcome, str]:
    """How an error ends a trial: a sentence of ours, or anything else."""
    said = f"{type(error).__name__}: {error}"
    clean = isinstance(error, InputError | RunError) and "\n" not in str(error)
    fine = clean and 10 < len(str(error)) < LONGEST_MESSAGE
    return (Outcome.REFUSED if fine else Outcome.TRACEBACK), said


def table(trials: Iterable[Trial], title: str) -> Table:
    """Outcomes by campaign."""
    counts: dict[str, Counter[Outcome]] = {}
    for trial in trials:
        counts.setdefault(trial.campaign, Counter())[trial.outcome] += 1
    made = Table(title=title)
    for words in ("campaign", "trials", *(outcome.value for outcome in Outcome)):
        made.add_column(words, justify="left" if words == "campaign" else "right", overflow="fold")
    for name, found in counts.items():
        made.add_row(name, str(found.total()), *(str(found[outcome]) for outcome in Outcome))
    return made
