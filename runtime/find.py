"""Finds the bundle that somebody means by a folder or a file."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from hart_runtime.common.checkpoint import LLM, TEXT_ENCODER
from hart_runtime.common.errors import NOTE, InputError, listed, parameter
from hart_runtime.common.files import read_regular

log = logging.getLogger(__name__)

MANIFEST, WEIGHTS = "manifest.json", "weights.bin"
"""Things that a folder without bundles is described by."""


def find_bundle(place: Path) -> Path:
    """The folder of a bundle: itself, of its manifest, or the only one that a folder holds.

    The last is told on stderr, so that nobody wonders which bundle it was.

    Raises:
        InputError: nothing there, or no bundle: with what was found and how to make one; or several:
            with a line for each.
    """
    bundles = find_bundles(place)
    if bundles[0] in (place, place.parent):
        return bundles[0]
    if len(bundles) > 1:
        lines = "".join(f"\n  {_line(folder)}" for folder in bundles)
        raise InputError(f"{place}: holds {len(bundles)} bundles, choose one:{lines}")
    log.log(NOTE, "using the bundle %s", bundles[0])
    return bundles[0]


def find_bundles(place: Path) -> list[Path]:
    """The same where several are as good as one: all that a folder holds, sorted.

    Raises:
        InputError: there is none.
    """
    if place.name == MANIFEST and _is_file(place):
        return [place.parent]
    if _is_file(place / MANIFEST):
        return [place]
    bundles = [folder for folder in _folders(place) if _is_bundle(folder)]
    if not bundles:
        raise InputError(
            f"{place}: no bundle here, {_contents(place)}; hart-export makes bundles; expected one, its "
            f"{MANIFEST}, or a folder that holds them"
        )
    return bundles


def _folders(place: Path) -> list[Path]:
    """Those inside, but for hidden ones: what is being written is none yet."""
    try:
        return sorted(entry for entry in place.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError:  # no folder, or one that may not be read
        return []


def _is_bundle(folder: Path) -> bool:
    """Whether there is a bundle's manifest: many things have a file of that name."""
    file = folder / MANIFEST
    try:
        values = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError):
        return _is_file(file) and _is_file(folder / WEIGHTS)  # a damaged one
    return isinstance(values, dict) and "graphs" in values and "schema" in values


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may not be looked into
        return False


def _contents(place: Path) -> str:
    try:
        if not place.is_dir():
            return "it is a file" if place.exists() else "there is no such folder"
        if (place / LLM).is_dir() or (place.name == LLM and (place / "config.json").is_file()):
            return "it is a checkpoint"
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in place.iterdir())
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    return f"found {listed(names)}" if names else "the folder is empty"


def _line(folder: Path) -> str:
    """Name, what it draws, precision and date of a bundle, and how to choose it."""
    file = folder / MANIFEST
    date = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    try:
        values: dict[str, Any] = json.loads(read_regular(file))
        size = int(values["model"]["image_size"])
        drawn = "prompts" if TEXT_ENCODER in values["graphs"] else "text features"
        if classes := values["model"].get("num_classes"):
            drawn = f"{int(classes)} classes"
        said = f"{values['name']}: {size} x {size} pictures from {drawn}, {values['precision']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = f"{folder.name}: its manifest cannot be read"
    return f"{said}, {date:%Y-%m-%d %H:%M}: {parameter('bundle', folder)}"
