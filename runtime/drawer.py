"""Text features to pixels: the second half of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.backend import Backend, Values
from hart_runtime.runtime.loop import Drawing, Edit, Snapshot, draw, drawn, unchanged
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Program

MOST_PROGRAMS = 8
"""Programs that are kept, one for each batch size, choice of settings, and whether pictures are given."""


class Drawer:
    """Draws with a bundle on a backend; from several threads one drawing after another."""

    def __init__(self, manifest: Manifest, backend: Backend, threads: int | None = None) -> None:
        """``threads``: that the host draws random numbers with, at most."""
        self.manifest, self.backend, self.threads = manifest, backend, threads
        self._programs: dict[tuple[SamplingSettings, int, bool], Program] = {}

    def __call__(
        self,
        given: Values,
        seeds: Sequence[int],
        settings: SamplingSettings,
        watch: Callable[[Snapshot], None] | None = None,
        edit: Edit | None = None,
    ) -> Drawing:
        """A picture per seed; ``watch`` is told of every step. See :func:`hart_runtime.runtime.loop.draw`.

        Args:
            edit: puts in what is kept of given pictures, such as :class:`hart_runtime.runtime.editing.Kept`.
        """
        snapshots = self.steps(given, seeds, settings, watch is not None, edit)
        return drawn(snapshots, watch or (lambda _: None))

    def steps(
        self,
        given: Values,
        seeds: Sequence[int],
        settings: SamplingSettings,
        paced: bool = True,
        edit: Edit | None = None,
    ) -> Generator[Snapshot, None, None]:
        """The same, step by step."""
        program = self._program(settings, len(seeds), edit is not None)
        noise = SeededNoise(seeds)
        return draw(self.backend, program, given, noise, paced, self.threads, edit or unchanged)

    def check(self, settings: SamplingSettings, batch: int, edited: bool = False) -> None:
        """Refuse what the backend was not built for; raises InputError."""
        self._program(settings, batch, edited)

    def reserve(self, batch: int) -> None:
        """Take the memory for the largest batch there will be, so that it need not grow and move later."""
        with self.backend.begin(self._program(self.manifest.sampling, batch)):
            pass

    def _program(self, settings: SamplingSettings, batch: int, edited: bool = False) -> Program:
        """Kept, so that its constants are seen to be the same."""
        program = self._programs.pop((settings, batch, edited), None)
        if program is None:
            program = self.manifest.program(settings, batch, edited)
            if self.backend.limits is not None:
                self.backend.limits.check(program, settings)
        while len(self._programs) >= MOST_PROGRAMS:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[settings, batch, edited] = program
        return program
