"""What engines hold: how many pictures at once, and how many codes kept per token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.runtime.backends.backend import Limits
from hart_runtime.runtime.backends.names import ONNXRUNTIME
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Program
from hart_runtime.runtime.tensorrt.manifest import EngineManifest, build_command, spelled
from hart_runtime.runtime.tensorrt.profiles import LARGEST_TOP_K, Range


@dataclass(frozen=True)
class EngineLimits(Limits):
    """Those of the engines in a folder of a bundle."""

    folder: Path
    engines: EngineManifest
    manifest: Manifest

    @property
    def batches(self) -> range:
        low, high = self.engines.options.batches
        return range(low, high + 1)

    def check(self, program: Program) -> None:
        options = self.engines.options
        if program.batch not in self.batches:
            low, high = min(options.batches[0], program.batch), max(options.batches[1], program.batch)
            raise InputError(
                f"{parameter('batch', program.batch)}: {self._hold('pictures at once', options.batches)}; "
                f"build others with: {self._command(batch=(low, high), top_k=options.top_k)}"
            )
        for run in program.runs():
            if run.graph not in self.engines.engines:
                raise InputError(
                    f"`prune` and `unguided_scales`: the engines in {self.folder.name} compute all tokens of "
                    f"both guidance halves; use {parameter('backend', ONNXRUNTIME)}"
                )
            for name in sorted(self.manifest.contract(run.graph).deciding()):
                ranges = [profile.values[name] for profile in self.engines.engines[run.graph].profiles]
                held, value = ranges[run.index if len(ranges) > 1 else 0], run.constants[name].tolist()
                if not held.holds(value):
                    self._refuse(name, value[0], held, run.index)

    def _refuse(self, name: str, value: int, held: Range, scale: int) -> None:
        there = self._hold(f"codes a token at scale {scale}", (held.min[0], held.max[0]))
        said = f"{parameter(name, value)}: {there}"
        if value > LARGEST_TOP_K:
            raise InputError(
                f"{said}, and {self.engines.package} keeps at most {LARGEST_TOP_K}; ask for fewer, or use "
                f"{parameter('backend', ONNXRUNTIME)}"
            )
        options = self.engines.options
        low, high = options.top_k or (value, value)
        asked = (min(low, value), max(high, value))
        raise InputError(f"{said}; build others with: {self._command(batch=options.batches, top_k=asked)}")

    def _hold(self, what: str, held: tuple[int, int]) -> str:
        return f"the engines in {self.folder.name} hold {spelled(held)} {what}"

    def _command(self, batch: tuple[int, int], top_k: tuple[int, int] | None) -> str:
        more = [parameter("batch", spelled(batch))] if batch != (1, 1) else []
        more += [f"`top_k='{spelled(top_k)}'`"] if top_k else []
        return " ".join([build_command(self.folder.parent, self.engines.package), *more])
