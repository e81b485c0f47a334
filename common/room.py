"""Threads and memory, which a machine gives or does not.

Libraries tell of a limit in words of their own, as of a file that they cannot use, or wait for ever for a
thread that the system refused.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import threading
from collections.abc import Iterator

from hart_runtime.common.errors import InputError, RunError, first_line

REFUSED = re.compile(
    r"bad_alloc|allocat(e|ion)|out of memory|failed to map segment|pthread_create|start new thread"
    r"|resource temporarily unavailable|available frontends: (?!.*\bonnx\b)",
    re.IGNORECASE,
)
"""What libraries and the system say where there is no room."""
MEND = "free some memory, or raise the limits on memory and tasks (ulimit, container)"

PATIENCE = 5.0
"""Seconds in which a thread has begun on any machine."""


def failure(what: str, reason: str, mend: str) -> InputError | RunError:
    """The error of a library that could not load something.

    Args:
        what: begins the message.
        reason: all that the library says; its first line is repeated.
        mend: what to do if it is not the machine.
    """
    said = first_line(reason)
    if REFUSED.search(reason):
        return RunError(f"{what}: the system gave no room for it ({said}); {MEND}")
    return InputError(f"{what} ({said}); {mend}")


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def can_start(count: int) -> bool:
    """Whether the system lets this process have so many more threads; they are started, and end at once.

    ``threading.Thread.start`` waits for its thread without an end, also for one that the system gives and
    that then finds no memory to begin with: these say themselves that they began.
    """
    gate, begun, ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def stay() -> None:
        begun.release()
        gate.wait()
        ended.release()

    running = 0
    try:
        for _ in range(count):
            _thread.start_new_thread(stay, ())
            if not begun.acquire(timeout=PATIENCE):
                return False
            running += 1
    except (RuntimeError, MemoryError):
        return False
    finally:
        gate.set()
        for _ in range(running):
            ended.acquire(timeout=PATIENCE)
    return True


@contextlib.contextmanager
def told_of_room() -> Iterator[None]:
    """Turn Python's errors where a thread is refused, or memory for a module, into a RunError."""
    try:
        yield
    except (RuntimeError, ImportError) as error:
        if isinstance(error, RunError) or not REFUSED.search(str(error)):
            raise
        raise RunError(f"the system gave no room ({error}); {MEND}") from None
