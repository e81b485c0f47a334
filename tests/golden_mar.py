"""Recorded runs of the published MAR code, and how close a replay has to come.

Files are found as :mod:`tests.golden_runs` finds them. None is in the repository, for their size: the whole
is replayed with ``HART_GOLDEN_DIR``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor

from hart_runtime.common.diffusion_schedule import DiffusionSchedule, diffusion_schedule
from hart_runtime.common.json_files import read_json
from hart_runtime.common.masking import TokenStep, token_steps
from hart_runtime.common.noise import RecordedNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart.generate import Record
from hart_runtime.hart.model import Mar
from tests.golden_runs import MAR, folders

TENSORS, IMAGE, DIFFUSION = 1e-4, 2e-4, 2e-3
"""Tolerances, relative to the largest magnitude if that is above 1. The first diffusion step multiplies
rounding by hundreds, which the following ones take back."""
STACKED = ("x_t", "net_out", "model_out", "pred_xstart", "mean", "log_variance")
"""Of these the recordings hold some denoising steps, ``diff_j``."""
FED = ("orders", "label", "noise")


@dataclass(frozen=True)
class MarRun:
    """One recorded run."""

    file: Path

    @property
    def variant(self) -> Path:
        return self.file.parent.parent

    @property
    def label(self) -> str:
        return f"{self.variant.name}-{self.file.stem.removeprefix('run_')}"

    @property
    def parameters(self) -> dict[str, Any]:
        with safe_open(self.file, "np") as opened:
            return dict(json.loads(opened.metadata()["run"]))

    @property
    def ema(self) -> bool:
        return self.parameters.get("weights", "model_ema") == "model_ema"

    @property
    def temperature(self) -> float:
        return float(self.parameters["temperature"])

    @property
    def schedule(self) -> DiffusionSchedule:
        return diffusion_schedule(self.parameters["num_sampling_steps"])

    def tensors(self) -> dict[str, NDArray[Any]]:
        return load_file(self.file)

    def labels(self, num_classes: int) -> NDArray[np.int64]:
        """Without any recorded, all pictures are of no class."""
        nothing = np.full(self.parameters["B"], num_classes, np.int64)
        return self.tensors().get("label", nothing)

    def noise(self) -> RecordedNoise:
        return RecordedNoise(self.tensors())

    def settings(self, usual: SamplingSettings) -> SamplingSettings:
        """In the words of a bundle, which draws as ``usual``."""
        given = self.parameters
        return replace(
            usual,
            guidance=float(given["cfg"]),
            guidance_schedule=given["cfg_schedule"],
            iterations=given["num_iter"],
            temperature=self.temperature,
            steps=given["num_sampling_steps"],
        )

    def steps(self, tokens: int) -> tuple[TokenStep, ...]:
        given = self.parameters
        return token_steps(tokens, given["num_iter"], given["cfg"], given["cfg_schedule"])

    def expected(self) -> dict[str, NDArray[Any]]:
        """What a replay must reproduce (not what it was fed)."""
        return {name: value for name, value in self.tensors().items() if not name.endswith(FED)}

    def compare(self, found: Mapping[str, NDArray[Any]], partial: bool = False) -> int:
        """Masks are equal, bytes off by at most one, tensors within tolerance; returns how many there were.

        Args:
            partial: allows unrecorded names.
        """
        told, compared = self.parameters, 0
        for name, value in self.expected().items():
            if partial and name not in found:
                continue
            assert name in found, f"{self.label}: not produced: {name}"
            # Of pictures the recordings have the unclamped pixels.
            result = found["unclamped" if name == "image" and "unclamped" in found else name]
            if name.rpartition(".diff.")[2] in STACKED and ".diff." in name:
                result = result[told["diff_j"]]
            compared += 1
            where = f"{self.label}: {name}"
            if name == "png":
                assert np.abs(result.astype(int) - value.astype(int)).max() <= 1, where
            elif not np.issubdtype(value.dtype, np.floating):
                assert np.array_equal(result, value), where
            else:
                close(where, name, result, value)
        assert compared, self.label
        return compared


def close(where: str, name: str, result: NDArray[Any], value: NDArray[Any]) -> None:
    limit = DIFFUSION if ".diff." in name else IMAGE if name == "image" else TENSORS
    assert result.shape == value.shape, where
    error = np.abs(result.astype(float) - value.astype(float)).max() / max(1.0, float(np.abs(value).max()))
    assert error <= limit, f"{where}: off by {error:.2e}, allowed {limit:.0e}"


def mar_variants() -> list[Path]:
    """Folders that hold a variant of MAR, in HART_GOLDEN_DIR."""
    return folders(MAR)


def mar_runs() -> list[MarRun]:
    return [MarRun(file) for v in mar_variants() for file in sorted((v / "golden").glob("run_*.safetensors"))]


def heads_of(variant: Path) -> tuple[int, int]:
    """Heads of encoder and decoder, which no tensor tells."""
    told = read_json(variant / "config.json")["mar"]
    return told["encoder_num_heads"], told["decoder_num_heads"]


@contextlib.contextmanager
def recording_all(model: Mar, found: dict[str, NDArray[Any]]) -> Iterator[Record]:
    """A function to give to the loop; ``found`` gets every tensor by the name that recordings have for it."""

    def record(name: str, value: Tensor) -> None:
        found[name] = value.numpy().copy()

    transformer, hooks = model.transformer, []
    for part, blocks in (("enc", transformer.encoder_blocks), ("dec", transformer.decoder_blocks)):
        hooks.append(blocks[0].register_forward_hook(_Inner(f"{part}_in", found, of_input=True)))
        for i, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(_Inner(f"{part}_block{i}.out", found)))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


class _Inner:
    """Forward hook that records a block's output, or its input, under the step it ran in."""

    def __init__(self, name: str, found: dict[str, NDArray[Any]], of_input: bool = False) -> None:
        self.name, self.found, self.of_input, self.step = name, found, of_input, 0

    def __call__(self, module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
        tensor = args[0] if self.of_input else output
        self.found[f"step{self.step}.{self.name}"] = tensor.numpy().copy()
        self.step += 1
