"""Opens the graphs of a bundle with ONNX Runtime, and refuses what does not fit."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import InputError, RunError, first_line, parameter
from hart_runtime.common.install import install, installed, pip
from hart_runtime.common.room import MEND, can_start, cores, failure
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.gpu import driver_version, old_driver
from hart_runtime.runtime.spec import GraphSpec

log = logging.getLogger(__name__)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

CUDNN = ("libcudnn.so.9", "libcudnn.so")
"""Names of a library that ONNX Runtime loads when the first graph wants it, in the middle of a picture."""
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the weights of a graph lie that is not opened by its path."""
BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
"""Distributions of ONNX Runtime: all write the same folder, so that of two the last one installed wins."""


@functools.cache
def onnxruntime() -> Any:
    """The library; if several of its distributions are installed, which one won is logged.

    Raises:
        InputError: it is not installed, or cannot be loaded; with the command that mends it.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        raise InputError(
            f"no inference library is installed: for the CPU {install('cpu')}, "
            f"for an NVIDIA GPU {install('cuda')}"
        ) from None
    except ImportError as error:
        raise failure("ONNX Runtime cannot be loaded", str(error), _anew()) from None
    if not hasattr(ort, "InferenceSession"):  # one of two builds was removed, and took files of the other
        raise InputError(f"ONNX Runtime is installed in part; {_anew()}")
    ort.set_default_logger_severity(4)  # errors come back as exceptions
    if len(builds := _builds()) > 1:
        cuda = PROVIDERS["cuda"] in ort.get_available_providers()
        log.warning(
            "%s are both installed, in one folder; what runs is %s, %s CUDA. To mend it: %s",
            " and ".join(builds),
            ort.__version__,
            "with" if cuda else "without",
            _anew(),
        )
    return ort


def _builds() -> list[str]:
    found = []
    for name in BUILDS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def _anew(cuda: bool = False) -> str:
    """Both steps: what is left of several distributions is no working one."""
    there = " ".join(_builds() or BUILDS[:2])
    either = f"{install('cpu')} or, for an NVIDIA GPU, "
    return f"{pip()} uninstall -y {there}, then {'' if cuda else either}{install('cuda')}"


@dataclass(frozen=True)
class OnGpu:
    """Where and how sessions run on CUDA."""

    stream: int | None
    """Everything runs on it, and runs that carry a ``gpu_graph_id`` are captured; None for a stream of
    ONNX Runtime's own."""
    index: int = 0
    """Of the GPU."""
    tf32: bool = False
    """Round the factors of float32 products to 10 bits."""
    strict: bool = False
    """Refuse, instead of warn of, graphs that cannot be captured: part of their work is the CPU's."""

    @property
    def options(self) -> dict[str, str]:
        """Of the provider."""
        stream = {} if self.stream is None else {"user_compute_stream": str(self.stream)}
        return stream | {"device_id": str(self.index), "use_tf32": str(int(self.tf32))}


class Sessions:
    """Those of a bundle's graphs, some of which are opened when they are first asked for."""

    def __init__(self, bundle: Bundle, threads: int | None, gpu: OnGpu | None = None) -> None:
        """As :func:`open_sessions`."""
        self._bundle, self._threads, self._gpu = bundle, threads, gpu
        self._opened = open_sessions(bundle, bundle.manifest.required, threads, gpu)

    def __getitem__(self, graph: str) -> Any:
        if graph not in self._opened:
            graphs = {graph: self._bundle.manifest.graphs[graph]}
            self._bundle.seal.renew()
            self._opened |= open_sessions(self._bundle, graphs, self._threads, self._gpu)
            self._bundle.seal.check()
        return self._opened[graph]

    def clear(self) -> None:
        """Close them."""
        self._opened.clear()


def open_sessions(
    bundle: Bundle,
    graphs: Mapping[str, GraphSpec],
    threads: int | None,
    gpu: OnGpu | None = None,
    instead: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """One ONNX Runtime session a graph, on the CPU or on a GPU. All share one arena of scratch memory.

    Args:
        instead: contents of graphs in the place of the bundle's files, with the same weights.

    Raises:
        InputError: CUDA is not there, a graph cannot be loaded, reads files outside the bundle or
            is another than the manifest says.
    """
    ort = onnxruntime()
    if gpu is not None:
        require_cuda()
        _refuse_old_driver(ort)
        ort.preload_dlls(directory="")  # the libraries that PyTorch or NVIDIA's wheels brought
        _require_cudnn()
        _share_gpu_memory(gpu.index)
    else:
        _share_memory()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    # Every session has threads of its own; those of the last graph must not spin beside the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads := _affordable(threads, len(graphs)):
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.use_env_allocators", "1")
    if gpu is not None:  # weights go back to the device with their session; on the CPU they are mapped
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # The arena reuses memory too, and for any shape. This would hold it back for a later tensor of the
        # same one: twice what a decoder needs in strips of different heights.
        options.enable_mem_reuse = False
    options.enable_mem_pattern = False  # it keeps a block for every scale's shapes
    contents = instead or {}
    if contents:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(bundle.folder))
    return {
        name: _open(bundle.path(graph.file), graph, options, gpu, contents.get(name))
        for name, graph in graphs.items()
    }


