"""What a builder of the played TensorRT is told: settings, profiles, timing caches; and who listens to it."""

from __future__ import annotations

import ctypes
import json
from typing import TYPE_CHECKING, Any

from tests.strict.building import build_plan, mistakes
from tests.strict.plan import Profile

if TYPE_CHECKING:
    from tests.strict.tensorrt import StrictTensorRT


class ILogger:
    """What everybody logs to; a user's own is derived from it."""

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Logger:
    _trt: StrictTensorRT

    def __init__(self, min_severity: Any = None) -> None:
        self._least = self._trt.api.ILogger.WARNING if min_severity is None else min_severity

    @property
    def min_severity(self) -> Any:
        return self._least

    @min_severity.setter
    def min_severity(self, value: Any) -> None:
        self._least = value

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) <= int(self._least):
            self._trt.printed.append(msg)


class IHostMemory:
    """Bytes that a library gave: these are made by :func:`host_memory`, with a buffer to read."""

    @property
    def nbytes(self) -> int:
        return ctypes.sizeof(self)  # type: ignore[arg-type]


def host_memory(trt: StrictTensorRT, content: bytes) -> Any:
    """An IHostMemory with this content."""
    kind = type("IHostMemory", (trt.api.IHostMemory, ctypes.c_ubyte * len(content)), {})
    return kind.from_buffer_copy(content)  # type: ignore[attr-defined]


class IProgressMonitor:
    def __init__(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class IOptimizationProfile:
    def _setup(self) -> None:
        self._shapes: Profile = {}
        self._values: Profile = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self._shapes[input] = _increasing(input, min, opt, max)

    def get_shape(self, input: str) -> list[Any]:  # noqa: A002
        return [*self._shapes[input]]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self._values[input] = _increasing(input, min, opt, max)

    def get_shape_input(self, input: str) -> list[Any]:  # noqa: A002
        return [*self._values[input]]


def _increasing(name: str, *ranges: Any) -> tuple[tuple[int, ...], ...]:
    low, best, high = (tuple(int(n) for n in r) for r in ranges)
    if not len(low) == len(best) == len(high) or any(
        not a <= b <= c for a, b, c in zip(low, best, high, strict=True)
    ):
        raise ValueError(f"Dimensions of {name} are not in order: {low}, {best}, {high}")
    return low, best, high


class ITimingCache:
    _trt: StrictTensorRT

    def _setup(self, made_by: list[str], tactics: set[str]) -> None:
        self._made_by, self._tactics = made_by, tactics

    def serialize(self) -> Any:
        content = {"made by": self._made_by, "tactics": sorted(self._tactics)}
        return host_memory(self._trt, json.dumps(content).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if input_cache._made_by != self._made_by and not ignore_mismatch:
            return False
        self._tactics |= input_cache._tactics
        return True

    def reset(self) -> bool:
        self._tactics.clear()
        return True


def _setting(name: str, default: Any) -> property:
    """One that changes nothing here."""

    def get(self: Any) -> Any:
        return self._settings.get(name, default)

    def set_to(self: Any, value: Any) -> None:
        self._settings[name] = value

    return property(get, set_to)


class IBuilderConfig:
    _trt: StrictTensorRT

    def _setup(self, logger: Any) -> None:
        self._logger = logger
        self._flags = {"TF32"}
        self._profiles: list[Any] = []
        self._limits: dict[str, int] = {}
        self._timing: Any = None
        self._monitor: Any = None
        self._settings: dict[str, Any] = {}
        self._verbosity = self._trt.api.ProfilingVerbosity.LAYER_NAMES_ONLY
        self._compatibility = self._trt.api.HardwareCompatibilityLevel.NONE
        self._capabilities: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._trt.api.BuilderFlag(flag).name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self._trt.api.BuilderFlag(flag).name)

    def get_flag(self, flag: Any) -> bool:
        return self._trt.api.BuilderFlag(flag).name in self._flags

    @property
    def flags(self) -> int:
        return sum(1 << int(flag) for flag in self._trt.api.BuilderFlag if flag.name in self._flags)

    @flags.setter
    def flags(self, value: int) -> None:
        self._flags = {flag.name for flag in self._trt.api.BuilderFlag if value >> int(flag) & 1}

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limits[self._trt.api.MemoryPoolType(pool).name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._limits.get(self._trt.api.MemoryPoolType(pool).name, self._trt.card.memory)

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        content = bytes(serialized_timing_cache)
        if not content:
            return self._trt.make("ITimingCache", self._trt.builds_for, set())
        try:
            read = json.loads(content)
            return self._trt.make("ITimingCache", read["made by"], {*read["tactics"]})
        except (ValueError, KeyError, TypeError):
            self._trt.log(self._logger, "ERROR", "The timing cache is damaged")
            return None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._made_by != self._trt.builds_for and not ignore_mismatch:
            self._trt.log(self._logger, "ERROR", "The timing cache is of another device or version")
            return False
        self._timing = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._timing

    @property
    def progress_monitor(self) -> Any:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, value: Any) -> None:
        self._monitor = value

    @property
    def profiling_verbosity(self) -> Any:
        return self._verbosity

    @profiling_verbosity.setter
    def profiling_verbosity(self, value: Any) -> None:
        self._verbosity = self._trt.api.ProfilingVerbosity(value)

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._compatibility

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, value: Any) -> None:
        self._compatibility = self._trt.api.HardwareCompatibilityLevel(value)

    builder_optimization_level = _setting("builder_optimization_level", 3)
    max_aux_streams = _setting("max_aux_streams", -1)
    avg_timing_iterations = _setting("avg_timing_iterations", 1)
    max_num_tactics = _setting("max_num_tactics", -1)
    tiling_optimization_level = _setting("tiling_optimization_level", None)

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, value: int) -> None:
        self._capabilities = [self._trt.api.ComputeCapability.NONE] * value

    def get_compute_capability(self, index: int) -> Any:
        return self._capabilities[index]

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self._capabilities[index] = self._trt.api.ComputeCapability(compute_capability)
        return True


class Builder:
    _trt: StrictTensorRT

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        if not self._trt.ahead_of_time:
            self._trt.needs_a_device(logger)

    @property
    def logger(self) -> Any:
        return self._logger

    def create_network(self, flags: int = 0) -> Any:
        return self._trt.make("INetworkDefinition", int(flags))

    def create_builder_config(self) -> Any:
        return self._trt.make("IBuilderConfig", self._logger)

    def create_optimization_profile(self) -> Any:
        return self._trt.make("IOptimizationProfile")

    def is_network_supported(self, network: Any, config: Any) -> bool:
        return network._parsed is not None

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        reason = self._trt.fail_build or "; ".join(mistakes(self._trt, network, config))
        if reason:
            self._trt.log(self._logger, "ERROR", reason)
            return None
        plan = build_plan(self._trt, network._parsed, config)
        return None if plan is None else host_memory(self._trt, plan.serialize())
