"""Operations and bytes of each stage, from the formulas of the contract.

Counted is what a picture needs, not what a graph does: matrix products, convolutions and
attention (a multiply-add is two operations) for both guidance halves, and the bytes that have to
move if everything inside a stage stays in fast memory: its weights, its inputs (KV cache and
random numbers among them) and its outputs.

Some work is needed less often than a plain loop does it, and is counted that often: the
unconditional half of the text context does not depend on the prompt, the vocabulary projection
is affine, so guidance can come before it, and embeddings of levels and timesteps are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from hart_runtime.runtime.contract import Contract
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.shapes import Dims, evaluate
from hart_runtime.runtime.text import ENCODE


@dataclass(frozen=True)
class Work:
    """What a stage has to do."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


def count(manifest: Manifest, batch: int) -> dict[str, Work]:
    """Work of every stage of a batch of pictures, with the bundle's sampling settings.

    The text encoder is left out when the manifest does not say how large it is.
    """
    sizes = manifest.sizes
    program = manifest.program(manifest.sampling, batch)
    work: dict[str, Work] = {}
    for run in (ENCODE, *program.runs(), program.decode):
        contract = manifest.contract(run.graph)
        rows = manifest.dims_of(run.graph, batch)
        dims = rows[run.index if len(rows) > 1 else 0]
        if contract.needs <= sizes.keys() | dims.keys():
            work[run.stage] = work.get(run.stage, Work()) + work_of(contract, {**sizes, **dims})
    return work


def work_of(contract: Contract, sizes: Dims) -> Work:
    """Of one run."""
    return Work(evaluate(contract.operations, sizes), evaluate(contract.bytes, sizes))
