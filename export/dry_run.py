"""A dry run of ``hart-export``: what would be exported, and what of it does not fit this machine."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hart_runtime.common.errors import InputError
from hart_runtime.common.install import pip
from hart_runtime.common.precisions import FP32, PRECISIONS
from hart_runtime.export.bundle import torch_dtype
from hart_runtime.export.footprint import Weights, scratch_of, typed, weights_of
from hart_runtime.export.request import Request
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import check_text_encoder, empty_text_encoder
from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.manifest import Manifest, manifest_of
from hart_runtime.runtime.memory.forecast import Needed, needed, sentence
from hart_runtime.runtime.work import count

BATCHES = (1, 2, 4, 8)
SECONDS, SECONDS_PER_BLOCK, SECONDS_PER_GB = 60.0, 1.5, 5.0
"""What an export took on one core of a server: tracing what every model has, each block of a
transformer, and reading, writing and hashing weights."""
LIBRARIES = 0.6e9
"""Bytes that an exporting process holds beside weights."""


@dataclass(frozen=True)
class Memory:
    """Bytes of drawing one batch in one precision."""

    weights: int
    cache: int
    between: int
    """Everything that passes from graph to graph, at its planned addresses, without the cache."""
    inside: int
    """The most that one graph needs while it runs."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.between + self.inside


@dataclass(frozen=True)
class Forecast:
    """What exporting a checkpoint would make."""

    checked: bool
    """Whether any weight file was there to compare the configuration with."""
    unseen: tuple[str, ...]
    """Networks without weight files."""
    graphs: dict[str, dict[str, Weights]]
    """By precision and graph."""
    weights: dict[str, Weights]
    """By precision, what graphs share counted once."""
    read: int
    """Bytes of weight files to read."""
    blocks: int
    memory: dict[tuple[str, int], Memory]
    """By precision and batch size, on the CPU."""
    device: dict[tuple[str, int], Needed]
    """The same on a GPU, of precisions that one runs."""
    operations: float
    """Of one picture, a multiply-add counted as two."""

    def seconds(self, precision: str) -> float:
        """Estimated time of the export."""
        size = self.read + self.weights[precision].nbytes
        return SECONDS + self.blocks * SECONDS_PER_BLOCK + size / 1e9 * SECONDS_PER_GB

    def export_memory(self, precision: str) -> float:
        """Estimated peak: the weights as they are exported, and the largest files they come from."""
        mapped = self.weights[FP32].nbytes if precision != FP32 else 0
        return self.weights[precision].nbytes + mapped + LIBRARIES


def forecast(request: Request) -> Forecast:
    """Look at configurations, and at the headers of weight files if there are any.

    Raises:
        InputError: a configuration cannot be used, or weight files do not fit it.
    """
    request.check(weights=False)
    checkpoint, max_batch = request.checkpoint, request.max_batch
    model, text_network = checkpoints.empty(checkpoint), checkpoint.text_encoder
    text = empty_text_encoder(text_network) if text_network else None
    unseen = tuple(name for name, network in checkpoint.networks.items() if not network.has_weights)
    checkpoints.check(checkpoint)
    if text_network and text_network.has_weights:
        check_text_encoder(text_network)
    graphs, weights, memory, device = {}, {}, {}, {}
    for precision in PRECISIONS:
        dtype = torch_dtype(precision)
        manifest = _manifest(request, precision)
        for network in (model.transformer, model.tokenizer, text):
            if network is not None:
                typed(network, dtype)
        graphs[precision], weights[precision] = weights_of(model, text, manifest)
        for batch in sorted({b for b in BATCHES if b < max_batch} | {max_batch}):
            found = needed(manifest, batch, weights[precision].nbytes)
            memory[precision, batch] = Memory(
                weights=weights[precision].nbytes,
                cache=found.cache,
                between=found.arena + found.constants - found.cache,
                inside=max(scratch_of(model, text, manifest, batch).values()),
            )
            if PRECISIONS[precision].engines:
                device[precision, batch] = found
    layers = len(text.layers) if text else 0
    return Forecast(
        checked=len(unseen) < len(checkpoint.networks),
        unseen=unseen,
        graphs=graphs,
        weights=weights,
        read=weights[FP32].nbytes,
        blocks=model.transformer.config.depth + layers,
        memory=memory,
        device=device,
        operations=sum(work.operations for work in count(manifest, 1).values()),
    )


