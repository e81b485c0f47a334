"""Opens the graphs of a bundle with ONNX Runtime, and refuses what does not fit."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.install import install, installed, pip
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.external_data import refuse_outside
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.spec import GraphSpec

log = logging.getLogger(__name__)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


SHAPE_OPERATORS = frozenset(
    [
        *("Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast"),
        *("Add", "Sub", "Mul", "Div", "Floor", "Equal", "Where", "Identity", "Range", "Expand"),
        *("Constant", "ConstantOfShape"),
    ]
)
"""What arithmetic on shapes is made of."""
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"


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
        raise InputError(f"ONNX Runtime cannot be loaded ({first_line(error)}); {_anew()}") from None
    if not hasattr(ort, "InferenceSession"):  # one of two builds was removed, and took files of the other
        raise InputError(f"ONNX Runtime is installed in part; {_anew()}")
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


def open_sessions(
    bundle: Bundle,
    graphs: Mapping[str, GraphSpec],
    device: str,
    threads: int | None,
    strict: bool = False,
    stream: int | None = None,
) -> dict[str, Any]:
    """One ONNX Runtime session a graph, on "cpu" or "cuda".

    With a CUDA ``stream``, everything runs on it, and runs that carry a ``gpu_graph_id`` are
    captured wherever a graph allows it.

    Raises:
        InputError: CUDA is not there, a graph cannot be loaded, reads files outside the bundle or
            is another than the manifest says.
    """
    ort = onnxruntime()
    if device == "cuda":
        require_cuda()
        ort.preload_dlls(directory="")  # the libraries that PyTorch or NVIDIA's wheels brought
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    # Every session has threads of its own; those of the last graph must not spin beside the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads:
        options.intra_op_num_threads = threads
    if device == "cpu":
        _share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False  # it keeps a block for every scale's shapes
    else:
        options.add_session_config_entry(RECORD_PLACEMENT, "1")
    return {
        name: _open(bundle.path(graph.file), graph, device, options, strict, stream)
        for name, graph in graphs.items()
    }


@functools.cache
def _share_memory() -> None:
    """One arena for all graphs: they run in turns, and each would keep its own otherwise."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))


def _open(path: Path, graph: GraphSpec, device: str, options: Any, strict: bool, stream: int | None) -> Any:
    import onnxruntime as ort

    refuse_outside(path, WEIGHTS)
    session = None
    if stream is not None:
        try:
            session = ort.InferenceSession(path, options, providers=_providers(device, stream, captured=True))
        except Exception as error:  # the runtime's exceptions have no public base class
            log.warning("%s runs without CUDA graphs: %s", path, first_line(error))
    try:
        # By path: the weights are then mapped, and not read as a whole.
        session = session or ort.InferenceSession(path, options, providers=_providers(device, stream))
    except Exception as error:
        raise InputError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load this graph "
            f"({first_line(error)}); export the bundle again"
        ) from None
    for listed, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        if [spec.name for spec in listed] != [value.name for value in found]:
            raise InputError(
                f"{path}: expected {[spec.name for spec in listed]} as the manifest says, "
                f"found {[value.name for value in found]}"
            )
    if PROVIDERS[device] not in session.get_providers():
        raise InputError(
            f"{parameter('device', device)}: ONNX Runtime could not start its CUDA provider; check the "
            f"driver and CUDA libraries, or use {parameter('device', 'cpu')}"
        )
    if device != "cpu":
        _check_placement(path, session, strict)
    return session


def _check_placement(path: Path, session: Any, strict: bool) -> None:
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # before ONNX Runtime 1.24
    parts = session.get_provider_graph_assignment_info()
    found = misplaced((part.ep_name, n.op_type, n.name) for part in parts for n in part.get_nodes())
    if found:
        message = f"{path}: {len(found)} nodes run on the CPU: {', '.join(found[:5])}"
        if strict:
            raise InputError(f"`strict`: {message}")
        log.warning("%s", message)


def _providers(
    device: str, stream: int | None, captured: bool = False
) -> list[str | tuple[str, dict[str, str]]]:
    if device == "cpu":
        return [PROVIDERS["cpu"]]
    chosen = {} if stream is None else {"user_compute_stream": str(stream)}
    if captured:
        chosen["enable_cuda_graph"] = "1"
    return [(PROVIDERS[device], chosen), PROVIDERS["cpu"]]


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


def misplaced(placement: Iterable[tuple[str, str, str]]) -> list[str]:
    """Nodes that compute on the CPU though another provider was asked for.

    ``placement`` holds (provider, operator, node name). ONNX Runtime always keeps the arithmetic
    on shapes on the host; that is not counted.
    """
    return [
        f"{name} ({operator})"
        for provider, operator, name in placement
        if provider == PROVIDERS["cpu"] and operator not in SHAPE_OPERATORS
    ]


def first_line(error: Exception) -> str:
    """Of an exception's text, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
