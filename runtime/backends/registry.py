"""The backends there are, and which of them opens a bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hart_runtime.common.errors import InputError, RunError, one_of, parameter, true_or_false, whole_in_range
from hart_runtime.common.precisions import FLOAT8_CAPABILITY, FP8, FP16, FP32, INT8
from hart_runtime.runtime.backends.names import (
    AUTO,
    CPU,
    CUDA,
    MODULES,
    ONNXRUNTIME,
    OPENVINO,
    parse_device,
)

if TYPE_CHECKING:
    from hart_runtime.runtime.backends.backend import Backend
    from hart_runtime.runtime.bundle import Bundle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """How a backend is to be opened, see :func:`open_backend`."""

    threads: int | None = None
    strict: bool = False
    gpu: int = 0
    """Its number among those that CUDA sees."""
    tf32: bool = False


class Entry(NamedTuple):
    """One backend on one kind of device."""

    name: str
    device: str
    title: str
    """What it opens, in the plural."""
    open: Callable[[Bundle, Wanted], Backend]
    """Raises InputError or RunError, with what mends it."""
    precisions: tuple[str, ...]
    """Of bundles that it runs."""
    offered: Callable[[Bundle], bool] = lambda _: True
    """Whether it is worth trying for a bundle where there is a choice, of backends or of devices."""


def _engines(name: str) -> Entry:
    def opened(bundle: Bundle, wanted: Wanted) -> Backend:
        from hart_runtime.runtime.memory.cuda import StreamBackend
        from hart_runtime.runtime.tensorrt.executor import EngineExecutor
        from hart_runtime.runtime.tensorrt.float8 import require_float8
        from hart_runtime.runtime.tensorrt.package import import_package

        if bundle.resized:
            asked = parameter("size", bundle.manifest.model.image_size)
            instead = parameter("backend", ONNXRUNTIME)
            raise InputError(
                f"{asked}: engines draw a bundle's first size alone; use {instead}, or make a bundle of "
                f"this one with hart-export {asked}, and its engines with hart-build"
            )
        require_float8(bundle.manifest, wanted.gpu)
        package = import_package(name)
        return StreamBackend(bundle, EngineExecutor(bundle, package, wanted.gpu, wanted.tf32))

    return Entry(
        name,
        CUDA,
        f"the {name} engines",
        opened,
        (FP32, FP16, FP8),
        lambda bundle: any(bundle.folder.glob(f"{name}-[0-9]*")),
    )


def _onnx_cuda(bundle: Bundle, wanted: Wanted) -> Backend:
    from hart_runtime.runtime.backends.onnx_runtime import on_cuda

    return on_cuda(bundle, wanted.threads, wanted.strict, wanted.gpu, wanted.tf32)


def _has_cuda(bundle: Bundle) -> bool:
    from hart_runtime.runtime.backends.sessions import has_cuda

    return has_cuda()


def _onnx_cpu(bundle: Bundle, wanted: Wanted) -> Backend:
    from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu

    if bundle.manifest.precision == FP8:
        log.warning(EMULATED, bundle.folder)
    return on_the_cpu(bundle, wanted.threads)


def _openvino(bundle: Bundle, wanted: Wanted) -> Backend:
    from hart_runtime.runtime.backends.openvino import on_openvino

    return on_openvino(bundle, wanted.threads)


REGISTRY = (
    *(_engines(name) for name in MODULES),
    Entry(ONNXRUNTIME, CUDA, "ONNX Runtime's CUDA sessions", _onnx_cuda, (FP32, FP16), _has_cuda),
    Entry(ONNXRUNTIME, CPU, "ONNX Runtime's CPU sessions", _onnx_cpu, (FP32, FP16, INT8, FP8)),
    Entry(OPENVINO, CPU, "OpenVINO's models", _openvino, (FP32, FP16, INT8), lambda _: False),
)
"""In the order in which "auto" tries them."""
WHERE = {
    INT8: f"runs on the CPU with {ONNXRUNTIME} or {OPENVINO}",
    FP8: f"runs in engines, on GPUs of compute capability {FLOAT8_CAPABILITY} and newer, and on the CPU with "
    f"{ONNXRUNTIME} that emulates them",
}
"""Of precisions that not everything runs."""
EMULATED = (
    f"%s: products in 8-bit floating point are emulated on the CPU, which makes nothing faster; hart-build "
    f"makes engines for GPUs of compute capability {FLOAT8_CAPABILITY} and newer"
)
BACKENDS = (AUTO, *dict.fromkeys(entry.name for entry in REGISTRY))


def open_backend(
    bundle: Bundle,
    device: str = AUTO,
    threads: int | None = None,
    backend: str = AUTO,
    strict: bool = False,
    tf32: bool = False,
) -> Backend:
    """Load every graph of a bundle.

    Args:
        device: one of :data:`hart_runtime.runtime.backends.names.DEVICES`.
        threads: of the CPU; None for all cores.
        backend: one of :data:`BACKENDS`. "auto": the bundle's engines where they run, else ONNX
            Runtime on CUDA, else on the CPU. What "auto" passes over is logged, unless there is no
            GPU at all; a backend or a device asked for by name is never replaced.
        strict: refuse, instead of warn of, ONNX Runtime CUDA graphs that cannot be captured.
        tf32: on a GPU, round the factors of float32 products to 10 bits, which is faster and draws
            other pictures. Engines have it built in or not.

    Raises:
        InputError: a name that there is not, or what was asked for is not there, with the command
            that mends it.
        RunError: the GPU that was asked for fails, or has too little memory.
    """
    from hart_runtime.common.settings import MOST_THREADS

    kind, number = parse_device(device)
    one_of("backend", backend, BACKENDS)
    true_or_false("strict", strict)
    true_or_false("tf32", tf32)
    if threads is not None:
        threads = whole_in_range("threads", threads, 1, MOST_THREADS)
    entries = [entry for entry in REGISTRY if backend in (AUTO, entry.name)]
    fitting = [entry for entry in entries if kind in (AUTO, entry.device)]
    if not fitting:
        where = "the CPU" if entries[0].device == CPU else "a GPU"
        raise InputError(
            f"{parameter('backend', backend)} runs on {where}, found {parameter('device', device)}"
        )
    precision = bundle.manifest.precision
    fitting = [entry for entry in fitting if precision in entry.precisions]
    if not fitting:
        asked = parameter("device", device) if backend == AUTO else parameter("backend", backend)
        raise InputError(
            f"{asked}: {bundle.folder} is an {precision} bundle, which {WHERE[precision]}; export the "
            f"checkpoint with {parameter('precision', FP16)} for anything else"
        )
    wanted = Wanted(threads, strict, number, tf32)
    passed: tuple[Entry, InputError | RunError] | None = None
    for entry in fitting:
        try:
            if len(fitting) > 1 and not entry.offered(bundle):
                continue
            opened = entry.open(bundle, wanted)
        except (InputError, RunError) as error:
            if passed and str(passed[1]) != str(error):  # the same library may be missing for both
                _tell(passed)
            passed = entry, error
            continue
        if passed:
            _tell(passed)
        return opened
    if passed is not None:
        raise passed[1]
    return fitting[-1].open(bundle, wanted)  # nothing is worth trying: it says why


def _tell(passed: tuple[Entry, InputError | RunError]) -> None:
    from hart_runtime.runtime.memory.gpu import is_there

    entry, error = passed
    if entry.device == CPU or is_there():
        log.warning("%s are not used: %s", entry.title, str(error))  # which would hold what failed
