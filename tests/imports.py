"""Reads who imports whom from the syntax trees: at the top, inside functions and for type checkers alike."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "hart_runtime"
ROOT = Path(__file__).parent.parent
ROOMS = sorted(link.name for link in (ROOT / "src" / PACKAGE).iterdir() if link.is_symlink())
"""The top-level folders that are in the package."""

Graph = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {PACKAGE: ROOT / "src" / PACKAGE / "__init__.py"}
    for file in itertools.chain.from_iterable((ROOT / room).rglob("*.py") for room in ROOMS):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    return found


def imported(file: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_graph() -> Graph:
    """Modules of the package and the modules of the package that they import."""
    files = sources()

    def owner(name: str) -> str | None:
        while name not in files and "." in name:
            name = name.rpartition(".")[0]
        return name if name in files else None

    edges = {name: {owner(target) for target in imported(file)} for name, file in files.items()}
    return {name: {t for t in targets if t and t != name} for name, targets in edges.items()}


def room_graph() -> Graph:
    """The same between folders."""
    rooms: Graph = {room: set() for room in ROOMS}
    for name, targets in module_graph().items():
        for target in targets:
            if name.count(".") and target.count("."):
                mine, theirs = name.split(".")[1], target.split(".")[1]
                rooms[mine] |= {theirs} - {mine}
    return rooms


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph[node]
        return seen

    reach = {node: reached(node) for node in graph}
    inside = {node: frozenset(o for o in reach[node] if node in reach[o]) for node in graph}
    return sorted(sorted(group) for group in {group for group in inside.values() if group})
