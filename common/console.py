"""What the commands have in common: how they are declared, how they speak and how they end."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.settings import KINDS, LIMITS
from hart_runtime.common.version import __version__

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

PATH_OF_BUNDLE = "--engine"
PARAMETER = r"`(\w+)(?:=('[^`]*'|\"[^`]*\"|[^`'\"]+))?`"
"""A parameter in a message, see :class:`hart_runtime.common.errors.InputError`."""


def command(**options: Any) -> Callable[[Callable[P, None]], click.Command]:
    """``click.command`` with what all of ours have: ``-h``, ``--version``, and errors in a sentence."""
    return _declared(click.command, options)


def group(**options: Any) -> Callable[[Callable[P, None]], click.Group]:
    """The same for a command that holds commands."""
    return _declared(click.group, options)


def _declared(kind: Callable[..., Any], options: dict[str, Any]) -> Callable[[Callable[P, None]], Any]:
    def declare(function: Callable[P, None]) -> Any:
        settings = {"help_option_names": ["-h", "--help"]}
        version = click.version_option(__version__, message="%(prog)s %(version)s")
        return kind(context_settings=settings, **options)(version(ends_with_a_sentence(function)))

    return declare


def sampling_options(function: F) -> F:
    """An option for every sampling setting; each is None where it is not given."""
    for name, limits in reversed(LIMITS.items()):
        flag, switch = name.replace("_", "-"), bool in KINDS[name]
        option = click.option(
            f"--{flag}/--no-{flag}" if switch else f"--{flag}",
            type=None if switch else KINDS[name][0],
            default=None,
            help=f"{limits.help} [default: the bundle's]",
        )
        function = option(function)
    return function


def ends_with_a_sentence(function: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line on stderr: exit code 2 for bad input, 1 for a failed run."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = logging.StreamHandler()
        handler.addFilter(_once())
        handler.setFormatter(_Sentence())
        root = logging.getLogger()
        root.addHandler(handler)
        logging.getLogger("hart_runtime").setLevel(logging.INFO)
        # A polite kill cleans up as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            function(*args, **kwargs)
        except InputError as error:
            click.echo(f"error: {in_options(str(error))}", err=True)
            sys.exit(2)
        except RunError as error:
            click.echo(f"error: {in_options(str(error))}", err=True)
            sys.exit(1)
        except OSError as error:  # no permission, no space: the system's own words will do
            click.echo(f"error: {error.filename or 'system'}: {error.strerror or error}", err=True)
            sys.exit(2)
        finally:
            root.removeHandler(handler)

    return wrapped


def in_options(message: str) -> str:
    """A message of the library in the words of the command that runs: options for parameters."""
    return re.sub(PARAMETER, _spelled, message)


def _spelled(match: re.Match[str]) -> str:
    import ast
    import shlex

    name, value = match.groups()
    context = click.get_current_context(silent=True)
    declared = {p.name: p for p in context.command.params} if context else {}
    found = declared.get(name)
    if isinstance(found, click.Argument):
        return found.human_readable_name.strip("[].")
    names = found.opts if found else [PATH_OF_BUNDLE if name == "bundle" else f"--{name.replace('_', '-')}"]
    option = max(names, key=len)
    if value is None or value == "True":
        return option
    if value == "False":
        return found.secondary_opts[0] if found and found.secondary_opts else f"--no-{option[2:]}"
    with contextlib.suppress(ValueError, SyntaxError):  # a word such as FILE stands for itself
        value = str(ast.literal_eval(value))
    return f"{option} {value if value.isupper() else shlex.quote(value)}"


class _Sentence(logging.Formatter):
    """One line, with what it is in front."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        return f"{kind}: {in_options(record.getMessage())}"


def _once() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets every sentence through once."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in said
        said.add(message)
        return fresh

    return new
