"""How large an export will be and what its graphs need, without weights and without computing.

The graphs run once on PyTorch's meta device, where tensors have shapes and types but no memory,
while somebody watches which parameters they touch and how much is alive at once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hart_runtime.common.precisions import FP8
from hart_runtime.common.schedule import PUBLISHED_TOP_K
from hart_runtime.export.calibration import convolutions
from hart_runtime.export.float8 import products
from hart_runtime.export.graphs import build_graphs
from hart_runtime.export.quantize import SMALLEST
from hart_runtime.export.quantize_blocks import block_of
from hart_runtime.hart.checkpoint import matrix_parameters
from hart_runtime.hart.model import Model
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.contract import DEQUANTIZED, Contract
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import ENCODER, FAST
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.shapes import shape_of
from hart_runtime.runtime.tensorrt.profiles import scale_rows

Held = dict[tuple[int, Callable[[Tensor], int]], Tensor]
"""Weights by identity, and what tells how many bytes they take: what is held in two ways is stored twice."""


@dataclass(frozen=True)
class Weights:
    """What a graph holds."""

    parameters: int
    nbytes: int


def weights_of(
    model: Model, text: TextEncoder | None, manifest: Manifest
) -> tuple[dict[str, Weights], Weights]:
    """Weights of each graph, and of all of them together, what they share counted once.

    Args:
        model, text: on the meta device, in the precision of the export (see :func:`typed`).
        manifest: as :func:`hart_runtime.runtime.manifest.manifest_of` makes it.
    """
    found: dict[str, Weights] = {}
    everything: Held = {}
    filters = {id(convolution.weight) for _, convolution in convolutions(model.tokenizer.decoder)}
    rounded = {id(product.weight) for _, product in products(model.transformer)}
    for name, module, inputs in _graphs(model, text, manifest, 1):
        with _Parameters(module) as seen:
            module(*inputs)
        contract = manifest.contracts[name]
        small = DEQUANTIZED in manifest.graphs[name].forms
        eight = rounded if manifest.precision == FP8 and contract.fp8 else set()
        held: Held = {}
        for key, tensor in seen.touched.items():
            how: Callable[[Tensor], int] = _in_float8 if key in eight else _whole
            if small:
                how = _stored(tensor, contract, key in seen.tables, key in filters)
            held[key, how] = tensor
        found[name] = _sum(held)
        everything |= held
    return found, _sum(everything)


def _stored(weight: Tensor, contract: Contract, table: bool, filters: bool) -> Callable[[Tensor], int]:
    """What tells the bytes of a weight in a graph with 8-bit products, or with 8-bit ``filters``."""
    if filters:
        return _in_columns
    if weight.ndim != 2 or min(weight.shape) < SMALLEST:
        return _whole
    if not contract.exact_tokens:
        return _in_columns
    if table:
        return _in_half
    return _in_blocks if block_of(weight.shape[1]) else _whole


def _whole(weight: Tensor) -> int:
    return weight.nbytes


def _in_columns(weight: Tensor) -> int:
    """One byte a weight and a float32 scale for each output."""
    return weight.numel() + 4 * len(weight)


def _in_blocks(weight: Tensor) -> int:
    """One byte a weight and a float32 scale for each block."""
    return weight.numel() + 4 * weight.numel() // block_of(weight.shape[1])


def _in_float8(weight: Tensor) -> int:
    """One byte a weight, of all that have any: which stay in half is measured while weights are there."""
    return weight.numel()


def _in_half(weight: Tensor) -> int:
    return 2 * weight.numel()


def scratch_of(model: Model, text: TextEncoder | None, manifest: Manifest, batch: int) -> dict[str, int]:
    """Bytes that are alive inside each graph at the most, outputs included, at its largest scale.

    As PyTorch would hold them with fused attention; a transformer's blocks use the same memory one
    after another, so one is looked at. Decoder and encoder take one picture at a time.
    """
    with _one_block(model.transformer):
        peaks = {}
        for name, module, inputs in _graphs(model, text, manifest, batch):
            with _Alive() as alive:
                module(*inputs)
            peaks[name] = alive.peak
        return peaks


@contextlib.contextmanager
def _one_block(transformer: nn.Module) -> Iterator[None]:
    """Of each row of blocks the first alone."""
    rows = {name: part for name, part in transformer.named_children() if isinstance(part, nn.ModuleList)}
    try:
        for name, blocks in rows.items():
            setattr(transformer, name, blocks[:1])
        yield
    finally:
        for name, blocks in rows.items():
            setattr(transformer, name, blocks)


def typed(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module on the meta device the types it would be loaded with."""
    low = matrix_parameters(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype if name in low else torch.float32)


def _graphs(model: Model, text: TextEncoder | None, manifest: Manifest, batch: int):  # type: ignore[no-untyped-def]
    """Every graph as a module, with inputs of its largest scale; (name, module, inputs)."""
    with torch.device("meta"):
        precision = manifest.precision
        encoder = ENCODER in manifest.graphs
        builders = build_graphs(model, text, manifest.model.patch_nums, _fused, precision, encoder)
        for name, build in builders.items():
            contract = manifest.contracts[name]
            if name == FAST:
                continue  # it has the weights of others
            graph = build()
            alone = (FAMILIES[manifest.family].decode.graph, ENCODER)
            shapes = _largest(manifest, name, 1 if name in alone else batch)
            decide, top_k = contract.deciding(), min(PUBLISHED_TOP_K, manifest.model.vocab_size)
            inputs = [
                # What is read on the way needs a value; everything else stays a shape.
                torch.full(shapes[key], top_k, dtype=example.dtype, device="cpu")
                if key in decide
                else torch.empty(shapes[key], dtype=example.dtype)
                for key, (example, _) in graph.inputs.items()
            ]
            with torch.no_grad():
                yield graph.name, graph.module.eval(), inputs


def _largest(manifest: Manifest, name: str, batch: int) -> dict[str, tuple[int, ...]]:
    _, dims = scale_rows(manifest, name, batch)[-1]
    return {tensor.name: shape_of(tensor, dims) for tensor in manifest.graphs[name].inputs}


def _fused(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Attention that holds nothing but its result."""
    return torch.empty_like(q)


def _sum(held: Held) -> Weights:
    parameters = {key: tensor.numel() for (key, _), tensor in held.items()}
    return Weights(sum(parameters.values()), sum(nbytes(tensor) for (_, nbytes), tensor in held.items()))


class _Parameters(TorchFunctionMode):
    """Notes which parameters and buffers of a module its functions are called with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self.touched: dict[int, Tensor] = {}
        self.tables: set[int] = set()
        """Of these, tables that rows are looked up in."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._known:
                self.touched[id(leaf)] = leaf
                if func is F.embedding:
                    self.tables.add(id(leaf))
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Adds up the memory of all results, for as long as something refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self._users: Counter[int] = Counter()
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = _storage(leaf)
                if storage in inputs and storage not in self._users:
                    continue  # a view of a weight or of an input
                self._hold(storage, leaf.untyped_storage().nbytes())
                weakref.finalize(leaf, self._release, storage, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _hold(self, storage: int, nbytes: int) -> None:
        self._now += 0 if self._users[storage] else nbytes
        self._users[storage] += 1

    def _release(self, storage: int, nbytes: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self._now -= nbytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
