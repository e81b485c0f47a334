"""Finds the layer where a difference begins, by module name of the reference model.

The reference runs once more with hooks on its modules, the engine's graph with the same
places marked as outputs. Both carry the reference's module path, the graph in its node names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from polygraphy.backend.onnx import modify_outputs
from torch import Tensor, nn

from hart_runtime.common.precisions import FP8, FP16
from hart_runtime.compare.metrics import Array, compare_tensors
from hart_runtime.compare.record import Source, record_again
from hart_runtime.compare.recorded import Call
from hart_runtime.compare.reference import Reference
from hart_runtime.compare.replay import rounded_relative
from hart_runtime.compare.torch_backend import TorchHalfBackend
from hart_runtime.hart.model import Mar
from hart_runtime.runtime.backends.names import CUDA, parse_device
from hart_runtime.runtime.backends.sessions import OnGpu, open_sessions
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.families import names as graphs
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.spec import TensorSpec

WINDOWS = {
    graphs.CONTEXT: ("ctx.mask|label", "scale0.x_in"),
    graphs.TRANSFORMER: ("scale{n}.x_in", "scale{n}.hidden"),
    graphs.FAST: ("scale{n}.x_in", "scale{n}.hidden"),
    graphs.SAMPLE: ("scale{n}.hidden", "scale{n}.idx"),
    graphs.NEXT_SCALE: ("scale{n}.h", "scale{m}.x_in"),
    graphs.RESIDUAL_CONDITION: ("final.h", "final.diff.init_noise"),
    graphs.RESIDUAL_STEP: ("final.diff.step{n}.x_t", "final.diff.step{n}.sample"),
    graphs.DECODER: ("final.f_hat", "image"),
}
"""Graph -> the recorded names between which the reference computes it, from one of several; m is n + 1."""
RECORDED = {
    (graphs.SAMPLE, "head"): "scale{n}.logits_cfg",
    (graphs.NEXT_SCALE, "lvl_embed"): "scale{n}.next_level",
    (graphs.RESIDUAL_STEP, "guide"): "final.diff.step{n}.model_out",
    (graphs.RESIDUAL_STEP, "denoise"): "final.diff.step{n}.sample",
}
"""What a graph computes another way than the reference's module, and its recorded value: the
graph projects guided states instead of guiding projections, and looks its level up."""

Seen = dict[str, list[tuple[Array | None, Array]]]
"""Module path -> input and output of each of its invocations."""


@dataclass(frozen=True)
class Layer:
    """One place in a graph, compared."""

    module: str
    value: str
    """"input", "output", or the name of a graph output."""
    error: float | None
    """Largest error over the reference's largest magnitude; None if not finite."""
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class LayerReport:
    """All places of one graph call, in the order the graph computes them."""

    graph: str
    call: str
    layers: list[Layer]
    first: int | None
    """Position of the first place past its tolerance."""
    module: str | None
    """The module to blame: if an input is the first to be off, the one around it."""


@dataclass(frozen=True)
class _Place:
    position: float
    path: str
    """As the graph's node names have it."""
    value: str
    tensor: str
    expected: Array
    blame: str