def _affordable(threads: int | None, graphs: int) -> int | None:
    """Threads of a session, each of which has its own but for one; fewer than all cores where the system
    does not let this process have so many. ONNX Runtime would wait for those that it does not get.

    Raises:
        RunError: so many were asked for.
    """
    wanted = graphs * ((threads or cores()) - 1)
    if can_start(wanted):
        return threads
    if threads:
        raise RunError(
            f"{parameter('threads', threads)}: every graph has its own, and the system does not let this "
            f"process have {wanted} more; give fewer, or {MEND}"
        )
    fewer = cores()
    while fewer > 1 and not can_start(graphs * (fewer - 1)):
        fewer //= 2
    log.warning("the system does not let this process have many threads: %d of %d", fewer, cores())
    return fewer


@functools.cache
def _share_memory() -> None:
    """One arena for all graphs: they run in turns, and each would keep its own otherwise."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))


@functools.cache
def _share_gpu_memory(index: int) -> None:
    """The same on a GPU: all graphs are on one stream, so one reuses what the one before it left."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo(
        "Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, ort.OrtMemType.DEFAULT
    )
    arena = ort.OrtArenaCfg(0, -1, -1, -1)  # it doubles: blocks of what is asked for are never merged
    ort.create_and_register_allocator_v2(PROVIDERS["cuda"], memory, {"device_id": str(index)}, arena)


def _open(path: Path, graph: GraphSpec, options: Any, gpu: OnGpu | None, contents: bytes | None) -> Any:
    import onnxruntime as ort

    try:
        # By path: the weights are then mapped, and not read as a whole.
        session = _captured(path, options, gpu) or ort.InferenceSession(
            contents or path, options, _providers(gpu), enable_fallback=0
        )
    except InputError:
        raise
    except Exception as error:  # the runtime's exceptions have no public base class
        what = f"{path}: ONNX Runtime {ort.__version__} cannot load this graph"
        raise failure(what, str(error), "export the bundle again") from None
    for listed, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        if [spec.name for spec in listed] != [value.name for value in found]:
            raise InputError(
                f"{path}: expected {[spec.name for spec in listed]} as the manifest says, "
                f"found {[value.name for value in found]}"
            )
    return session


def _captured(path: Path, options: Any, gpu: OnGpu | None) -> Any:
    """A session whose runs can be captured, if there is a GPU and the graph allows it.

    ONNX Runtime refuses to capture graphs that copy between host and device or compute on the host.
    """
    import onnxruntime as ort

    if gpu is None or gpu.stream is None:
        return None
    try:
        session = ort.InferenceSession(path, options, _providers(gpu, enable_cuda_graph="1"))
    except Exception as error:  # as above
        _refuse_missing()
        if gpu.strict:
            raise InputError(f"`strict`: {path}: cannot be captured: {first_line(error)}") from None
        log.warning("%s runs without CUDA graphs: %s", path, first_line(error))
        return None
    if PROVIDERS["cuda"] not in session.get_providers():
        _refuse_missing()
        raise InputError(
            f"{parameter('device', 'cuda')}: ONNX Runtime could not start its CUDA provider; check the "
            f"driver and CUDA libraries, or use {parameter('device', 'cpu')}"
        )
    return session


def _providers(gpu: OnGpu | None, **more: str) -> list[str | tuple[str, dict[str, str]]]:
    if gpu is None:
        return [PROVIDERS["cpu"]]
    return [(PROVIDERS["cuda"], gpu.options | more), PROVIDERS["cpu"]]


def _refuse_old_driver(ort: Any) -> None:
    """Raises InputError for a driver of an older CUDA than the one that ONNX Runtime was built with."""
    major, _, minor = str(getattr(ort, "cuda_version", "")).partition(".")
    driver = driver_version()
    if major.isdecimal() and int(major) > driver[0] > 0:
        wanted = int(major), int(minor.partition(".")[0] or 0)
        raise InputError(old_driver(f"onnxruntime-gpu {ort.__version__}", driver, wanted))


def _require_cudnn() -> None:
    """Raises InputError, with the command that mends it, where ONNX Runtime will not find cuDNN."""
    if _provider() is None:
        return
    reasons = []
    for library in CUDNN:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            reasons.append(str(error))
        else:
            return
    raise InputError(
        f"{parameter('device', 'cuda')}: ONNX Runtime needs cuDNN, which cannot be loaded ({reasons[0]}); "
        f"install it with: {install('cuda')}"
    )


def _refuse_missing() -> None:
    """Name the library of CUDA's that ONNX Runtime did not find, if it is that.

    Raises:
        InputError: with the command that installs it.
    """
    if (provider := _provider()) is None:
        return
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        text = str(error)
        if "undefined symbol" not in text:  # that is because it wants to be loaded by ONNX Runtime alone
            raise InputError(
                f"{parameter('device', 'cuda')}: ONNX Runtime's CUDA provider cannot be loaded ({text}); "
                f"install what it needs with: {install('cuda')}"
            ) from None


def _provider() -> Path | None:
    """The file of ONNX Runtime that needs CUDA's libraries; None on systems that name them in another way."""
    import onnxruntime as ort

    file = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    return file if file.is_file() else None


def require_cuda() -> None:
    """Raises InputError, with the command that mends it, if ONNX Runtime comes without CUDA."""
    if PROVIDERS["cuda"] not in onnxruntime().get_available_providers():
        raise InputError(
            f"{parameter('device', 'cuda')}: this ONNX Runtime has no CUDA provider; replace it: "
            f"{_anew(cuda=True)}"
        )


def has_cuda() -> bool:
    """Whether an ONNX Runtime is installed, and comes with CUDA."""
    if not installed("onnxruntime"):
        return False
    return PROVIDERS["cuda"] in onnxruntime().get_available_providers()
