"""What engines hold: how many pictures at once, how many codes kept per token, which tokens are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.pruning import pruning_of
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.backend import Limits
from hart_runtime.runtime.backends.names import ONNXRUNTIME
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Program
from hart_runtime.runtime.tensorrt.builder import BuildOptions
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

    def check(self, program: Program, settings: SamplingSettings) -> None:
        options = self.engines.options
        self._check_left_out(settings)
        if program.batch not in self.batches:
            low, high = min(options.batches[0], program.batch), max(options.batches[1], program.batch)
            raise InputError(
                f"{parameter('batch', program.batch)}: {self._hold('pictures at once', options.batches)}; "
                f"build others with: {self._command(replace(options, batches=(low, high)))}"
            )
        for run in program.runs():
            for name in sorted(self.manifest.contract(run.graph).deciding()):
                ranges = [profile.values[name] for profile in self.engines.engines[run.graph].profiles]
                held, value = ranges[run.index if len(ranges) > 1 else 0], run.constants[name].tolist()
                if not held.holds(value):
                    self._refuse(name, value[0], held, run.index)

    def _check_left_out(self, settings: SamplingSettings) -> None:
        """Refuse to leave out what these engines compute, or other tokens than they leave out."""
        if settings.exact:
            return
        built, model = self.engines.options.keep, self.manifest.model
        asked = pruning_of(model.patch_nums, settings.keep) if settings.prune else None
        if built is not None and asked == pruning_of(model.patch_nums, built):
            return
        if built is None:
            said = (
                "`prune` and `unguided_scales`: the engines in {} compute all tokens of both guidance halves"
            )
        else:
            said = f"`prune` and `keep`: the engines in {{}} draw with {parameter('prune', True)} and "
            said += f"{parameter('keep', built)}, or leave nothing out"
        mend = [f"use {parameter('backend', ONNXRUNTIME)}"]
        if asked is not None:
            mend.append(
                f"build others with: {self._command(replace(self.engines.options, keep=settings.keep))}"
            )
        raise InputError(f"{said.format(self.folder.name)}; {', or '.join(mend)}")

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
        raise InputError(f"{said}; build others with: {self._command(replace(options, top_k=asked))}")

    def _hold(self, what: str, held: tuple[int, int]) -> str:
        return f"the engines in {self.folder.name} hold {spelled(held)} {what}"

    def _command(self, options: BuildOptions) -> str:
        more = [parameter("batch", spelled(options.batches))] if options.batches != (1, 1) else []
        more += [f"`top_k='{spelled(options.top_k)}'`"] if options.top_k else []
        more += [parameter("keep", options.keep)] if options.keep else []
        return " ".join([build_command(self.folder.parent, self.engines.package), *more])
