"""Where a report goes: what it may replace there, and what it may not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hart_runtime.common.errors import NOTE, InputError, parameter
from hart_runtime.common.files import read_regular
from hart_runtime.common.json_files import read_json

log = logging.getLogger(__name__)

REPORT, PAGE = "report.json", "report.html"
TITLE = "<title>hart-compare: "


def check_place(folder: Path) -> None:
    """Look at what a report would replace: another report, of which is told, or what is somebody's own.

    Raises:
        InputError: there is a file in the folder's place, or something else under the name of a report.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{parameter('output', folder)}: expected a folder, found a file")
    there = [folder / name for name in (REPORT, PAGE) if os.path.lexists(folder / name)]
    for file in there:
        if not _is_ours(file):
            raise InputError(
                f"{file}: is no report of hart-compare, and is not replaced; give another `output`"
            )
    if there:
        log.log(NOTE, "%s: an earlier report, replaced when this one is done", folder)


def _is_ours(file: Path) -> bool:
    try:
        if file.name == REPORT:
            return {"schema", "passed", "runs"} <= read_json(file).keys()
        return TITLE.encode() in read_regular(file)
    except (InputError, OSError):
        return False
