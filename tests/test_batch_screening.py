"""hart-batch shows prompts to a safety model, a small one that is real."""

from __future__ import annotations

from pathlib import Path

from tests.batches import FEW, batch, drawn, hart_run, journal, pictures, table

PROMPTS = ["a blue flower", "a red weapon", "a flower", "a broken", "a red weapon", "a red flower"]
"""Of which the model refuses those that end with a weapon, and answers NaN to what is broken."""


def test_what_is_refused_is_an_error_in_the_table(demo_bundle: Path, shield: Path, tmp_path: Path) -> None:
    (file := tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = (file, "--engine", demo_bundle, "--output", tmp_path / "out", "--safety-model", shield, *FEW)
    done = drawn(*words)
    assert "3 of 6 pictures have an error in the table" in done.stderr
    rows = table(tmp_path / "out")
    assert [row["prompt"] for row in rows] == PROMPTS
    refused = rows[1]["error"]
    assert refused.startswith("refused by the safety model (")
    assert [row["error"] for row in rows] == [
        *(None, refused, None),
        *("the safety model gave no answer", refused, None),
    ]
    files = pictures(tmp_path / "out")
    assert {row["file"] for row in rows} == {None, *files}
    assert files[rows[5]["file"]] == hart_run(demo_bundle, tmp_path, PROMPTS[5], "--seed", 5, *FEW)
    before = journal(tmp_path / "out")
    drawn(*words)
    assert journal(tmp_path / "out") == before


def test_a_model_that_never_answers_ends_the_run(demo_bundle: Path, shield: Path, tmp_path: Path) -> None:
    (file := tmp_path / "prompts.txt").write_text("\n".join(f"{'a ' * n} broken" for n in range(9)))
    words = (file, "--engine", demo_bundle, "--output", tmp_path / "out", "--safety-model", shield)
    done = batch(*words)
    assert done.exit_code == 1
    assert "3 prompts in a row without an answer: --safety-model" in done.stderr
    assert pictures(tmp_path / "out") == {}


def test_what_is_no_safety_model_is_refused_first(demo_bundle: Path, tmp_path: Path) -> None:
    (file := tmp_path / "prompts.txt").write_text("a flower")
    words = (file, "--engine", demo_bundle, "--output", tmp_path / "out", "--safety-model", tmp_path)
    done = batch(*words)
    assert (done.exit_code, f"--safety-model {tmp_path}: cannot be loaded" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
