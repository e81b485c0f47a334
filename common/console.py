"""What the commands have in common: how they end."""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec

import click

from hart_runtime.common.errors import InputError, RunError

P = ParamSpec("P")


def ends_with_a_sentence(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line on stderr: exit code 2 for bad input, 1 for a failed run."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = logging.StreamHandler()
        handler.addFilter(_once())
        logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, handlers=[handler])
        # A polite kill cleans up as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            command(*args, **kwargs)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except RunError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except OSError as error:  # no permission, no space: the system's own words will do
            click.echo(f"error: {error.filename or 'system'}: {error.strerror or error}", err=True)
            sys.exit(2)

    return wrapped


def _once() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets every sentence through once."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in said
        said.add(message)
        return fresh

    return new
