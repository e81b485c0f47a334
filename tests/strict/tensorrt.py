"""Plays ``tensorrt`` of several versions, and ``tensorrt_rtx``, on played devices."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tests.strict import builder, context, engine, network
from tests.strict.api import RTX, enumeration, enumerations, face
from tests.strict.device import Card, Refused, StrictCuda
from tests.strict.rules import BrokenRule

PLAYED = (
    *(builder.ILogger, builder.Logger, builder.IHostMemory, builder.IProgressMonitor, builder.Builder),
    *(builder.IOptimizationProfile, builder.ITimingCache, builder.IBuilderConfig),
    *(network.Dims, network.ITensor, network.ILayer, network.INetworkDefinition, network.ParserError),
    *(network.OnnxParser, engine.IStreamReader, engine.IStreamReaderV2, engine.Runtime, engine.ICudaEngine),
    *(engine.EngineInspector, engine.IRuntimeCache, engine.IRuntimeConfig, context.IExecutionContext),
)
"""Every class that is played, in an order in which bases come first."""
AHEAD_OF_TIME = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX builds for."""


class StrictTensorRT:
    """What is behind the classes of one version: the device, what tests set, and what they look at."""

    def __init__(self, cuda: StrictCuda, version: str) -> None:
        self.cuda, self.version = cuda, version
        self.ahead_of_time = version == RTX
        self.system = f"{platform.system()}-{platform.machine()}".lower()
        self.printed: list[str] = []
        """What loggers of its own said."""
        self.fail_build = ""
        """Why the next builds fail, if they do."""
        self.fuses_attention = True
        self.seconds_per_tactic = 0.0
        self.tactics_timed = 0
        self.api: Any = ModuleType("tensorrt_rtx" if self.ahead_of_time else "tensorrt")
        vars(self.api)["__version__"] = version.removeprefix("rtx-")
        vars(self.api).update(enumerations(version))
        for played in PLAYED:
            base = self.api.ILogger if played is builder.Logger else None
            shown = face(version, played, base, _trt=self)
            if shown is not None:
                setattr(self.api, played.__name__, shown)
        levels = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
        self.api.ILogger.Severity = enumeration("Severity", {level: n for n, level in enumerate(levels)})
        for level in levels:
            setattr(self.api.ILogger, level, self.api.ILogger.Severity[level])

    @property
    def card(self) -> Card:
        """Of the GPU that is used; one that says nothing where there is none."""
        return self.cuda.cards[self.cuda.device()] if self.cuda.cards else Card(memory=0)

    @property
    def runs_here(self) -> bool:
        return ".".join(map(str, self.card.capability)) in AHEAD_OF_TIME

    @property
    def builds_for(self) -> list[str]:
        """What a timing cache is good for."""
        return [self.version, self.card.name, ".".join(map(str, self.card.capability))]

    def targets(self, config: Any) -> list[str]:
        """Compute capabilities that a plan is for."""
        here = ".".join(map(str, self.card.capability))
        if not self.ahead_of_time:
            return [here]
        named = [c.name for c in config._capabilities if c.name != "NONE"]
        return [here if n == "CURRENT" else f"{n[2:-1]}.{n[-1]}" for n in named] or [*AHEAD_OF_TIME]

    def make(self, cls: str, *arguments: Any) -> Any:
        """An object of a class that users do not make."""
        made = object.__new__(getattr(self.api, cls))
        made._setup(*arguments)
        return made

    def log(self, logger: Any, severity: str, message: str) -> None:
        logger.log(self.api.ILogger.Severity[severity], message)

    def needs_a_device(self, logger: Any) -> None:
        """Raises TypeError, as pybind11 does for what the library did not make."""
        try:
            self.cuda.enter("TensorRT")
        except Refused as refused:
            self.log(logger, "ERROR", f"CUDA initialization failure with error: {int(refused.status)}")
            raise TypeError("pybind11::init(): factory function returned nullptr") from None

    def breaks(self, number: int, call: str, why: str) -> None:
        raise self.cuda.note(BrokenRule(number, call, why))

    @contextlib.contextmanager
    def strictly(self) -> Iterator[None]:
        """What is inside has the device for itself, and a rule that is broken there stays broken."""
        with self.cuda.lock:
            self.cuda.tell()
            try:
                yield
            except BrokenRule as broken:
                self.cuda.note(broken)
                raise
