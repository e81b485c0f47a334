"""Traces a graph to ONNX and writes it, with every large weight in one shared file.

A weight that several graphs use, or that a graph holds twice, is stored once: tensors are
identified by type, shape and content.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from hart_runtime.export.calibration import Seen
from hart_runtime.export.convolutions import convolve_integers, quantize_filters
from hart_runtime.export.float8 import round_products
from hart_runtime.export.graphs import Graph
from hart_runtime.export.quantize import quantize_products, quantize_weights
from hart_runtime.export.quantize_blocks import multiply_blocks, quantize_blocks
from hart_runtime.export.rewrite import read_directly, write_out_squares
from hart_runtime.export.tensorrt_form import FORMS
from hart_runtime.export.unroll import unroll
from hart_runtime.runtime.contract import DEQUANTIZED, graph_file
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.spec import GraphSpec, TensorSpec

INLINE_BYTES = 1024
"""Tensors smaller than this stay inside the graph file."""
STATE = "x"
"""What the steps of an unrolled graph hand on."""
ALIGNMENT = 4096
"""Offsets in the weight file are multiples of a memory page."""

NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What the exporter calls the scope of a node that belongs to no module."""

DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


class WeightFile:
    """The shared weight file of a bundle, appended to while graphs are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[tuple[ir.DataType, tuple[int, ...], str], tuple[int, int]] = {}
        self.file = (folder / WEIGHTS).open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def store(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Append a tensor unless its like is there already; returns the reference to it."""
        data = tensor.tobytes()
        shape = tuple(int(n) for n in tensor.shape)
        key = (tensor.dtype, shape, hashlib.sha256(data).hexdigest())
        if key not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
            self.places[key] = (self.file.tell(), len(data))
            self.file.write(data)
        offset, length = self.places[key]
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=tensor.name or "",
            base_dir=self.folder,
        )


def write_graph(
    graph: Graph,
    folder: Path,
    weights: WeightFile,
    forms: Sequence[str],
    exact_tokens: bool = False,
    seen: Mapping[str, Seen] | None = None,
    scales: Mapping[str, float] | None = None,
    size: int | None = None,
) -> GraphSpec:
    """Trace one graph and write it; returns its manifest entry.

    Args:
        forms: besides its own. With one of 8-bit weights its own has such, too.
        exact_tokens: whether tokens are not to be rounded to 8 bits beside them.
        seen: of convolutions that are to run in 8 bits, where a graph has such in the place of products.
        scales: of the tokens of products that are to run in 8-bit floating point.
        size: of pictures, where they are not the bundle's own.
    """
    model = _trace(graph)
    if graph.steps > 1:
        unroll(model, graph.steps, STATE)
    read_directly(model)
    write_out_squares(model)
    _name_nodes_by_module(model.graph)
    model.graph.metadata_props.clear()
    files = {form: graph_file(graph.name, form, size) for form in forms}
    if scales:
        model = round_products(model, scales)
    if seen:
        small = quantize_filters(model, seen)
        model = convolve_integers(small.clone(), seen)  # before what it reads of weights lies in their file
        _save(small, graph.name, folder / files[DEQUANTIZED], weights)
    elif DEQUANTIZED in forms:
        quantize, multiply = (
            (quantize_blocks, multiply_blocks) if exact_tokens else (quantize_weights, quantize_products)
        )
        _save(quantize(model), graph.name, folder / files[DEQUANTIZED], weights)
        model = multiply(model)
    file = graph_file(graph.name, size=size)
    _save(model, graph.name, folder / file, weights)
    for form, make in FORMS.items():
        if form in forms:  # their weights are in the file by now
            _save(make(model), graph.name, folder / files[form], weights)
    return GraphSpec(
        file=file,
        opset=model.opset_imports[""],
        inputs=tuple(_describe(value) for value in model.graph.inputs),
        outputs=tuple(_describe(value) for value in model.graph.outputs),
        forms=files,
    )


def _save(model: ir.Model, name: str, path: Path, weights: WeightFile) -> None:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.nbytes >= INLINE_BYTES:
            value.const_value = weights.store(tensor)
    model.graph.name = name
    ir.save(model, path)


def _trace(graph: Graph) -> ir.Model:
    free: tuple[Any, ...] = tuple(dims or None for _, dims in graph.inputs.values())
    parameters = list(inspect.signature(graph.module.forward).parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:  # the exporter wants what it takes as one
        free = (*free[: len(parameters) - 1], free[len(parameters) - 1 :])
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(example for example, _ in graph.inputs.values()),
            dynamo=True,
            opset_version=graph.opset,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=free,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs about packages and axis names that do not concern the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_nodes_by_module(graph: ir.Graph) -> None:
    """Give every node the path of the reference module it came from, for people who debug."""
    seen: dict[str, int] = {}
    for node in graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        path = next((s for s in reversed(_parse_list(scopes)[:-1]) if s and s != NO_MODULE), "")
        base = f"{path}/{node.op_type}" if path else node.op_type
        seen[base] = seen.get(base, -1) + 1
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        node.metadata_props.clear()  # stack traces of the machine that exported


def _parse_list(text: str) -> list[str]:
    return [part.strip(" '\"") for part in text.strip("[]").split(",")] if text else [""]


def _describe(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
    return TensorSpec(value.name, DTYPES[value.dtype], shape)
