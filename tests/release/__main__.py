"""``make release``: what would be uploaded, built twice, checked, installed on two Pythons, drawn with.

It uploads nothing. What is in ``dist/`` afterwards is what was checked.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.imports import ROOT
from tests.release.build import build, call

PYTHONS = ("3.10", "3.13")
"""The oldest and the newest that the package says it runs on; tests/test_release.py compares."""
PROMPT = "a red circle on a white background"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make release", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="of the demo, which every Python draws")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    asked = parser.parse_args()
    if changed := call(["git", "status", "--porcelain", "--untracked-files=no"], ROOT):
        sys.exit(f"error: a release is of a commit, and these are changed:\n{changed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archives = built_twice(folder)
        check_contents(archives, folder)
        bundle = asked.bundle.absolute()
        drawn = {version: draw(python, version, archives[1], bundle, folder) for version, python in here()}
        if not drawn:
            sys.exit(f"error: none of Python {' and '.join(PYTHONS)} is on this machine")
        if len(set(drawn.values())) != 1:
            sys.exit(f"error: not every Python draws the same picture: {drawn}")
        shutil.rmtree(asked.output, ignore_errors=True)
        asked.output.mkdir(parents=True)
        for archive in archives:
            shutil.copy2(archive, asked.output)
            print(f"{sha256(archive)}  {asked.output / archive.name}")
    absent = [version for version in PYTHONS if version not in drawn]
    print(
        f"the same picture on Python {', '.join(drawn)}; not on this machine: {', '.join(absent) or 'none'}"
    )


def built_twice(folder: Path) -> tuple[Path, Path]:
    """In two places, each in environments of its own: equal bytes."""
    one, two = (build(folder / name) for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        if first.read_bytes() != second.read_bytes():
            sys.exit(f"error: {first.name} is built with other bytes the second time")
        print(f"{first.name}: {first.stat().st_size} bytes, the same when built again")
    return one


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_contents(archives: tuple[Path, Path], folder: Path) -> None:
    """Metadata as an index takes it, and files as they belong into a wheel, by pyproject.toml's settings."""
    print(call([sys.executable, "-m", "twine", "check", "--strict", *archives], folder).strip())
    tool = Path(sys.executable).parent / "check-wheel-contents"
    print(call([tool, "--config", ROOT / "pyproject.toml", archives[1]], folder).strip())


def here() -> list[tuple[str, Path]]:
    """The Pythons that this machine has, on its PATH or as pyenv keeps them."""
    found = []
    for version in PYTHONS:
        kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        on_path = [Path(place) for place in [shutil.which(f"python{version}")] if place]
        for python in [*on_path, *kept]:
            if runs(python, version):
                found.append((version, python))
                break
    return found


def runs(python: Path, version: str) -> bool:
    code = f"import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def draw(python: Path, version: str, wheel: Path, bundle: Path, folder: Path) -> str:
    """The hash of a picture, drawn with the wheel alone in an environment of its own."""
    place = folder / version
    call([python, "-m", "venv", place], folder)
    bin_ = place / "bin"
    call([bin_ / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"], folder)
    call([bin_ / "python", "-m", "pip", "check"], folder)
    picture = place / "out.png"
    call([bin_ / "hart-run", "--engine", bundle, PROMPT, "--output", picture], folder)
    print(f"{call([bin_ / 'hart-run', '--version'], folder).strip()} on Python {version}: installed, drawn")
    return sha256(picture)


if __name__ == "__main__":
    main()
