"""The table of what drawing with less costs and gains."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from hart_runtime.bench.modes import MODES, main, modes_of
from hart_runtime.common.settings import EXACT, SPEEDS
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.call import checked_settings
from hart_runtime.runtime.pipeline import Pipeline
from tests.conftest import ExportOnce


def test_one_command_makes_the_table(export_once: ExportOnce, tmp_path: Path) -> None:
    """No row without the number of its pictures or turns, their seeds and a standard error."""
    bundle, output = export_once(DEMO_CHECKPOINT, "fp32"), tmp_path / "modes.json"
    asked = ["--demo", bundle, "--engine", bundle, "--pictures", 3, "--turns", 2, "--mode", "fast"]
    done = CliRunner().invoke(main, [str(a) for a in [*asked, "--threads", 1, "--output", output]])
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    assert [*found] == [EXACT, "fast"]
    for row in found.values():
        drawn, timed = row["pictures"], row[bundle.name]
        assert (drawn["n"], drawn["first_seed"], timed["n"]) == (3, 0, 2)
        assert {"difference", "error", "psnr", "ssim", "frechet"} <= drawn.keys()
        assert {"ratio", "error", "operations", "bytes", "floor"} <= timed.keys()
    exact, fast = (found[name][bundle.name] for name in (EXACT, "fast"))
    assert fast["operations"] < exact["operations"]
    assert fast["floor"] < exact["floor"]
    assert (found[EXACT]["pictures"]["difference"], found[EXACT]["pictures"]["error"]) == (0, 0)
    lines = output.with_suffix(".md").read_text().splitlines()
    head, *rows = [line.split(" | ") for line in lines if line.startswith("|")]
    assert {len(row) for row in rows[1:]} == {len(head)}
    assert [row[0] for row in rows[1:]] == ["| exact", "| fast"]
    for name, cell in zip(head, rows[-1], strict=True):
        assert cell.strip(" |"), name
        assert "seed" in cell or not name.endswith(("pictures", "turns")), name
        assert "±" in cell or not name.endswith("exact"), name


def test_every_speed_is_a_row_and_classes_have_those_they_can(demo: Pipeline, class_bundle: Path) -> None:
    assert MODES.keys() >= SPEEDS.keys()
    found = modes_of(demo)
    assert [*SPEEDS] == [name for name in found if name in SPEEDS]
    assert len(set(found.values())) == len(found) >= len(MODES) - 2, "what two names mean is one row"
    assert found["fast"] == checked_settings(demo.bundle.manifest, ["a star"], speed="fast")
    classes = modes_of(Pipeline.load(class_bundle, "cpu"))
    assert [*classes] == [EXACT, "balanced", "fast"]
    assert [s.unguided_scales for s in classes.values()] == [0, 1, 2]
    assert not any(s.prune for s in classes.values())


def test_nothing_to_compare() -> None:
    done = CliRunner().invoke(main, [])
    assert (done.exit_code, done.output) == (2, "error: nothing to compare: give --demo, or --engine\n")
