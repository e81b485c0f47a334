"""hart-batch as users start it, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from click.testing import CliRunner, Result

from hart_runtime.batch.cli import main
from hart_runtime.runtime.cli import main as run_main

START = "import sys; from hart_runtime.batch.cli import main; main(sys.argv[1:])"
FEW = ("--steps", 2)
"""Denoising steps of pictures that are drawn for their number."""


def batch(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def drawn(*arguments: object) -> Result:
    """The same where it has to end well."""
    done = batch(*arguments)
    assert done.exit_code == 0, done.output
    return done


def started(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """In a process of its own."""
    command = [sys.executable, "-c", START, "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def table(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / "table.parquet").to_pylist()
    return found


def pictures(folder: Path) -> dict[str, bytes]:
    """The files of pictures by their name in the table, read out of shards, too."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("pictures/*/*.png")}
    for file in folder.glob("shards/*.tar"):
        with tarfile.open(file) as shard:
            for member in shard.getmembers():
                data = shard.extractfile(member)
                assert data is not None
                name = f"{file.relative_to(folder)}/{member.name}"
                assert name not in found
                found[name] = data.read()
    return found


def check_whole(folder: Path, count: int) -> dict[int, bytes]:
    """Every picture is there once, in the table and as a file, and nothing else; by number."""
    rows, files = table(folder), pictures(folder)
    assert [row["number"] for row in rows] == list(range(count))
    assert {row["error"] for row in rows} == {None}
    assert len({row["file"] for row in rows}) == count
    assert {name for name in files if name.endswith(".png")} == {row["file"] for row in rows}
    for row in rows:
        assert hashlib.sha256(files[row["file"]]).hexdigest() == row["sha256"]
    left = [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert left == []
    return {row["number"]: files[row["file"]] for row in rows}


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def hart_run(bundle: Path, folder: Path, prompt: str, *options: object) -> bytes:
    """The file that hart-run writes."""
    file = folder / "run.png"
    words: Sequence[object] = [prompt, "--engine", bundle, "--device", "cpu", "--output", file, *options]
    done = CliRunner().invoke(run_main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return file.read_bytes()
