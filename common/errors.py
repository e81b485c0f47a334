"""The two ways something can fail, and what is only told; shared by every room of the project."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Made = TypeVar("Made")
NOTE = logging.WARNING + 1
"""Level of what is no warning and yet to be read, also where nobody has configured logging."""
logging.addLevelName(NOTE, "NOTE")

NO_ROOM = frozenset(
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.EMFILE,
        errno.ENFILE,
    ]
)
"""Errors of a machine, and not of what it was asked for."""
LONGEST = 200
"""Characters of a value that a message shows."""
MOST_SAID = 400
"""Characters of what a library says that a message repeats."""
MOST_NAMED = 5
"""Names that a message lists."""


class InputError(ValueError):
    """Something the caller gave is wrong: a path, a file, a parameter.

    The message is one sentence that names the file or parameter, what was expected and what was
    found. A parameter stands between backticks, with its value if that matters, in the words of
    the Python API (see :func:`parameter`); commands print their own option in its place and end
    with exit code 2.
    """


class RunError(RuntimeError):
    """The run itself failed, for example by producing NaN (exit code 1)."""


def parameter(name: str, value: object) -> str:
    """A parameter with its value, as messages spell it."""
    said = value if isinstance(value, bool | int | float) else str(value)
    return f"`{name}={_without_backticks(repr(said))}`"


def _without_backticks(text: str) -> str:
    """They mark parameters; a value's own are written as Python may, too."""
    return text.replace("`", "\\x60")


@contextlib.contextmanager
def told_of(source: str) -> Iterator[None]:
    """Say of bad parameters that they stand in ``source``: the caller gave it, and not them."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {str(error).replace('`', '')}") from None


def guarded(work: Callable[[], Made], failed: str) -> Made:
    """What a library makes of what it is given; whatever it says of what it cannot do becomes one line.

    Args:
        failed: begins the message; what the library says follows in parentheses.

    Raises:
        InputError: the library raised something else, be it a panic of Rust, which is no Exception.
    """
    try:
        return work()
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{failed} ({first_line(error)})") from None


def first_line(error: BaseException | str) -> str:
    """What a library says, or the error's type; of bounded length, for some repeat all they were given.

    Of what is longer both ends stay: what happened may stand at either.
    """
    said = str(error).strip().partition("\n")[0].rstrip() or type(error).__name__
    half = MOST_SAID // 2
    return said if len(said) <= MOST_SAID else f"{said[:half]} ... {said[-half:]}"


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a name that there is not, with the list of what there is.

    Raises:
        InputError: ``value`` is none of ``known``.
    """
    names = list(known)
    if value not in names:
        raise InputError(f"{parameter(name, value)}: expected {either(names)}{meant(value, names)}")


def either(names: Sequence[str]) -> str:
    """Names of which one is expected, in words."""
    return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"


def known_names(what: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names, such as those of settings, that there are not; those of other tools with ours.

    Args:
        what: begins the message: a file, or the call.

    Raises:
        InputError: one of ``found`` is none of ``known``.
    """
    names = list(known)
    if unknown := [name for name in found if name not in names]:
        from hart_runtime.common.other_names import told_of_another

        hint = told_of_another(unknown[0], names) or meant(unknown[0], names)
        raise InputError(f"{what}: unknown {listed(unknown)}; there are {', '.join(names)}{hint}")


def in_range(name: str, value: object, low: float, high: float, note: str = "") -> None:
    """Refuse a value that is no number from ``low`` to ``high``.

    Raises:
        InputError: with both limits, ``note`` behind them, and the value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high):  # type: ignore[operator]
        raise InputError(f"`{name}`: expected {low} to {high}{note}, found {shown(value)}")


def whole_in_range(name: str, value: object, low: int, high: int, note: str = "") -> int:
    """The same for whole numbers, of numpy too; returns Python's own."""
    number = plain(value)
    in_range(name, number, low, high, note)
    if not isinstance(number, int):
        raise InputError(f"`{name}`: expected a whole number, found {shown(value)}")
    return number


def true_or_false(name: str, value: object) -> None:
    """Refuse what is neither, such as a word; raises InputError."""
    if not isinstance(plain(value), bool):
        raise InputError(f"`{name}`: expected True or False, found {shown(value)}")


def shown(value: object) -> str:
    """A value as messages show it, however long it is."""
    try:
        text = _without_backticks(repr(value))
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def named(name: str) -> str:
    """A name out of a file as a sentence can hold it: on one line, of bounded length, without backticks."""
    plain = name.isprintable() and "`" not in name and len(name) <= LONGEST
    return name if plain else shown(name)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, of many only the first."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(named, names[:MOST_NAMED])) + more


def plain(value: Any) -> Any:
    """A number of numpy's (or of torch's) as Python's own; everything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def meant(value: object, names: list[str]) -> str:
    """A question that ends a message: whether a name close to ``value`` was meant; "" without one."""
    import difflib

    said = str(value).lower()
    close = [name for name in names if said and name.startswith(said)]
    for spelled in (said.replace("_", "-"), said):
        close = close or difflib.get_close_matches(spelled, names, 1)
    return f"; did you mean {close[0]}?" if close else ""
