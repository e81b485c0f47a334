"""sdist and wheel of a clean copy, the same bytes whenever and wherever they are built."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.clones import copy_of_clone
from tests.imports import ROOT


def call(command: list[object], folder: Path, **variables: str) -> str:
    """What a command prints; what it printed is the error where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def commit_time() -> int:
    """Of the commit that is released, in seconds: what files in archives are dated."""
    return int(call(["git", "log", "-1", "--format=%ct"], ROOT))


def build(folder: Path, *options: str) -> tuple[Path, Path]:
    """sdist, and the wheel that is built from it, of a copy of what git tracks in ``folder``.

    Args:
        options: of ``python -m build``, which makes an environment for each unless they say otherwise.
    """
    clone, output, time = copy_of_clone(folder / "clone"), folder / "dist", commit_time()
    command = [sys.executable, "-m", "build", *options, "--outdir", output]
    dated = {"SOURCE_DATE_EPOCH": str(time)}
    call([*command, "--sdist", clone], folder, **dated)
    (sdist,) = output.glob("*.tar.gz")
    sdist.write_bytes(dated_archive(sdist.read_bytes(), time))
    source = folder / "source"
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (root,) = source.iterdir()
    call([*command, "--wheel", root], folder, **dated)
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


def dated_archive(archive: bytes, time: int) -> bytes:
    """The same files in a tar.gz, sorted, of nobody and of one time; setuptools dates them as it goes."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=time) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return packed.getvalue()
