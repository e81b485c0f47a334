"""Random numbers, drawn by the host while the device computes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor

from hart_runtime.common.noise import Noise
from hart_runtime.common.room import cores, told_of_room
from hart_runtime.runtime.program import Arrays, Program, Run, none

MOST_THREADS = 4
"""One draws a published picture's numbers in a fifth of the time that a device needs for the rest of it."""


class Ahead:
    """All random arrays of a drawing, in the order of use. Numbers do not depend on threads."""

    def __init__(self, program: Program, noise: Noise, threads: int | None = None) -> None:
        """``threads``: that draw at once, at most; None for as many as there are cores."""
        self._pool = ThreadPoolExecutor(min(threads or cores(), MOST_THREADS), thread_name_prefix="random")
        runs = [run for run in program.runs() if run.random is not none]
        with told_of_room():
            self._coming = deque(self._pool.submit(run.random, noise) for run in runs)

    def take(self, run: Run) -> Arrays:
        """What the next run of the program is fed; waits if it is not drawn yet."""
        return {} if run.random is none else self._coming.popleft().result()

    def close(self) -> None:
        """Draw no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
