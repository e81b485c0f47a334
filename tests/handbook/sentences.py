"""Every sentence that the project ends with, read from the syntax trees: what raises it, and its words.

What is filled in when it is said is a hole, written as ``…``. Names of constants stand for their text,
parameters for the options that commands print in their place, and words that are made elsewhere (in a
variable, by a function, by who calls) are followed there.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from hart_runtime.batch.cli import main as batch
from hart_runtime.bench.cli import main as bench
from hart_runtime.common.console import EVERYWHERE
from hart_runtime.compare.cli import main as compare
from hart_runtime.export.cli import main as export
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.tensorrt.cli import main as build
from hart_runtime.serve.cli import main as serve
from tests.imports import sources

HOLE = "…"
ROOTS = frozenset({"InputError", "RunError", "Refusal", "BadParameter"})
"""What our errors are, or derive from."""
MAKERS = {"bad_field": 1, "guarded": 1, "fail": 0, **dict.fromkeys(ROOTS, 0), "Refusal": 1}
"""What makes an error of a sentence, and which of its arguments that is."""
FEWEST_WORDS = 3
"""A sentence with fewer of its own is made of its parts by who calls."""
MOST_STEPS = 4
"""That a sentence is followed."""

COMMANDS: dict[str, click.Command] = {
    "hart-export": export,
    "hart-run": run,
    "hart-serve": serve,
    "hart-batch": batch,
    "hart-bench": bench,
    "hart-compare": compare,
    "hart-build": build,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Sentence:
    """One sentence, and a place that says it."""

    text: str
    place: str
    """``room/file.py:line``."""


@dataclass(frozen=True)
class Scope:
    """Where an expression stands: what its names may be."""

    tree: ast.Module
    function: Function | None


@functools.cache
def options() -> dict[str, str]:
    """The option that commands have for a parameter, by its name; that of the first which has one."""
    found: dict[str, str] = {}
    todo = list(COMMANDS.values())
    while todo:
        one = todo.pop(0)
        todo += one.commands.values() if isinstance(one, click.Group) else ()
        words: dict[str, str] = getattr(one, "words", {})
        known = {p.name: max(p.opts, key=len) for p in one.params if isinstance(p, click.Option) and p.name}
        found = {**words, **known, **found}
    return {**found, **EVERYWHERE}


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sources().values()}


@functools.cache
def constants() -> dict[str, str]:
    """Texts and numbers that have a name of their own, which is the same wherever it is imported."""
    found: dict[str, set[str]] = {}
    for tree in trees().values():
        for node in tree.body:
            if not isinstance(node, ast.Assign):
                continue
            names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                    found.setdefault(name.id, set()).add(str(value.value))
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


@functools.cache
def error_names() -> frozenset[str]:
    """Of the classes of errors."""
    names, grown = set(ROOTS), True
    while grown:
        grown = False
        for tree in trees().values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.name not in names:
                    bases = {_last_name(base) for base in node.bases}
                    if bases & names:
                        names.add(node.name)
                        grown = True
    return frozenset(names)


def _last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def sentences() -> list[Sentence]:
    """All of them, each once, in the order of the files."""
    found: dict[str, Sentence] = {}
    for module, file in sources().items():
        tree = trees()[file]
        place = "/".join([*module.split(".")[1:-1], file.name])
        for function, call in _calls(tree, None):
            name = _last_name(call.func)
            index = MAKERS.get(name, 0 if name in error_names() else None)
            if index is None or len(call.args) <= index:
                continue
            for text in texts(call.args[index], Scope(tree, function)):
                said = f"{text} ({HOLE})" if name == "guarded" else text
                if _own_words(said):
                    found.setdefault(said, Sentence(said, f"{place}:{call.lineno}"))
    return list(found.values())


def _calls(node: ast.AST, function: Function | None) -> Iterator[tuple[Function | None, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inside = child if isinstance(child, Function) else function
        if isinstance(child, ast.Call):
            yield inside, child
        yield from _calls(child, inside)


def _own_words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{2,}", text)


def texts(node: ast.expr, scope: Scope, steps: int = MOST_STEPS) -> list[str]:
    """What an expression can say, with holes."""
    return [_of_one_place(text) for text in _raw(node, scope, steps)]


def _of_one_place(text: str) -> str:
    """Places within places, such as ``FILE: graphs.decoder[2]``, are one hole."""
    text = re.sub(rf"{HOLE}(?:\s*{HOLE}|\.{HOLE}|\[{HOLE}\])+", HOLE, text)
    return re.sub(rf"^(?:{HOLE}: )+", f"{HOLE}: ", text)


def _raw(node: ast.expr, scope: Scope, steps: int) -> list[str]:
    said = [HOLE]
    if isinstance(node, ast.Constant):
        said = [_spelled(str(node.value))]
    elif isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.FormattedValue) else v for v in node.values]
        said = _joined(parts, scope, steps)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node):
        said = _joined([node.left, node.right], scope, steps)
    elif isinstance(node, ast.IfExp):
        said = [*_raw(node.body, scope, steps), *_raw(node.orelse, scope, steps)]
    elif isinstance(node, ast.Name):
        said = _of_name(node.id, scope, steps)
    elif isinstance(node, ast.Attribute):
        said = [constants().get(node.attr, HOLE)]
    elif isinstance(node, ast.Call) and _last_name(node.func) == "parameter":
        name, value = (_raw(argument, scope, steps)[0] for argument in node.args)
        option = options().get(name, HOLE)
        said = [_given(option, value)]
    elif isinstance(node, ast.Call) and steps:
        said = _of_function(_last_name(node.func), scope, steps - 1)
    return said


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(part, ast.JoinedStr) for part in (node.left, node.right))


def _spelled(text: str) -> str:
    """Parameters in the words of the commands; of none, their names."""
    return re.sub(rf"`(\w+|{HOLE})(?:='?([^`']*)'?)?`", _option, text)


def _option(match: re.Match[str]) -> str:
    name, value = match.groups()
    option = options().get(name, f"--{HOLE}" if name == HOLE else name)
    return option if value is None else _given(option, value)


def _given(option: str, value: str) -> str:
    """An option with its value, as commands print it."""
    switches = {"True": option, "False": f"--no-{option.removeprefix('--')}"}
    return switches.get(value, f"{option} {value}")


def _joined(parts: list[ast.expr], scope: Scope, steps: int) -> list[str]:
    """Every part in its place; of parts that say several things the sentence is there for each."""
    own = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
    whole = len(_own_words(own)) >= FEWEST_WORDS
    made = [""]
    for index, part in enumerate(parts):
        place = index == 0 and _begins_sentence(parts[1:])
        said = _raw(part, scope, 0 if whole or place else steps)
        if whole and len(said) > 1 and not isinstance(part, ast.IfExp):
            said = [HOLE]
        made = [before + after for before in made for after in said]
    return [_spelled(text) for text in made]


def _begins_sentence(rest: list[ast.expr]) -> bool:
    """Whether what stands before is the place, file or field, that a sentence is about."""
    return bool(rest) and isinstance(rest[0], ast.Constant) and str(rest[0].value).startswith((": ", "; "))


def _of_name(name: str, scope: Scope, steps: int) -> list[str]:
    if name in constants():
        return [constants()[name]]
    if not steps or scope.function is None:
        return [HOLE]
    assigned = [
        text
        for node in ast.walk(scope.function)
        if isinstance(node, ast.Assign) and any(_last_name(target) == name for target in node.targets)
        for text in _raw(node.value, scope, steps - 1)
    ]
    return assigned or _of_callers(name, scope, steps - 1) or [HOLE]


def _of_callers(name: str, scope: Scope, steps: int) -> list[str]:
    """What a parameter is given by those who call in the same file."""
    assert scope.function is not None
    arguments = [argument.arg for argument in scope.function.args.args]
    if name not in arguments:
        return []
    given = []
    for function, call in _calls(scope.tree, None):
        if _last_name(call.func) != scope.function.name:
            continue
        index = arguments.index(name) - (
            arguments[0] in ("self", "cls") and isinstance(call.func, ast.Attribute)
        )
        named = [keyword.value for keyword in call.keywords if keyword.arg == name]
        for value in named or call.args[index : index + 1]:
            given += _raw(value, Scope(scope.tree, function), steps)
    return list(dict.fromkeys(given))


def _of_function(name: str, scope: Scope, steps: int) -> list[str]:
    """What a function of the same file returns."""
    for node in ast.walk(scope.tree):
        if isinstance(node, Function) and node.name == name:
            returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
            return [text for value in returned for text in _raw(value, Scope(scope.tree, node), steps)]
    return [HOLE]
