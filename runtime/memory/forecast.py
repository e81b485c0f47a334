"""What drawing needs on the device, known before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import FAST, TEXT_ENCODER
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.memory.plan import make_plan
from hart_runtime.runtime.shapes import evaluate
from hart_runtime.runtime.tensorrt.profiles import settings_run

DRIVER = 500_000_000
"""Bytes that CUDA and the libraries take for themselves, about: kernels, tables, the context."""
FIRST_BLOCK, LARGEST_BLOCK = 1 << 20, 1 << 30
"""Bytes of the blocks that an arena of ONNX Runtime takes: each twice the one before it."""
BLOCKS = "depth * (token_weights + modulation) * weight"
"""Formula of the bytes of the transformer's products, which engines that leave tokens out hold once more."""
PROCESS = 300_000_000
"""Bytes that a process takes on the host, about: Python and the libraries."""


@dataclass(frozen=True)
class Needed:
    """Bytes on the device while a batch of pictures is drawn."""

    weights: int
    """Without those of the text encoder, which is closed before the rest is opened."""
    text: int
    """Weights of the text encoder, for who keeps it open."""
    arena: int
    """Everything that passes from graph to graph, the KV cache included."""
    cache: int
    """Of these, the KV cache."""
    constants: int
    scratch: int
    """Inside a graph, at the most; graphs run one after another in the same memory."""
    staged: int
    """On the host: page-locked memory, where random numbers wait for the device."""
    measured: bool = False
    """Whether the scratch is what a library asks for, or an estimate."""

    @property
    def total(self) -> int:
        """At the most, with the text encoder closed before the rest is opened."""
        return DRIVER + max(self.weights + self.arena + self.constants + self.scratch, self.text)

    @property
    def shared(self) -> int:
        """The same where CPU and GPU share their memory, with what the process has on the host.

        Weights are counted once: a file that is mapped while it is read takes nothing that others could not
        have.
        """
        return self.total + self.staged + PROCESS


def needed(
    manifest: Manifest,
    batch: int,
    weights: int | None = None,
    scratch: int | None = None,
    engines: bool = False,
    keep: str | None = None,
) -> Needed:
    """What drawing a batch needs.

    Args:
        weights: bytes of all weights together, where the manifest does not list the file yet.
        scratch: the most that a library asks for beside a graph, where it is known.
        engines: whether scratch is one block, and not an arena of ONNX Runtime.
        keep: shares of tokens of the engines that leave tokens out, where there are any.
    """
    stored = manifest.files[WEIGHTS].size if weights is None else weights
    sizes = manifest.sizes
    text = sizes.get("text_weights", 0) * sizes["weight"] + sizes.get("text_table", 0) * sizes["kept"]
    text = min(text, stored) if TEXT_ENCODER in manifest.graphs else 0
    drawn = [manifest.sampling] if keep is None else [manifest.sampling, *settings_run(manifest, FAST, keep)]
    plans = [make_plan(manifest.program(settings, batch), engines) for settings in drawn]
    inside = scratch
    if inside is None:
        largest = max(scratch_of(manifest, batch).values())
        inside = largest if engines else doubled(largest)
    return Needed(
        weights=stored - text + (0 if keep is None else evaluate(BLOCKS, sizes)),
        text=text,
        arena=max(plan.nbytes for plan in plans),
        cache=max(plan.cache_nbytes for plan in plans),
        constants=max(plan.constant_nbytes for plan in plans),
        scratch=inside,
        staged=max(plan.staged_nbytes for plan in plans),
        measured=scratch is not None,
    )


def doubled(nbytes: int) -> int:
    """Bytes of an arena that grew until it held these."""
    total, block = 0, FIRST_BLOCK
    while total < nbytes:
        total += block
        block = min(2 * block, LARGEST_BLOCK)
    return total


def scratch_of(manifest: Manifest, batch: int) -> dict[str, int]:
    """Estimated bytes inside each graph of a batch, at its largest scale."""
    return {
        name: _largest(manifest, name, manifest.contract(name).scratch, batch) for name in manifest.required
    }


def scores_of(manifest: Manifest, name: str, batch: int) -> int:
    """Bytes of a block's attention scores at a graph's largest scale; only a fused kernel writes none."""
    return _largest(manifest, name, manifest.contract(name).scores, batch)


def _largest(manifest: Manifest, name: str, formula: str, batch: int) -> int:
    """A formula at the scale where it is largest. The decoder draws one picture at a time."""
    pictures = 1 if name == FAMILIES[manifest.family].decode.graph else batch
    rows = manifest.dims_of(name, pictures)
    return max(evaluate(formula, {**manifest.sizes, **row}) for row in rows)


def sentence(batch: int, memory: Needed, shared: bool = False) -> str:
    """What a batch needs, in words.

    Args:
        shared: whether CPU and GPU share their memory.
    """
    parts = [
        ("weights", memory.weights),
        ("arena", memory.arena),
        ("constants", memory.constants),
        ("scratch" if memory.measured else "scratch (an estimate)", memory.scratch),
        ("CUDA itself", DRIVER),
    ]
    total, where = memory.total, "on the device"
    if shared:
        parts.append(("the host's buffers and libraries", memory.staged + PROCESS))
        total, where = memory.shared, "of the memory that CPU and GPU share"
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)
    return f"batch {batch} needs about {total / 1e9:.2f} GB {where}: {listed}"
