"""JSON objects in files, read strictly: what the format does not know is refused and not guessed at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from hart_runtime.common.errors import InputError, shown
from hart_runtime.common.text_files import read_text


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from ``path``, with a byte order mark or without.

    Raises:
        InputError: it is missing or broken, holds NaN, infinity or a number beyond what a float holds,
            or gives one key twice.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file")  # a FIFO might never begin, a device never end
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """The same of what was read; messages begin with ``source``."""
    try:
        values = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise InputError(f"{source}: not a readable JSON file (nested too deeply)") from None
    except ValueError as error:  # also of a whole number of thousands of digits
        raise InputError(f"{source}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected a JSON object, found {kind_of(values)}")
    return values


def object_in(values: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """The object below a key, an empty one where there is none (or null).

    Raises:
        InputError: something else is there; names ``source`` and the key.
    """
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{source}: {key}: expected an object, found {shown(found)}")
    return found


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{shown(digits)} is beyond the numbers of a float")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return values
