"""Where ONNX Runtime's CUDA provider computes each node of a graph, and what it has to copy for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

READ_ON_THE_CPU = {"TopK": (1,), "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Range": (0, 1, 2)}
READ_ON_THE_CPU |= {
    "Tile": (1,),
    "Pad": (1, 2, 3),
    "ConstantOfShape": (0,),
    "Resize": (1, 2, 3),
    "Clip": (1, 2),
}
READ_ON_THE_CPU |= {"Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,), "CumSum": (1,), "OneHot": (1,)}
READ_ON_THE_CPU |= {
    f"Reduce{kind}": (1,) for kind in ("Sum", "Max", "Min", "Mean", "Prod", "L2", "SumSquare")
}
"""Inputs that its kernels want on the host, by operator."""
WITHOUT_KERNEL = frozenset({"Multinomial", "Bernoulli", "NonMaxSuppression", "StringNormalizer", "Unique"})
SMALL = 100
"""Elements of an initializer that may lie on either side."""


@dataclass(frozen=True)
class Placement:
    """Of a whole graph."""

    on_the_cpu: tuple[int, ...]
    """Numbers of nodes."""
    inputs: dict[str, str]
    """"cpu" or "cuda", for every input of the graph."""
    to_host: int
    """Copies for each run, of which each is a wait as well."""
    to_device: int

    @property
    def capturable(self) -> bool:
        return not self.to_host and not self.to_device


def place(model: ModelProto, types: Mapping[str, int]) -> Placement:
    """Place nodes in their order, the arithmetic on shapes beside the shapes."""
    stored = {i.name: int(np.prod(i.dims, dtype=np.int64)) for i in model.graph.initializer}
    fed = {v.name for v in model.graph.input if v.name not in stored}
    opset = next(o.version for o in model.opset_import if o.domain == "")
    host: set[str] = set()
    copied: dict[str, set[str]] = {"cpu": set(), "cuda": set()}
    wanted: dict[str, set[str]] = {name: set() for name in fed}
    on_the_cpu = []
    for number, node in enumerate(model.graph.node):
        alone = _without_kernel(node, opset) or _beside_shapes(node, host, stored, fed, types)
        if node.op_type == "Constant":
            stored |= dict.fromkeys(node.output, 1)
            continue
        for place, name in enumerate(node.input):
            if not name or name in stored:
                continue
            reads = "cpu" if alone or place in READ_ON_THE_CPU.get(node.op_type, ()) else "cuda"
            if node.op_type in {"Shape", "Size"}:
                reads = "cpu" if name in host else "cuda"
            if name in fed:
                wanted[name].add(reads)
            elif (name in host) != (reads == "cpu"):
                copied[reads].add(name)
        if alone:
            on_the_cpu.append(number)
        if alone or node.op_type in {"Shape", "Size"}:
            host |= {*node.output}
    both = [name for name, places in wanted.items() if len(places) == 2]
    return Placement(
        tuple(on_the_cpu),
        {name: "cpu" if "cpu" in places else "cuda" for name, places in wanted.items()},
        len(copied["cpu"]),
        len(copied["cuda"]) + len(both),
    )


def _without_kernel(node: NodeProto, opset: int) -> bool:
    return node.op_type in WITHOUT_KERNEL or (node.op_type == "InstanceNormalization" and opset >= 22)


def _beside_shapes(
    node: NodeProto, host: set[str], stored: Mapping[str, int], fed: set[str], types: Mapping[str, int]
) -> bool:
    """Whether a node reads nothing but shapes that lie on the host, and numbers that may lie there."""
    if not any(name in host for name in node.input):
        return False
    for place, name in enumerate(node.input):
        if not name or name in fed or stored.get(name, SMALL + 1) <= SMALL:
            continue
        if name not in host or types.get(name) == TensorProto.FLOAT16:
            return False
        if place in READ_ON_THE_CPU.get(node.op_type, ()):
            return False  # its kernel on the device takes them from the host
    return True
