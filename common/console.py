"""What the commands have in common: how they are declared, how they speak and how they end."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from hart_runtime.common.ending import Command, Group, ends_with_a_code
from hart_runtime.common.errors import NOTE, InputError
from hart_runtime.common.settings import KINDS, LIMITS
from hart_runtime.common.version import __version__

PACKAGE = "hart_runtime"
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

PARAMETER = r"`(\w+)(?:=('[^`]*'|\"[^`]*\"|[^`'\"]+))?`"
"""A parameter in a message, see :class:`hart_runtime.common.errors.InputError`."""
EVERYWHERE = {"bundle": "--engine"} | {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *("backend", "batch", "checkpoint", "device", "encoder", "force", "output", "precision"),
        "text_encoder",
        *LIMITS,
    )
}
"""Options of other commands than the one that runs, which a message may advise."""


class NonEmptyPath(click.Path):
    """A path; an empty word, as of a variable that is not set, is none, and not the folder we are in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("is empty", param, ctx)
        return super().convert(value, param, ctx)


class NonEmpty(click.types.StringParamType):
    """A word; an empty one, as of a variable that is not set, is a mistake, and not the default."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("is empty", param, ctx)
        return value


class FiniteRange(click.FloatRange):
    """A number from a range; NaN and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number - number != 0:
            self.fail(f"{value} is no finite number", param, ctx)
        return number


PATH, WORD = NonEmptyPath(path_type=Path), NonEmpty()


def command(
    words: Mapping[str, str] | None = None, **options: Any
) -> Callable[[Callable[P, None]], click.Command]:
    """``click.command`` with what all of ours have: ``-h``, ``--version``, and errors in a sentence.

    Args:
        words: options for parameters of the library that are called otherwise there.
    """
    return _declared(functools.partial(click.command, cls=Command), words, options)


def group(
    words: Mapping[str, str] | None = None, **options: Any
) -> Callable[[Callable[P, None]], click.Group]:
    """The same for a command that holds commands."""
    return _declared(functools.partial(click.group, cls=Group), words, options)


def _declared(
    kind: Callable[..., Any], words: Mapping[str, str] | None, options: dict[str, Any]
) -> Callable[[Callable[P, None]], Any]:
    def declare(function: Callable[P, None]) -> Any:
        settings = {"help_option_names": ["-h", "--help"]}
        version = click.version_option(__version__, message="%(prog)s %(version)s")
        made = kind(context_settings=settings, **options)(version(ends_with_a_sentence(function)))
        made.words = words or {}
        return made

    return declare


def sampling_options(whose: str) -> Callable[[F], F]:
    """An option for every sampling setting; each is None where it is not given.

    Args:
        whose: default it has then, in words.
    """

    def declare(function: F) -> F:
        for name, limits in reversed(LIMITS.items()):
            flag, switch = name.replace("_", "-"), bool in KINDS[name]
            option = click.option(
                f"--{flag}/--no-{flag}" if switch else f"--{flag}",
                type=None if switch else KINDS[name][0],
                default=None,
                help=f"{limits.help} [default: {whose}]",
            )
            function = option(function)
        return function

    return declare


def ends_with_a_sentence(function: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line on stderr and an exit code, and what is logged into more lines."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = logging.StreamHandler()
        handler.addFilter(_once())
        handler.setFormatter(_Sentence())
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            ends_with_a_code(function, in_options)(*args, **kwargs)
        finally:
            root.removeHandler(handler)

    return wrapped


def in_options(message: str) -> str:
    """A message of the library in the words of the command that runs: options for parameters."""
    kept = [text for text in _given() if "`" in text]  # the user's own backticks mark no parameter
    for number, text in enumerate(kept):
        message = message.replace(text, f"\0{number}\0")
    message = re.sub(PARAMETER, _spelled, message)
    for number, text in enumerate(kept):
        message = message.replace(f"\0{number}\0", text)
    return message


def _given() -> list[str]:
    """Paths and words of the command line that messages may repeat, the longest first."""
    context = click.get_current_context(silent=True)
    found = [str(Path.cwd())]
    while context is not None:
        for value in context.params.values():
            values = value if isinstance(value, tuple) else (value,)
            texts = [str(item) for item in values if isinstance(item, str | Path)]
            found += [*texts, *(str(Path(text).absolute()) for text in texts), *map(repr, texts)]
        context = context.parent
    return sorted(set(found), key=len, reverse=True)


def _spelled(match: re.Match[str]) -> str:
    import ast
    import shlex

    name, value = match.groups()
    context = click.get_current_context(silent=True)
    if context is None:
        return match[0]
    found = {p.name: p for p in context.command.params}.get(name)
    if isinstance(found, click.Argument):
        return found.human_readable_name.strip("[].")
    words: Mapping[str, str] = getattr(context.command, "words", {})
    option = max(found.opts, key=len) if found else words.get(name, EVERYWHERE.get(name))
    if option is None:
        return match[0]  # of no command: somebody's own words
    if value is None or value == "True":
        return option
    if value == "False":
        return found.secondary_opts[0] if found and found.secondary_opts else f"--no-{option[2:]}"
    with contextlib.suppress(ValueError, SyntaxError):  # a word such as FILE stands for itself
        value = str(ast.literal_eval(value))
    return f"{option} {value if re.fullmatch('[A-Z_]+', value) else shlex.quote(value)}"


class _Sentence(logging.Formatter):
    """One line, with what it is in front. Only our own sentences speak of parameters, and prompts do not."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "note" if record.levelno == NOTE else "warning"
        if not record.name.startswith(PACKAGE):
            return f"{kind}: {record.getMessage()}"
        errors = tuple(
            in_options(str(arg)) if isinstance(arg, InputError) else arg for arg in record.args or ()
        )
        return f"{kind}: {in_options(str(record.msg)) % errors}"


def _once() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets every sentence through once."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in said
        said.add(message)
        return fresh

    return new
