"""How commands end: with one line on stderr where something failed, and an exit code that says what.

0: done. 1: the run failed, such as for want of room or memory. 2: bad input, before anything was drawn.
129, 130 and 143: SIGHUP, SIGINT and SIGTERM. 141: who read the output has gone, of which nothing is said.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ParamSpec

import click

from hart_runtime.common.errors import NO_ROOM, InputError, RunError
from hart_runtime.common.room import told_of_room

P = ParamSpec("P")
FAILED, BAD_INPUT, BY_SIGNAL = 1, 2, 128
PLACES = {errno.ENOMEM: "memory", errno.EAGAIN: "another process", errno.EMFILE: "another open file"}
"""What errors of the system are about that name no file."""
POLITE = ("SIGTERM", "SIGHUP")
"""Signals that clean up as Ctrl-C does: a kill, and a terminal that is closed."""


class Terminated(KeyboardInterrupt):
    """One of the polite signals."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextlib.contextmanager
def signals_clean_up() -> Iterator[None]:
    """Let the polite signals raise; those that are ignored, as by nohup, stay so. Only in the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in POLITE if hasattr(signal, name)]
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ends_with_a_code(function: Callable[P, Any], spelled: Callable[[str], str] = str) -> Callable[P, Any]:
    """Turn errors into one line on stderr and an exit code.

    Args:
        spelled: puts a message into the words of the command that runs.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            with signals_clean_up(), told_of_room():
                done = function(*args, **kwargs)
                _flush()
                return done
        except InputError as error:
            _end(BAD_INPUT, f"error: {spelled(str(error))}")
        except RunError as error:
            _end(FAILED, f"error: {spelled(str(error))}")
        except MemoryError:
            _end(FAILED, "error: there is not enough memory")
        except KeyboardInterrupt as stopped:
            number = stopped.number if isinstance(stopped, Terminated) else signal.SIGINT
            _end(BY_SIGNAL + number, "stopped")
        except BrokenPipeError:
            _end(BY_SIGNAL + signal.SIGPIPE, None)
        except OSError as error:  # no permission, no space: the system's own words will do
            place = error.filename or PLACES.get(error.errno or 0, "standard output, or another open file")
            failed = error.errno in NO_ROOM
            _end(FAILED if failed else BAD_INPUT, f"error: {place}: {error.strerror or error}")

    return wrapped


class Ending:
    """For commands: what click itself writes, such as help, ends no worse than what the command does."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As click's, which takes a reader that has gone for a failure, and writes into a full device."""
        _any_text()
        try:
            return ends_with_a_code(super().main)(*args, **options)  # type: ignore[misc]
        except SystemExit as end:
            if end.code == FAILED and type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # click's
                _end(BY_SIGNAL + signal.SIGPIPE, None)
            raise


class Command(Ending, click.Command):
    """A command that ends with a sentence."""


class Group(Ending, click.Group):
    """The same for one that holds commands."""


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _any_text() -> None:
    """Names of files need not be text of the terminal's encoding; a picture is not lost over its name."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        utf_8 = sys.stdout.encoding.lower() == "utf-8"
        reconfigure(errors="surrogateescape" if utf_8 else "backslashreplace")


def _end(code: int, said: str | None) -> None:
    if said is not None:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            click.echo(said, err=True)
    try:
        _flush()
    except OSError:  # what is still to be written is written nowhere, or Python would complain at its end
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    sys.exit(code)