def _manifest(request: Request, precision: str) -> Manifest:
    checkpoint = request.checkpoint
    planned = manifest_of(request.family, request.model, precision, request.max_batch, checkpoint.sampling)
    graphs = {name: spec for name, spec in planned.graphs.items() if request.encoder or name != ENCODER}
    return replace(planned, graphs=graphs, checkpoint=checkpoint.describe())


def what_does_not_fit(found: Forecast, precision: str, output: Path) -> list[str]:
    """One sentence for everything that this machine is too small for."""
    total, available = machine_memory()
    problems = []
    needed = found.export_memory(precision)
    if needed > available:
        problems.append(
            f"the {precision} export needs about {_gb(needed)} of memory, "
            f"{_gb(available)} of {_gb(total)} are available"
        )
    for (kind, batch), memory in found.memory.items():
        if memory.total > total:
            problems.append(
                f"drawing in {kind} with batch {batch} on the CPU needs about {_gb(memory.total)} of memory, "
                f"this machine has {_gb(total)}"
            )
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    free, size = shutil.disk_usage(parent).free, found.weights[precision].nbytes
    if size > free:
        problems.append(f"{output}: the bundle takes {_gb(size)}, {_gb(free)} are free on its disk")
    return problems


def machine_memory() -> tuple[int, int]:
    """All memory of this machine and what of it can be had now, in bytes.

    Raises:
        InputError: this system does not tell, and psutil is not installed.
    """
    try:
        import psutil
    except ModuleNotFoundError:
        file = Path("/proc/meminfo")
        if not file.is_file():
            raise InputError(
                f"a dry run needs psutil on this system; install it with: {pip()} install psutil"
            ) from None
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(encoding="utf-8"), re.MULTILINE))
        return int(sizes["MemTotal"]) * 1024, int(sizes["MemAvailable"]) * 1024
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def show(found: Forecast, precision: str, output: Path) -> None:
    """Print the forecast: tables on a terminal, plain text in a pipe."""
    console = Console()
    style = box.SIMPLE if console.is_terminal else None
    if not console.is_terminal:
        console = Console(width=110)
    source = "configurations alone"
    if found.checked:
        source = "configurations and the headers of weight files, not their values"
        source += f"; there are none of {' and '.join(found.unseen)}" if found.unseen else ""
    console.print(Text(f"would write {output} in {precision}; from {source}"), soft_wrap=True)
    console.print(_graph_table(found, style))
    console.print(_memory_table(found, style))
    rates = f"{SECONDS:g} s, {SECONDS_PER_BLOCK:g} s a block, {SECONDS_PER_GB:g} s a GB read or written"
    lines = [
        f"one picture: {found.operations / 1e12:.3g} TFLOP",
        f"time of the export: about {found.seconds(precision):.0f} s on one core ({rates})",
        f"memory of the export: about {_gb(found.export_memory(precision))}",
    ]
    lines += [
        f"on a GPU in {kind}, {sentence(batch, memory)}"
        for (kind, batch), memory in found.device.items()
        if kind == precision
    ]
    problems = what_does_not_fit(found, precision, output)
    lines += [f"does not fit: {problem}" for problem in problems] or ["everything fits this machine"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _graph_table(found: Forecast, style: box.Box | None) -> Table:
    table = Table("graph", box=style)
    for name in ("parameters", *(f"{precision} MB" for precision in found.graphs)):
        table.add_column(name, justify="right")
    first = next(iter(found.graphs.values()))
    for name, held in first.items():
        sizes = [graphs[name].nbytes for graphs in found.graphs.values()]
        table.add_row(name, f"{held.parameters:,}", *(f"{size / 1e6:,.1f}" for size in sizes))
    totals = [weights.nbytes for weights in found.weights.values()]
    together = f"{found.weights[FP32].parameters:,}"
    table.add_row("together", together, *(f"{size / 1e6:,.1f}" for size in totals))
    return table


def _memory_table(found: Forecast, style: box.Box | None) -> Table:
    table = Table("drawing", box=style)
    for name in (
        "batch",
        "weights GB",
        "KV cache GB",
        "between graphs GB",
        "inside a graph GB",
        "together GB",
    ):
        table.add_column(name, justify="right")
    for (precision, batch), m in found.memory.items():
        sizes = (m.weights, m.cache, m.between, m.inside, m.total)
        table.add_row(precision, str(batch), *(f"{size / 1e9:.2f}" for size in sizes))
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
