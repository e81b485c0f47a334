"""Text features to pixels: the second half of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.backend import Backend, Values
from hart_runtime.runtime.loop import Drawing, Snapshot, draw, drawn
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Program

MOST_PROGRAMS = 8
"""Programs that are kept, one for each batch size and choice of settings."""


class Drawer:
    """Draws with a bundle on a backend; from several threads one drawing after another."""

    def __init__(self, manifest: Manifest, backend: Backend, threads: int | None = None) -> None:
        """``threads``: that the host draws random numbers with, at most."""
        self.manifest, self.backend, self.threads = manifest, backend, threads
        self._programs: dict[tuple[SamplingSettings, int], Program] = {}

    def __call__(
        self,
        given: Values,
        seeds: Sequence[int],
        settings: SamplingSettings,
        watch: Callable[[Snapshot], None] | None = None,
    ) -> Drawing:
        """A picture per seed; ``watch`` is told of every step. See :func:`hart_runtime.runtime.loop.draw`."""
        snapshots = self.steps(given, seeds, settings, paced=watch is not None)
        return drawn(snapshots, watch or (lambda _: None))

    def steps(
        self, given: Values, seeds: Sequence[int], settings: SamplingSettings, paced: bool = True
    ) -> Generator[Snapshot, None, None]:
        """The same, step by step."""
        program = self._program(settings, len(seeds))
        return draw(self.backend, program, given, SeededNoise(seeds), paced, self.threads)

    def check(self, settings: SamplingSettings, batch: int) -> None:
        """Refuse what the backend was not built for; raises InputError."""
        self._program(settings, batch)

    def reserve(self, batch: int) -> None:
        """Take the memory for the largest batch there will be, so that it need not grow and move later."""
        with self.backend.begin(self._program(self.manifest.sampling, batch)):
            pass

    def _program(self, settings: SamplingSettings, batch: int) -> Program:
        """Kept, so that its constants are seen to be the same."""
        program = self._programs.pop((settings, batch), None)
        if program is None:
            program = self.manifest.program(settings, batch)
            if self.backend.limits is not None:
                self.backend.limits.check(program)
        while len(self._programs) >= MOST_PROGRAMS:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[settings, batch] = program
        return program
