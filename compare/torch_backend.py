"""PyTorch as a backend: what its own half precision would make of the same graphs.

Not the ruler. It says how much of an engine's error half precision explains by itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hart_runtime.common.errors import RunError, first_line
from hart_runtime.compare import TORCH_FP16
from hart_runtime.compare.record import Source
from hart_runtime.export.graphs import build_graphs
from hart_runtime.hart.transformer import scaled_dot_product
from hart_runtime.runtime.backends.backend import Lease, Limits, Outputs, Unplanned, Value, Values
from hart_runtime.runtime.program import Program, Run


class TorchHalfBackend:
    """The exported graphs' modules run by PyTorch with matrix products in float16."""

    name = TORCH_FP16
    limits: Limits | None = None

    def __init__(self, source: Source, patch_nums: tuple[int, ...], device: str) -> None:
        model, text = source.load(torch.float16, device)
        self.device = device
        with torch.inference_mode():
            graphs = [build() for build in build_graphs(model, text, patch_nums, scaled_dot_product).values()]
        self._outputs = {graph.name: graph.outputs for graph in graphs}
        self._dtypes = {
            graph.name: {name: example.dtype for name, (example, _) in graph.inputs.items()}
            for graph in graphs
        }
        self.modules = {graph.name: graph.module.to(device).eval() for graph in graphs}

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        return Unplanned(self).begin(program)  # PyTorch allocates as it goes

    def append(self, past: Value, new: Value) -> Value:
        assert isinstance(new, torch.Tensor)
        return torch.cat([self._upload(past, new.dtype), new])

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        pass  # only pictures are asked for here

    def split(self, value: torch.Tensor) -> list[torch.Tensor]:
        return list(value[:, None])

    def half(self, value: Value) -> Value:
        return value[: len(value) // 2]

    @torch.inference_mode()
    def run(self, run: Run, inputs: Values) -> Outputs:
        given = [self._upload(inputs[name], dtype) for name, dtype in self._dtypes[run.graph].items()]
        try:
            outputs = self.modules[run.graph](*given)
        except RuntimeError as error:
            raise RunError(f"{self.name}, graph {run.graph}: {first_line(error)}") from None
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self._outputs[run.graph], outputs, strict=True))

    def to_host(self, value: Value) -> NDArray[Any]:
        return value if isinstance(value, np.ndarray) else np.asarray(value.cpu().numpy())

    def _upload(self, value: Value, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        return tensor.to(self.device, dtype)