def find_layer(
    source: Source,
    reference: Reference,
    batch: int,
    call: Call,
    bundle: Bundle,
    device: str,
    factor: float,
    relative: float,
) -> LayerReport:
    """Compare one graph call module by module, on ONNX Runtime."""
    seen, names = _observe_reference(source, reference, batch, call, bundle)
    model = onnx.load(bundle.path(bundle.manifest.graphs[call.graph].file), load_external_data=False)
    places = _places(model.graph, call, seen)
    found = _run_marked(bundle, call, model, [place.tensor for place in places], device)
    contract = bundle.manifest.contracts[call.graph]
    rounded = rounded_relative(contract, bundle.manifest.precision)
    half = {}
    if bundle.manifest.precision in (FP16, FP8) and rounded is None:
        backend = TorchHalfBackend(source, reference.patch_nums, "cpu")
        with _hooks({"": backend.modules[call.graph]}, [True]) as observed:
            returned = backend.run(call.run, call.inputs)
        its = replace(call, outputs={name: value.float().numpy() for name, value in returned.items()})
        half = {(p.path, p.value, p.tensor): p.expected for p in _places(model.graph, its, observed)}
    layers, blames = [], []
    for place in places:
        expected = _in_shape_of(place.expected, found[place.tensor].shape)
        if expected is None or found[place.tensor].dtype.kind != "f":  # tokens that are integers already
            continue
        error = compare_tensors(expected, found[place.tensor]).error
        tolerance = relative if rounded is None else rounded
        if (place.path, place.value, place.tensor) in half:
            other = _in_shape_of(half[place.path, place.value, place.tensor], expected.shape)
            own = compare_tensors(expected, other).error if other is not None else None
            tolerance = max(relative, factor * (own or 0.0))
        fine = error is not None and error <= tolerance
        layers.append(Layer(names.get(place.path, place.path), place.value, error, tolerance, fine))
        blames.append(names.get(place.blame, place.blame) or call.graph)
    first = next((i for i, layer in enumerate(layers) if not layer.passed), None)
    return LayerReport(call.graph, call.label, layers, first, None if first is None else blames[first])


def _observe_reference(
    source: Source, reference: Reference, batch: int, call: Call, bundle: Bundle
) -> tuple[Seen, dict[str, str]]:
    """What the reference's modules took and returned in this call, by the graph's module path;
    and the reference's path of each of these.
    """
    model, text = source.load(torch.float32, "cpu")
    roots: dict[str, nn.Module] = {"transformer": model.transformer, "tokenizer": model.tokenizer}
    number = int(re.sub(r"\D", "", call.label) or 0)
    names: dict[str, str] = {}
    recorded: Seen = {}
    with contextlib.ExitStack() as stack:
        watching = [call.graph == graphs.TEXT_ENCODER]
        if call.graph == graphs.TEXT_ENCODER:
            assert text is not None
            seen = stack.enter_context(_hooks({graphs.TEXT_ENCODER: text}, watching))
            with torch.inference_mode():
                text(*(torch.from_numpy(np.asarray(value)) for value in call.inputs.values()))
        elif call.graph == graphs.ENCODER:
            assert not isinstance(model, Mar)
            seen = stack.enter_context(_hooks(roots, [True]))
            with torch.inference_mode():
                model.tokenizer.latent(torch.from_numpy(call.inputs[graphs.IMAGE]))
        elif call.graph in WINDOWS:
            seen = stack.enter_context(_hooks(roots, watching))
            start, end = (name.format(n=number, m=number + 1) for name in WINDOWS[call.graph])
            wanted = {
                name.format(n=number): path for (graph, path), name in RECORDED.items() if graph == call.graph
            }

            def record(name: str, value: Tensor) -> None:
                if name in wanted:
                    recorded[wanted[name]] = [(None, value.numpy().copy())]
                watching[0] = (watching[0] or name in start.split("|")) and name != end

            record_again(model, reference.batches[batch], reference.settings, bundle.manifest, record)
        else:
            seen = {}
    if call.graph == graphs.DECODER:  # the engine decodes one picture at a time
        rows = slice(number, number + 1)
        seen = {k: [(None if i is None else i[rows], o[rows]) for i, o in v] for k, v in seen.items()}
    full = [name for prefix, root in roots.items() for name in _paths(prefix, root)]
    by_graph_path = dict(seen)
    for path in full:  # graphs may start further down the tree than the model does
        parts = path.split(".")
        for i in range(len(parts)):
            short = ".".join(parts[i:])
            names.setdefault(short, path)
            if path in seen:
                by_graph_path.setdefault(short, seen[path])
    return by_graph_path | recorded, names


