"""What the loop of the reference tells, and what recordings of the fullest level hold beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from hart_runtime.hart.generate import Record
from hart_runtime.hart.model import Hart, Var


@contextlib.contextmanager
def recording_all(model: Hart | Var, found: dict[str, NDArray[Any]]) -> Iterator[Record]:
    """A function to give to the loop; ``found`` gets every tensor by the name that recordings have for it."""
    transformer = model.transformer

    def record(name: str, value: Tensor) -> None:
        if name.startswith("kv."):  # recorded as (2B, H, L, dh)
            value = value.unflatten(-1, (transformer.config.num_heads, -1)).transpose(1, 2)
        found[name] = value.numpy().copy()

    hooks = [transformer.head_nm.register_forward_hook(_Inner("head_in", found))]
    for i, block in enumerate(transformer.blocks):
        hooks.append(block.register_forward_hook(_Inner(f"block{i}.out", found)))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


class _Inner:
    """Forward hook that records a module's output under the scale it ran in."""

    def __init__(self, name: str, found: dict[str, NDArray[Any]]) -> None:
        self.name, self.found, self.scale = name, found, 0

    def __call__(self, module: object, args: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        assert isinstance(tensor, Tensor)
        self.found[f"scale{self.scale}.{self.name}"] = tensor.numpy().copy()
        self.scale += 1
