"""Builds one engine from one graph of a bundle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.spec import GraphSpec
from hart_runtime.runtime.tensorrt.inspection import Inspection, inspect_engine
from hart_runtime.runtime.tensorrt.log import last_error, make_logger
from hart_runtime.runtime.tensorrt.package import Package
from hart_runtime.runtime.tensorrt.profiles import Profile
from hart_runtime.runtime.tensorrt.timing_cache import TimingCache

Phase = Callable[[str, int, int], None]
"""Told of a phase of the builder, how far it is and how far it goes."""


@dataclass(frozen=True)
class BuildOptions:
    """What changes an engine, besides its graph and its profiles."""

    batches: tuple[int, int] = (1, 1)
    """Smallest and largest number of pictures drawn at once."""
    per_scale: bool = True
    """One profile per scale, or one for all."""
    compute_capabilities: tuple[str, ...] = ()
    """Such as ("8.6", "8.9"), for packages that build ahead of time; empty for their default."""
    workspace: float | None = None
    """Most scratch memory the builder may plan with, in GB."""
    top_k: tuple[int, int] | None = None
    """Fewest and most codes kept per token, beside those that the bundle's settings ask for."""
    tf32: bool = False
    """Whether float32 products may round what they multiply to 10 bits."""
    keep: str | None = None
    """Shares of tokens that take part where tokens are left out; None for engines that leave none out."""


@dataclass(frozen=True)
class Built:
    """An engine, and what is known of it."""

    serialized: bytes
    on_host: tuple[str, ...]
    """Inputs that it reads on the host."""
    inspection: Inspection | None
    """None where there is no GPU to load it."""


def build_engine(
    package: Package,
    path: Path,
    graph: GraphSpec,
    profiles: Sequence[Profile],
    options: BuildOptions,
    cache: TimingCache | None = None,
    inspected: bool = False,
    step: Phase = lambda *_: None,
    stopped: Sequence[int] = (),
) -> Built:
    """Parse a graph and build its engine.

    Args:
        cache: what was measured before, which takes what is measured now.
        inspected: whether to load the engine and look at it, on a GPU that it is for.
        stopped: what :func:`signals_wait` yields; the build ends at its next step once it holds something.

    Raises:
        RunError: the parser refuses the graph or drops one of its inputs, or the build fails.
        KeyboardInterrupt: it was stopped.
    """
    trt = package.api
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = _parse(package, builder, path, graph, log)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, step, stopped)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector tells kernels only then
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * 1e9))
    _set_compute_capabilities(package, config, options.compute_capabilities)
    if cache is not None:
        cache.load(config)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for profile in profiles:
        target = builder.create_optimization_profile()
        for tensor in inputs:
            if tensor.is_shape_tensor:
                if tensor.name not in profile.values:
                    raise RunError(f"{path}: {package.name} wants the value of {tensor.name} on the host")
                values = profile.values[tensor.name]
                target.set_shape_input(tensor.name, values.min, values.opt, values.max)
            elif -1 in tuple(tensor.shape):
                shape = profile.shapes[tensor.name]
                target.set_shape(tensor.name, shape.min, shape.opt, shape.max)
        if config.add_optimization_profile(target) < 0:
            raise RunError(f"{path}: {package.name} {package.version} refuses the profile {profile.name}")
    serialized = None if stopped else builder.build_serialized_network(network, config)
    if stopped:
        raise KeyboardInterrupt
    if serialized is None:
        raise RunError(f"{path}: {package.name} {package.version} cannot build an engine ({last_error(log)})")
    if cache is not None:
        cache.save(config)
    engine = bytes(serialized)
    return Built(
        engine,
        tuple(tensor.name for tensor in inputs if tensor.is_shape_tensor),
        inspect_engine(package, engine, log) if inspected else None,
    )


def _parse(package: Package, builder: Any, path: Path, graph: GraphSpec, log: Any) -> Any:
    trt = package.api
    # TensorRT 11 knows no other kind of network; 10 wants to be told.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RunError(f"{path}: {package.name} {package.version} cannot parse it ({'; '.join(reasons)})")
    read = {
        tensor.name
        for layer in (network.get_layer(i) for i in range(network.num_layers))
        for tensor in (layer.get_input(j) for j in range(layer.num_inputs))
        if tensor is not None
    }
    if dropped := sorted({spec.name for spec in graph.inputs} - read):
        raise RunError(f"{path}: {package.name} {package.version} ignores the inputs {', '.join(dropped)}")
    if ignored := [line for line in log.warnings if "unused input" in line.lower()]:
        raise RunError(f"{path}: {package.name} {package.version} ignores part of the graph ({ignored[0]})")
    return network


def _set_compute_capabilities(package: Package, config: Any, wanted: tuple[str, ...]) -> None:
    if not wanted:
        return
    if not package.ahead_of_time:
        raise InputError(
            f"`compute_capabilities`: {package.name} builds for the GPU it runs on, leave it out"
        )
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in package.api.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    config.num_compute_capabilities = len(wanted)
    for number, capability in enumerate(wanted):
        if capability not in known:
            raise InputError(
                f"`compute_capabilities`: {package.name} {package.version} builds for "
                f"{', '.join(sorted(known, key=float))}, found {capability}"
            )
        config.set_compute_capability(known[capability], number)


@contextlib.contextmanager
def signals_wait() -> Iterator[list[int]]:
    """Hold SIGINT and SIGTERM back while a package works, and let the first of them act after it.

    Python raises a signal wherever it runs next, in a callback such as the logger too, and the
    package drops what a callback raises. What is yielded holds the signals that came.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda came, _: stopped.append(came))
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stopped and callable(handler := before[signal.Signals(stopped[0])]):
            handler(stopped[0], None)
    if stopped:
        raise KeyboardInterrupt


def _monitor(trt: Any, step: Phase, stopped: Sequence[int]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Passes the builder's own progress on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.sizes: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.sizes[phase_name] = num_steps

        def step_complete(self, phase_name: str, step_number: int) -> bool:
            step(phase_name, step_number + 1, self.sizes.get(phase_name, 0))
            return not stopped

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
