"""Finds the bundle that somebody means by a folder or a file."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import InputError, parameter

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MOST_NAMED = 5
"""Things that a folder without bundles is described by."""


def find_bundle(place: Path) -> Path:
    """The folder of a bundle: itself, of its manifest, or the only one that a folder holds.

    The last is logged, so that nobody wonders which bundle it was.

    Raises:
        InputError: nothing there, or no bundle: with what was found and how to make one; or several:
            with a line for each.
    """
    if place.name == MANIFEST and place.is_file():
        return place.parent
    if (place / MANIFEST).is_file():
        return place
    if not place.is_dir():
        what = "it is a file" if place.exists() else "there is no such folder"
        raise InputError(
            f"{place}: no bundle here, {what}; expected a bundle, its {MANIFEST}, or a folder that holds "
            f"bundles; make one with hart-export"
        )
    bundles = sorted(file.parent for file in place.glob(f"[!.]*/{MANIFEST}") if file.is_file())
    if not bundles:
        raise InputError(f"{place}: no bundle here, {_contents(place)}; make one with hart-export")
    if len(bundles) > 1:
        lines = "".join(f"\n  {_line(folder)}" for folder in bundles)
        raise InputError(f"{place}: holds {len(bundles)} bundles, choose one:{lines}")
    log.info("using the bundle %s", bundles[0])
    return bundles[0]


def _contents(folder: Path) -> str:
    if (folder / "llm").is_dir() or (folder / "config.json").is_file():
        return f"it holds a checkpoint: hart-export {folder} makes a bundle of it"
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"found {', '.join(names[:MOST_NAMED])}{more}" if names else "the folder is empty"


def _line(folder: Path) -> str:
    """Name, what it draws, precision and date of a bundle, and how to choose it."""
    file = folder / MANIFEST
    date = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
        size = int(values["model"]["image_size"])
        drawn = "prompts" if "text_encoder" in values["graphs"] else "text features"
        said = f"{values['name']}: {size} x {size} pictures from {drawn}, {values['precision']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = f"{folder.name}: its manifest cannot be read"
    return f"{said}, {date:%Y-%m-%d %H:%M}: {parameter('bundle', folder)}"
