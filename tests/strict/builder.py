"""The builder of the played TensorRT: settings, profiles, timing caches, and plans as they come out."""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx
from onnx import ModelProto

from tests.strict import sizes
from tests.strict.network import DATA_TYPES, Parsed
from tests.strict.parser import LARGEST_K, Attention, attentions
from tests.strict.plan import Plan, Profile, Tensor

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


class IBuilderConfig:
    _trt: StrictTensorRT

    def _setup(self, logger: Any) -> None:
        self._logger = logger
        self._flags = {"TF32"}
        self._profiles: list[Any] = []
        self._limits: dict[str, int] = {}
        self._timing: Any = None
        self._monitor: Any = None
        self._level = 3
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

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, value: int) -> None:
        self._level = value

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
        reason = self._trt.fail_build or "; ".join(_mistakes(self._trt, network, config))
        if reason:
            self._trt.log(self._logger, "ERROR", reason)
            return None
        plan = _build(self._trt, network._parsed, config)
        return None if plan is None else host_memory(self._trt, plan.serialize())


def _mistakes(trt: StrictTensorRT, network: Any, config: Any) -> Iterator[str]:
    """What a builder refuses a network and its settings for."""
    parsed: Parsed | None = network._parsed
    if parsed is None or not parsed.model.graph.output:
        yield "Network must have at least one output"
        return
    if trt.version.startswith("10") and not network.get_flag(
        trt.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    ):
        trt.breaks(29, "build_serialized_network", "a network that is not strongly typed keeps no types")
    if clash := {"FP16", "BF16", "INT8", "FP8"} & config._flags:
        yield f"{', '.join(sorted(clash))}: precision flags are not allowed with strongly typed networks"
    if trt.ahead_of_time and "CURRENT" in {c.name for c in config._capabilities} and not trt.runs_here:
        yield f"Cannot compile for target(s) {trt.card.capability}: not supported"
    fed = {value.name: parsed.shape(value) for value in network._fed}
    for number, profile in enumerate(config._profiles):
        for name, shape in fed.items():
            if name in parsed.shape_inputs:
                if name not in profile._values:
                    yield f"profile {number}: shape input {name} has no values"
                elif max(profile._values[name][2]) > LARGEST_K and _decides_k(parsed.model, name):
                    yield f"profile {number}: K of TopK may not pass {LARGEST_K}"
            elif "?" in shape or any(isinstance(n, str) for n in shape):
                if name not in profile._shapes:
                    yield f"profile {number}: input {name} is dynamic and has no shape"
                elif not _fits(shape, profile._shapes[name]):
                    yield f"profile {number}: shapes of {name} contradict {shape}"
    if not config._profiles and any(isinstance(n, str) for shape in fed.values() for n in shape):
        yield "Network has dynamic or shape inputs, but no optimization profile has been defined"


def _decides_k(model: ModelProto, name: str) -> bool:
    return any(node.op_type == "TopK" for node in model.graph.node) and bool(name)


def _fits(shape: tuple[int | str, ...], ranges: tuple[tuple[int, ...], ...]) -> bool:
    return all(
        len(found) == len(shape)
        and all(isinstance(n, str) or n == m for n, m in zip(shape, found, strict=True))
        for found in ranges
    )


