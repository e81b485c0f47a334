"""Records from JSON: frozen dataclasses, checked field by field.

Files come from strangers, and a value of another type would end somewhere far from its file. Every message
says where in the file it is, what was expected and what was found.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hart_runtime.common.errors import InputError, listed, named, shown

Record = TypeVar("Record")
Readers = Mapping[type, Callable[[Any, str], Any]]
"""Functions for records that are read in another way: from a value and the words for its place."""

LONGEST_TEXT = 255
"""Characters of a name, a version or a hash: what records hold is shown in messages."""
FREE = {"of any length": True}
"""Metadata of fields for what a user writes, such as prompts."""
LARGEST = 2**63 - 1
"""Of the numbers of a record: those of a graph's tensors have 64 bits."""
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def read_record(kind: type[Record], value: object, place: str, readers: Readers | None = None) -> Record:
    """Make a dataclass of a JSON object.

    Args:
        place: begins messages: the file.

    Raises:
        InputError: a field is missing or unknown, or a value has another type.
    """
    found: Record = _record(kind, value, place, readers or {}, ": ")
    return found


def read_value(hint: Any, value: object, place: str) -> Any:
    """The same for any type that a field can have, such as ``dict[str, str]``."""
    return _read(hint, value, place, {})


def _read(hint: Any, value: object, place: str, readers: Readers) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        found = value
    elif hint in readers:
        found = readers[hint](value, place)
    elif is_dataclass(hint) and isinstance(hint, type):
        found = _record(hint, value, place, readers)
    elif origin in (types.UnionType, Union):
        found = _one_of(arguments, value, place, readers)
    elif origin is tuple:
        found = _tuple(arguments, value, place, readers)
    elif origin is dict:
        items = _expected(dict, "an object", value, place).items()
        found = {
            _text(key, place): _read(arguments[1], item, f"{place}.{named(key)}", readers)
            for key, item in items
        }
    else:
        found = _plain(hint, value, place)
    return found


def _record(kind: type, value: object, place: str, readers: Readers, join: str = ".") -> Any:
    values = _expected(dict, "an object", value, place)
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    if unknown := [str(name) for name in values if name not in known]:
        raise InputError(f"{place}: unknown {listed(unknown)}; a newer version of hart-runtime may know it")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{place}: {name} is missing")
    free = {**readers, str: _free}
    return kind(
        **{
            name: _read(
                hints[name], item, f"{place}{join}{name}", free if known[name].metadata == FREE else readers
            )
            for name, item in values.items()
        }
    )


def _one_of(kinds: tuple[Any, ...], value: object, place: str, readers: Readers) -> Any:
    for kind in kinds:
        try:
            return _read(kind, value, place, readers)
        except InputError:
            continue
    words = " or ".join(WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
    raise InputError(f"{place}: expected {words}, found {shown(value)}")


def _tuple(kinds: tuple[Any, ...], value: object, place: str, readers: Readers) -> tuple[Any, ...]:
    items = _expected(list, "a list", value, place)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(kinds) != len(items):
        raise InputError(f"{place}: expected {len(kinds)} values, found {len(items)}")
    return tuple(
        _read(kind, item, f"{place}[{number}]", readers)
        for number, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _plain(kind: Any, value: object, place: str) -> Any:
    wanted = (int, float) if kind is float else kind
    fine = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
    if not fine or (kind is float and not _finite(value)):
        raise InputError(f"{place}: expected {WORDS.get(kind, kind)}, found {shown(value)}")
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise InputError(f"{place}: expected {-LARGEST} to {LARGEST}, found {shown(value)}")
    return _text(value, place) if isinstance(value, str) else value


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _text(value: str, place: str) -> str:
    if len(value) > LONGEST_TEXT:
        raise InputError(
            f"{place}: expected at most {LONGEST_TEXT} characters, found {len(value)}: {shown(value)}"
        )
    return _free(value, place)


def _free(value: Any, place: str) -> str:
    """Text of any length."""
    if not isinstance(value, str):
        raise InputError(f"{place}: expected {WORDS[str]}, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: expected text, found half of a character in {shown(value)}") from None
    return value


def _expected(kind: type[Any], words: str, value: Any, place: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{place}: expected {words}, found {shown(value)}")
    return value
