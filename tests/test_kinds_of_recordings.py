"""Recordings that people give with HART_GOLDEN_DIR, of forms that ours have not, are found and replayed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import golden_runs, test_conformance
from tests.conftest import ExportOnce
from tests.golden_runs import HERE, class_runs, class_variants, heads_of, roots, runs, variants
from tests.imports import ROOT
from tests.var_models import varied
from tests.var_recordings import write_recordings

SHARED = varied(
    shared_aln=True, depth=2, embed_dim=48, num_heads=3, mlp_hidden=192, num_classes=5, patch_nums=(1, 2, 4)
)
PLAIN = varied(attn_l2_norm=False, depth=1, embed_dim=96, num_heads=4, num_classes=13, patch_nums=(2, 3))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders whose variants have the name of the project's own; the second is the variant itself."""
    root = tmp_path_factory.mktemp("given")
    write_recordings(SHARED, root / "more" / "var_plain")
    write_recordings(PLAIN, root / "others" / "var_plain", batch=1, seed=3)
    return root / "more", root / "others" / "var_plain"


@pytest.fixture
def named(given: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    folders = [*map(str, given), str(HERE / "t2i_adaln")]  # which is there anyway
    monkeypatch.setenv("HART_GOLDEN_DIR", os.pathsep.join(folders))
    return given


def test_all_kinds_are_found_once(named: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    more, plain = named
    found = (len(variants()), len(runs()), len(class_variants()), len(class_runs()))
    assert set(class_variants()) == {
        HERE.resolve() / "var_plain",
        more.resolve() / "var_plain",
        plain.resolve(),
    }
    assert [heads_of(variant) for variant in (more / "var_plain", plain)] == [3, 4]
    monkeypatch.delenv("HART_GOLDEN_DIR")
    ours = (len(variants()), len(runs()), len(class_variants()), len(class_runs()))
    assert found == (ours[0], ours[1], ours[2] + 2, ours[3] + 6)


def test_they_are_replayed(named: tuple[Path, Path]) -> None:
    """By the reference in a process of its own; nothing is left out and nothing is taken for another."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_golden_var.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not re.search("skipped|warning", done.stdout), done.stdout
    for test, count in (("test_replay", 4 + 6), ("test_tokenizer_and_teacher_forced_logits", 3)):
        assert len(re.findall(rf"::{test}\[var_plain.*\] PASSED", done.stdout)) == count, done.stdout


@pytest.mark.parametrize("number", [0, 1])
def test_their_graphs_are_replayed(number: int, named: tuple[Path, Path], export_once: ExportOnce) -> None:
    """Bundles of variants of one name are not mixed up."""
    own = [run for run in class_runs() if run.variant.is_relative_to(named[number].resolve())]
    assert [run.label for run in own] == [f"var_plain-{level}" for level in ("full", "light", "std")]
    for run in own:
        test_conformance.test_golden_class_run(run, test_conformance.on_the_cpu, export_once)


def test_what_holds_no_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HART_GOLDEN_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no recorded runs below"):
        roots()
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "run_x.safetensors").touch()
    with pytest.warns(
        UserWarning, match=re.escape(f"holds neither {golden_runs.HART} nor {golden_runs.VAR}")
    ):
        assert roots() == [HERE, tmp_path]


def test_stand_ins_hold_what_the_published_recordings_do(given: tuple[Path, Path]) -> None:
    public = golden_runs.ClassRun(HERE / "var_plain" / "golden" / "run_topp0.95.safetensors")
    made = golden_runs.ClassRun(given[0] / "var_plain" / "golden" / "run_std.safetensors")
    pattern = re.compile(r"^scale\d+\.")
    names = {pattern.sub("", name) for name in made.tensors()}
    assert names == {pattern.sub("", name) for name in public.tensors()}
