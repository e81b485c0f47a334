"""What a release is made of: archives that are the same whenever they are built, and what is said of them."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import load_file  # type: ignore[import-untyped]

from hart_runtime import __all__ as public_names
from hart_runtime import __version__
from hart_runtime.common.noise import NOISE_VERSION
from hart_runtime.runtime.manifest import SCHEMA_VERSION
from hart_runtime.runtime.tensorrt.manifest import ENGINE_SCHEMA
from tests.handbook import site
from tests.handbook.roles import on_page_content
from tests.imports import ROOT
from tests.release.__main__ import PYTHONS
from tests.release.build import dated_archive


def archive(time: int, names: list[str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as made:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.uname, member.uid, member.size = time, "somebody", time % 1000, len(name)
            made.addfile(member, io.BytesIO(name.encode()))
    return packed.getvalue()


def test_archives_are_of_one_time_and_of_nobody() -> None:
    first, second = archive(1_700_000_000, ["x/a", "x/b"]), archive(1_700_000_123, ["x/b", "x/a"])
    assert first != second
    assert dated_archive(first, 1_600_000_000) == dated_archive(second, 1_600_000_000)
    assert dated_archive(first, 1_600_000_000) != dated_archive(archive(0, ["x/a", "x/c"]), 1_600_000_000)
    with tarfile.open(fileobj=io.BytesIO(dated_archive(first, 1_600_000_000))) as read:
        assert [(m.name, m.mtime, m.uname, m.uid) for m in read] == [
            ("x/a", 1_600_000_000, "", 0),
            ("x/b", 1_600_000_000, "", 0),
        ]
        inside = read.extractfile("x/b")
        assert inside is not None
        assert inside.read() == b"x/b"


def test_pythons_are_those_of_the_package() -> None:
    asked = load_file(ROOT / "pyproject.toml")["project"]["requires-python"]
    low, high = re.findall(r"3\.(\d+)", asked)
    assert (f"3.{low}", f"3.{int(high) - 1}") == PYTHONS


def test_changes_and_policy_are_of_this_version() -> None:
    newest = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    policy = (ROOT / "docs" / "versions.md").read_text()
    for said in (
        f"the schema number, now {SCHEMA_VERSION} |",
        f"their schema number, also {ENGINE_SCHEMA} |",
        f"the random numbers, now {NOISE_VERSION} |",
        f"Python {PYTHONS[0]} and {PYTHONS[1]}",
    ):
        assert said in policy


def test_the_site_has_every_document_and_every_public_name(tmp_path: Path) -> None:
    """Links between documents stay within it; that mkdocs finds them all is what `make docs` checks."""
    site.lay_out(tmp_path)
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert menu == {str(page) for page in site.documents()} | {"docs/api.md"}
    assert all((tmp_path / page).is_file() for page in menu)
    assert (tmp_path / "docs" / "demo.png").is_file()
    described = re.findall(r"^::: (\S+)$", (tmp_path / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name.rpartition(".")[2] for name in described} == {*public_names} - {"__version__"}


def test_references_of_docstrings_are_names() -> None:
    html = "see :func:<code>hart_runtime.common.schedule.published_top_k</code>, :meth:<code>batches</code>"
    assert on_page_content(html) == "see <code>published_top_k</code>, <code>batches</code>"


def test_pages_are_fetched_from_nowhere() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize("target", ["release", "docs"])
def test_the_makefile_has_what_the_policy_names(target: str) -> None:
    assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(), re.MULTILINE)