def _build(trt: StrictTensorRT, parsed: Parsed, config: Any) -> Plan | None:
    """A plan, or None if the progress monitor ends it."""
    known = []
    fed = {value.name: parsed.shape(value) for value in parsed.model.graph.input}
    fixed: Profile = {
        name: ((tuple(shape),) * 3)  # type: ignore[misc]
        for name, shape in fed.items()
        if not any(isinstance(n, str) for n in shape)
    }
    profiles = [{**fixed, **profile._shapes} for profile in config._profiles] or [fixed]
    groups = attentions(parsed.model, parsed.types, trt.fuses_attention)
    hidden = {name for group in groups if group.fused for name in group.scores}
    scratch = []
    for profile in profiles:
        largest = {name: ranges[2] for name, ranges in profile.items()}
        known.append(sizes.tensors(parsed.model, largest, parsed.types))
        scratch.append(-(-sizes.peak(parsed.model, known[-1], hidden) // 256) * 256)
    if not _time_tactics(trt, parsed.model, known, config):
        return None
    whole = ModelProto()
    whole.CopyFrom(parsed.model)
    onnx.load_external_data_for_model(whole, str(parsed.folder))
    weights = sum(len(i.raw_data) for i in whole.graph.initializer)
    tensor = {v.name: v for v in (*whole.graph.input, *whole.graph.output)}
    initial = {i.name for i in whole.graph.initializer}
    return Plan(
        version=trt.version,
        system=trt.system,
        capabilities=trt.targets(config),
        gpu=trt.card.name if trt.cuda.cards else "",
        compatibility=config._compatibility.name,
        tf32="TF32" in config._flags,
        any_version="VERSION_COMPATIBLE" in config._flags,
        tensors=[
            Tensor(
                name, DATA_TYPES[parsed.types[name]], list(parsed.shape(value)), value in whole.graph.input
            )
            for name, value in tensor.items()
            if name not in initial
        ],
        on_host=parsed.shape_inputs,
        profiles=profiles,
        values=[profile._values for profile in config._profiles] or [{}],
        scratch=scratch,
        weights=weights,
        verbosity=config._verbosity.name,
        layers=[
            layer
            for number, tensors in enumerate(known)
            for layer in _layers(parsed.model, groups, tensors, parsed.types, number)
        ],
        model=whole.SerializeToString(),
    )


def _time_tactics(trt: StrictTensorRT, model: ModelProto, known: list[Any], config: Any) -> bool:
    """Time what no cache knows yet; False if the monitor does not want to go on."""
    cached = (
        set()
        if config._timing is None or "DISABLE_TIMING_CACHE" in config._flags
        else config._timing._tactics
    )
    phase, monitor = "Building Engine", config._monitor
    if monitor is not None:
        monitor.phase_start(phase, None, len(model.graph.node))
    wanted = True
    for number, node in enumerate(model.graph.node):
        for tensors in known:
            shapes = [tensors[name].shape for name in (*node.input, *node.output) if name in tensors]
            about = [node.op_type, shapes, [a.SerializeToString().hex() for a in node.attribute]]
            key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
            if key not in cached and not trt.ahead_of_time:
                trt.tactics_timed += 1
                time.sleep(trt.seconds_per_tactic)
                cached.add(key)
        if monitor is not None and not monitor.step_complete(phase, number):
            wanted = False
            break
    if monitor is not None:
        monitor.phase_finish(phase)
    return wanted


def _layers(
    model: ModelProto, groups: list[Attention], known: Any, types: dict[str, int], profile: int
) -> Iterator[dict[str, Any]]:
    """What an inspector tells of one profile: fused attention has a name that nothing else has."""
    fused = {number: group for group in groups if group.fused for number in group.nodes}
    nodes = [*model.graph.node]
    suffix = f" [profile {profile}]" if profile else ""
    for number, node in enumerate(nodes):
        group = fused.get(number)
        if group is not None and number != group.nodes[-1]:
            continue
        names = [nodes[n].name for n in group.nodes] if group else [node.name]
        product = node.op_type in {"MatMul", "Gemm", "Attention", "MultiHeadAttention"}
        name = f"_gemm_mha_v2_myl{profile}_{number}" if group else f"{node.name}_myl{profile}_{number}"
        tactic = "_gemm_mha_v2_0x" if group else "sm80_xmma_gemm_" if product else "__myl_"
        yield {
            "Name": name + suffix,
            "LayerType": "gemm" if product and not group else "kgen",
            "Inputs": [],
            "Outputs": [
                {
                    "Name": output,
                    "Dimensions": [*(known[output].shape or ())] if output in known else [],
                    "Format/Datatype": DATA_TYPES.get(types.get(output, 0), "").title(),
                }
                for output in node.output
                if output
            ],
            "TacticName": f"{tactic}{number:x}",
            "StreamId": 0,
            "Metadata": "".join(f"[ONNX Layer: {n}]" for n in names),
        }
