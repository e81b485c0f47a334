"""Copies of what git tracks: a clone as somebody else would have it, uncommitted changes included."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.imports import ROOT


def tracked() -> list[str]:
    """Names of the tracked files that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name for name in listed.decode().split("\0") if name]
    return [name for name in names if (ROOT / name).exists() or (ROOT / name).is_symlink()]


def copy_of_clone(folder: Path) -> Path:
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder
