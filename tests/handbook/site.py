"""Lays out what ``make docs`` makes a site of: ``python -m tests.handbook.site FOLDER``; needs no packages.

Documents keep their places in the repository, so that their links are the same here and there. What they link
to and is no document goes along as it is, and the docstrings of every public name are on one page.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

from tests.clones import tracked
from tests.imports import PACKAGE, ROOT

LINK = re.compile(r"\]\(([^)#:]+)")
API = """# Python

What is in `hart_runtime.__all__`, imported from `hart_runtime`. It is what [versions](versions.md) are about.
"""


def documents() -> list[Path]:
    """The Markdown files, but for those of recordings of tests."""
    return [Path(name) for name in tracked() if name.endswith(".md") and not name.startswith("tests/")]


def linked(document: Path) -> list[Path]:
    """What a document links to, from the repository's root."""
    links = LINK.findall((ROOT / document).read_text(encoding="utf-8"))
    found = [(ROOT / document.parent / link).resolve() for link in links]
    return [file.relative_to(ROOT.resolve()) for file in found if file.is_file()]


def public() -> dict[str, str]:
    """Modules of the public names, as the package itself looks them up."""
    tree = ast.parse((ROOT / "src" / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (places,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PLACES"
    )
    found: dict[str, str] = ast.literal_eval(places)
    return found


def lay_out(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for file in dict.fromkeys(file for page in documents() for file in (page, *linked(page))):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    names = (f"::: {PACKAGE}.{module}.{name}" for name, module in sorted(public().items()))
    (folder / "docs" / "api.md").write_text("\n\n".join([API, *names]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
