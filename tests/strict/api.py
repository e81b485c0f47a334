"""The real Python API of each TensorRT, as a limit for what plays it.

``tests/tensorrt_api.json`` says for every class and member which versions have it and what it takes.
It was read from NVIDIA's own bindings. A class that plays one of them is made from it here, so that it
cannot know more than the real one of its version does.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "tensorrt_api.json"
RTX = "rtx-1.7.1.116"
BASES = {"Logger": "ILogger"}


class Enumeration(enum.Enum):
    """As pybind11 has them: equal to their like alone, with a number."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


@functools.cache
def table() -> Any:
    return json.loads(TABLE.read_text())


def versions() -> list[str]:
    """Those of TensorRT; the last is TensorRT-RTX."""
    return [*table()["versions"]]


def takes(version: str, cls: str, member: str) -> str | None:
    """How a version has a member: "property", "settable", its arguments, "*" if they differ; None if not."""
    for kind, where in table()["classes"].get(cls, {}).get(member, {}).items():
        if where == "all" or version in where.split():
            return str(kind)
    return None


def members(version: str, cls: str) -> set[str]:
    """Of a class, in a version."""
    return {member for member in table()["classes"][cls] if takes(version, cls, member) is not None}


def enumerations(version: str) -> dict[str, type[Enumeration]]:
    """All of them that a version has; numbers are the real ones only where somebody shifts by them."""
    made: dict[str, type[Enumeration]] = {}
    for name, rows in table()["enumerations"].items():
        there = [m for m, where in rows.items() if where == "all" or version in where.split()]
        if there:
            numbers = {m: n for n, m in enumerate(there)}
            if name == "NetworkDefinitionCreationFlag":
                numbers |= {"STRONGLY_TYPED": 0 if version == RTX else 1, "EXPLICIT_BATCH": 0}
                numbers = {m: numbers[m] for m in there}
            made[name] = enumeration(name, numbers)
    return made


def enumeration(name: str, numbers: dict[str, int]) -> type[Enumeration]:
    """One with these members."""
    made: Any = Enumeration
    return made(name, numbers)  # type: ignore[no-any-return]


def face(version: str, played: type, base: type | None = None, **shared: Any) -> type | None:
    """What a version shows of a class that plays all versions; None if it has no such class.

    Raises:
        TypeError: it has a member, or takes an argument, that the real class lacks.
    """
    cls = played.__name__
    if not members(version, cls):
        return None
    shown = {}
    for name, value in vars(played).items():
        if name.startswith("_") and name not in {"__init__", "__getitem__", "__len__"}:
            if name not in {"__dict__", "__weakref__"}:
                shown[name] = value
            continue
        if name not in table()["classes"][cls]:
            raise TypeError(f"no TensorRT has {cls}.{name}")
        kind = takes(version, cls, name)
        if kind is not None:
            _check(f"{cls}.{name} of {version}", kind, value)
            shown[name] = value
    made = type(cls, () if base is None else (base,), {**shown, **shared})

    def set_known(self: Any, name: str, value: Any) -> None:
        if type(self) is made and not name.startswith("_") and not isinstance(vars(made).get(name), property):
            raise AttributeError(f"{cls!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    made.__setattr__ = set_known  # type: ignore[method-assign, assignment]
    return made


def _check(what: str, kind: str, value: Any) -> None:
    """That a member takes what the real one takes, and can be set only if that can."""
    if isinstance(value, property):
        if kind not in {"property", "settable"} or (value.fset and kind != "settable"):
            raise TypeError(f"{what} is {kind}")
    elif inspect.isfunction(value) and kind not in {"*", "none"}:
        found = " ".join([*inspect.signature(value).parameters][1:])
        if found != kind:
            raise TypeError(f"{what} takes {kind!r}, the one that plays it {found!r}")
