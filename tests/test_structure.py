"""The shape of the code: who may import whom, what names are known where, how large the repository is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.clones import tracked
from tests.imports import PACKAGE, ROOMS, ROOT, Graph, circles, imported, module_graph, room_graph, sources

BUDGET = 48 << 20
"""Bytes of all tracked files. A machine with a GPU takes 64 MiB at once, with what is carried beside them."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
WITHOUT_TORCH = ("batch", "common", "runtime", "serve")


def test_circles_are_found() -> None:
    graph: Graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}
    assert circles(graph) == [["b", "c"], ["d"]]


def test_no_import_circle() -> None:
    """Neither between modules nor between folders, imports inside functions and for type checkers counted."""
    modules = module_graph()
    assert len(modules) > 100
    assert modules[f"{PACKAGE}.runtime.backends.registry"] > {
        f"{PACKAGE}.runtime.backends.onnx_runtime"
    }  # inside a function
    assert circles(modules) == []
    assert circles(room_graph()) == []


def test_data_flows_one_way() -> None:
    rooms = room_graph()
    assert rooms["common"] == set()
    assert rooms["hart"] == {"common"}
    assert rooms["runtime"] == {"common", "hart"}  # hart: the safety model alone
    assert rooms["serve"] == {"common", "hart", "runtime"}  # the same, in a process of its own
    assert rooms["batch"] == {"common", "hart", "runtime"}  # the same, before anything is drawn
    reached = {
        m for m, targets in module_graph().items() for t in targets if t.startswith(f"{PACKAGE}.hart.")
    }
    asking = {m for m in reached if m.split(".")[1] in ("batch", "runtime", "serve")}
    assert asking == {f"{PACKAGE}.{m}" for m in ("batch.cli", "runtime.cli", "serve.screening")}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_rooms_without_torch(room: str) -> None:
    files = {name: file for name, file in sources().items() if name.startswith(f"{PACKAGE}.{room}")}
    assert len(files) > 5
    assert [name for name, file in files.items() if {"torch", "transformers"} & roots(file)] == []


def test_no_module_goes_by_a_second_name() -> None:
    """Ruff's ban is off in the rooms of torch, for torch's sake."""
    files = [*sources().values(), *(ROOT / "tests").glob("*.py")]
    assert [file for file in files if set(ROOMS) & roots(file)] == []


def roots(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def test_nothing_below_the_command_line_knows_an_option() -> None:
    """Library errors name parameters of the API; only files that declare options may name one."""
    found = []
    for name, file in sources().items():
        if "click" in roots(file):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and OPTION.search(node.value):
                found.append(f"{name}:{node.lineno}: {OPTION.findall(node.value)}")
    assert found == []


def test_the_repository_stays_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    files = [ROOT / name for name in tracked()]
    assert len(files) > 100
    assert sum(file.lstat().st_size for file in files) <= BUDGET