@contextlib.contextmanager
def _hooks(roots: Mapping[str, nn.Module], watching: list[bool]) -> Iterator[Seen]:
    """Record modules while ``watching[0]`` is true."""
    seen: Seen = {}

    def observer(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if watching[0] and isinstance(value, Tensor):
                first = args[0] if args and isinstance(args[0], Tensor) else None
                leaf = first is not None and not any(module.children()) and first.is_floating_point()
                taken = first.float().cpu().numpy().copy() if leaf and first is not None else None
                seen.setdefault(path, []).append((taken, value.float().cpu().numpy().copy()))

        return hook

    handles = [
        module.register_forward_hook(observer(f"{prefix}.{name}".strip(".")))
        for prefix, root in roots.items()
        for name, module in root.named_modules()
        if name or prefix
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _paths(prefix: str, root: nn.Module) -> list[str]:
    return [f"{prefix}.{name}" for name, _ in root.named_modules() if name]


def _places(graph: onnx.GraphProto, call: Call, seen: Seen) -> list[_Place]:
    """Where the graph computes what the modules took and returned, in its own order."""
    constants = {t.name for t in graph.initializer}
    owners = [node.name.split("/")[0] if "/" in node.name else "" for node in graph.node]
    places = []
    for path, invocations in seen.items():
        mine = [i for i, owner in enumerate(owners) if owner == path or owner.startswith(f"{path}.")]
        share, rest = divmod(len(mine), len(invocations))
        if not share or rest:
            continue  # folded away, or shared between invocations
        for number, (taken, returned) in enumerate(invocations):
            nodes = mine[number * share : (number + 1) * share]
            inputs = [name for name in graph.node[nodes[0]].input if name and name not in constants]
            parent = path.rpartition(".")[0]
            if taken is not None and inputs:
                places.append(_Place(nodes[0] - 0.5, path, "input", inputs[0], taken, parent))
            last = graph.node[nodes[-1]].output[0]
            places.append(_Place(nodes[-1], path, "output", last, returned, path))
    made = {name: i for i, node in enumerate(graph.node) for name in node.output}
    for name, expected in call.outputs.items():
        if name in made and np.issubdtype(expected.dtype, np.floating):
            owner = owners[made[name]]
            places.append(_Place(made[name] + 0.5, owner, name, name, expected, owner))
    return sorted(places, key=lambda place: (place.position, -place.path.count(".")))


def _run_marked(
    bundle: Bundle, call: Call, model: onnx.ModelProto, tensors: list[str], device: str
) -> dict[str, Array]:
    """Run one graph with more outputs, in the session the runtime would open."""
    spec = bundle.manifest.graphs[call.graph]
    outputs = list(dict.fromkeys(tensors))
    marked = modify_outputs(model, outputs)
    specs = tuple(TensorSpec(output, "float32", ()) for output in outputs)
    kind, index = parse_device(device)
    gpu = OnGpu(None, index) if kind == CUDA else None
    graph = {call.graph: replace(spec, outputs=specs)}
    weights = bundle.path(WEIGHTS).resolve()  # libraries do not follow a link out of the graph's folder
    for entry in (entry for tensor in marked.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":
            entry.value = weights.name
    contents = {call.graph: marked.SerializeToString()}
    sessions = open_sessions(replace(bundle, folder=weights.parent), graph, None, gpu, contents)
    bundle.seal.check()  # by now graph and weights were read
    inputs = {tensor.name: np.asarray(call.inputs[tensor.name], tensor.dtype) for tensor in spec.inputs}
    return dict(zip(outputs, sessions[call.graph].run(outputs, inputs), strict=True))


def _in_shape_of(expected: Array, shape: tuple[int, ...]) -> Array | None:
    """The reference's value in the graph's shape, None if they cannot be compared.

    Graphs compute only what they need: of scale 0's logits the last position, of its other values
    the conditional half, of the level table the first rows.
    """
    if expected.size == np.prod(shape):
        return expected.reshape(shape)
    if expected.ndim != len(shape):
        return None
    if expected.shape[:1] + expected.shape[2:] == shape[:1] + shape[2:] and expected.shape[1] > shape[1]:
        return expected[:, -shape[1] :]
    if expected.shape[1:] == shape[1:] and expected.shape[0] > shape[0]:
        return expected[: shape[0]]
    return None
