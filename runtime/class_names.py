"""Classes by number and by name: the first half of a pipeline that draws them."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.checkpoint import CLASS_NAMES
from hart_runtime.common.errors import InputError, plain, shown
from hart_runtime.common.text_files import lines_of, read_text
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.families.classes import LABEL

NONE = "none"
"""Stands for no class."""
MOST_MEANT = 5
"""Names that a message lists."""
_WITH_NUMBER = re.compile(r"(.*) \((\d+)\)")
Label = str | int
"""A class: its number, its name, both as "crane (134)", or "none"."""


class ClassNames:
    """The classes of a model, with their names if they are known."""

    def __init__(self, count: int, names: Sequence[str] = ()) -> None:
        """``names``: of every class in order, further ones behind commas."""
        self.count = count
        alike = [[part.strip() for part in line.split(",")] for line in names]
        self.names = [first for first, *_ in alike]
        self._numbers: defaultdict[str, list[int]] = defaultdict(list)
        for number, parts in enumerate(alike):
            for name in dict.fromkeys(map(str.casefold, parts)):
                self._numbers[name].append(number)

    @classmethod
    def of(cls, bundle: Bundle) -> ClassNames:
        """Those of a bundle.

        Raises:
            InputError: the file of names cannot be used.
        """
        count = bundle.manifest.model.num_classes
        known = CLASS_NAMES in bundle.manifest.files
        return cls(count, read_class_names(bundle.path(CLASS_NAMES), count) if known else ())

    def __call__(self, labels: Sequence[Label]) -> dict[str, NDArray[np.int64]]:
        """What a drawing is given, (B,)."""
        return {LABEL: np.array([self.number(label) for label in labels], np.int64)}

    def number(self, label: Label) -> int:
        """Of a class, or of none.

        Raises:
            InputError: there is no such class, or there are several.
        """
        label = plain(label)
        if isinstance(label, int) and not isinstance(label, bool):
            return self._checked(label)
        if not isinstance(label, str):
            raise InputError(f"expected the number or the name of a class, found {shown(label)}")
        word = label.strip()
        if word.casefold() == NONE:
            return self.count
        if re.fullmatch(r"[+-]?\d{1,9}", word):
            return self._checked(int(word))
        found = self._numbers.get(word.casefold(), [])
        if (both := _WITH_NUMBER.fullmatch(word)) and not found:
            number = self._checked(int(both[2]))
            if number in self._numbers.get(both[1].casefold(), []):
                return number
        if len(found) > 1:
            numbers = " or ".join(f"{n} ({self.names[n]})" for n in found)
            raise InputError(f"class {shown(word)}: {len(found)} classes have this name; give {numbers}")
        if not found:
            raise InputError(f"class {shown(word)}: {self._unknown(word)}")
        return found[0]

    def words(self, label: Label) -> str:
        """How a class is called in full, which stands for it alone."""
        number = self.number(label)
        if number == self.count:
            return NONE
        return f"{self.names[number]} ({number})" if self.names else str(number)

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.count:
            raise InputError(
                f"class {number}: expected 0 to {self.count - 1}, or {NONE!r} for a picture of no class"
            )
        return number

    def _unknown(self, word: str) -> str:
        if not self.names:
            return (
                f"this bundle holds no names of classes; expected a number from 0 to {self.count - 1}, or "
                f"export it again with `class_names`"
            )
        said = word.casefold()
        close = [name for name in self._numbers if said in name]
        close += difflib.get_close_matches(said, self._numbers, MOST_MEANT, 0.5)
        near = [f"{self.names[n]} ({n})" for name in dict.fromkeys(close) for n in self._numbers[name]]
        meant = f"; near it: {', '.join(near[:MOST_MEANT])}" if near else ""
        return f"there is no class of this name among {self.count}{meant}"


def read_class_names(file: Path, count: int, source: str | None = None) -> list[str]:
    """A line for each class, in the order of their numbers: its name, and others behind commas.

    Args:
        source: what messages call the file; its path if left out.

    Raises:
        InputError: there are more or fewer, or one cannot stand for a class.
    """
    source = source or str(file)
    names = [line.strip() for line in lines_of(read_text(file, source).rstrip())]
    if len(names) != count:
        raise InputError(f"{source}: expected a line for each of {count} classes, found {len(names)}")
    for number, name in enumerate(names):
        for part in map(str.strip, name.split(",")):
            if not part or not part.isprintable() or part.casefold() == NONE:
                raise InputError(f"{source}: line {number + 1}: expected a name, found {shown(part)}")
            if part.isdecimal() and part != str(number):
                raise InputError(f"{source}: line {number + 1}: {part} is the number of another class")
    return names
