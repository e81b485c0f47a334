"""Finds recorded runs of the published code and compares trajectories with them.

A variant is a folder with ``llm/`` and ``tokenizer/`` (HART), ``var.pth`` and ``vae.pth`` (VAR), or
``checkpoint-last.pth`` and ``kl16.ckpt`` (MAR), and ``golden/run_*.safetensors``. Every run
carries its call parameters, the injected noise, and tensors named ``scaleK.hidden`` and so on; MAR's are in
:mod:`tests.golden_mar`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from hart_runtime.common.config import TransformerConfig, config_from_dict
from hart_runtime.common.json_files import read_json
from hart_runtime.common.noise import RecordedNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.recorded import recording
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.runtime.manifest import Manifest

HERE = Path(__file__).parent / "golden"
HART, VAR, MAR = "llm/config.json", "var.pth", "kl16.ckpt"
"""What tells that a folder holds a variant of one of them."""
RECORDED = ("golden/run_*.safetensors", "golden/pruned_*.safetensors", "golden/edit_*.safetensors")
"""Files of ordinary, of pruned and of editing runs."""
INPUTS = ("ctx.", "label", "image_in", "edit_mask")
NOISE = (".u", ".gumbel_exp", "noise")
ABSOLUTE, IMAGE, SMOOTH = 1e-4, 2e-4, 1e-3
"""Tolerances of plain tensors, of pictures, and of everything in smooth runs."""
AMPLIFIED, ESTIMATE = 2e-4, ".step1.pred_xstart"
"""Tolerance of the denoised estimate at the second step, which multiplies the rounding of eps by 4.5, more
than any other but the first (whose estimates are all clamped). Kernels of different processors put it
0.4e-4 to 1.35e-4 from the recording, and the head in float64 0.84e-4: the recording's own rounding."""

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Run:
    """One recorded run."""

    file: Path

    @property
    def variant(self) -> Path:
        return self.file.parent.parent

    @property
    def label(self) -> str:
        """Folders of several places may have one name: pytest numbers theirs."""
        return f"{self.variant.name}-{self.file.stem.removeprefix('run_')}"

    @property
    def parameters(self) -> dict[str, object]:
        with safe_open(self.file, "np") as opened:
            return dict(json.loads(opened.metadata()["run"]))

    @property
    def ema(self) -> bool:
        """Which weights the run was recorded with."""
        return self.parameters.get("weights", "llm/ema_model.bin") == "llm/ema_model.bin"

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return tuple(self.parameters["patch_nums"])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        return load_file(self.file)

    def given(self) -> dict[str, NDArray[Any]]:
        """What the graphs begin with: text features and their mask."""
        tensors = self.tensors()
        return {
            "features": tensors["ctx.features"].astype(np.float32),
            "mask": tensors["ctx.mask"].astype(np.bool_),
        }

    def noise(self) -> RecordedNoise:
        return RecordedNoise(self.tensors())  # type: ignore[arg-type]

    def settings(self) -> SamplingSettings:
        given = self.parameters
        return SamplingSettings(
            guidance=float(given["cfg"]),  # type: ignore[arg-type]
            top_p=float(given["top_p"]),  # type: ignore[arg-type]
            smooth=bool(given["more_smooth"]),
            residual=given["final_stage"] == 0,
            steps=self.config.num_sampling_steps,
        )

    @property
    def config(self) -> TransformerConfig:
        file = self.variant / "llm" / "config.json"
        return config_from_dict(TransformerConfig, read_json(file), str(file))

    def tolerance(self, name: str) -> float:
        if self.settings().smooth:
            return SMOOTH
        if name.endswith(ESTIMATE):
            return AMPLIFIED
        return IMAGE if name == "image" else ABSOLUTE

    def expected(self) -> dict[str, NDArray[np.generic]]:
        """The recorded tensors that a replay must reproduce (not what it was fed)."""
        return {
            name: value
            for name, value in self.tensors().items()
            if not name.startswith(INPUTS) and not name.endswith(NOISE)
        }


@dataclass(frozen=True)
class ClassRun(Run):
    """One recorded run of VAR."""

    def given(self) -> dict[str, NDArray[Any]]:
        return {"label": self.tensors()["label"]}

    def settings(self) -> SamplingSettings:
        given = self.parameters
        return SamplingSettings(
            guidance=float(given["cfg"]),  # type: ignore[arg-type]
            top_k=int(given["top_k"]) or None,  # type: ignore[call-overload]
            top_p=float(given["top_p"]),  # type: ignore[arg-type]
            smooth=bool(given["more_smooth"]),
            residual=False,
        )


@dataclass(frozen=True)
class PrunedRun(Run):
    """One recorded run of FastVAR's code; of some tensors the first rows."""

    @property
    def label(self) -> str:
        return f"{self.variant.name}-{self.file.stem}"

    def settings(self) -> SamplingSettings:
        kept: dict[str, int] = self.parameters["prune_keep"]  # type: ignore[assignment]
        shares = (count / int(side) ** 2 for side, count in kept.items())
        return replace(super().settings(), prune=True, keep=",".join(map(str, shares)))

    def check(self, found: dict[str, NDArray[np.generic]]) -> None:
        """Indices are equal, kept tokens as sets, scores within 1e-5 of each, tensors as in other runs."""
        rows = int(self.parameters["rows"])  # type: ignore[call-overload]
        for name, value in self.expected().items():
            block, _, what = name.rpartition(".")
            if what in ("k_mean", "v_mean"):
                whole = found[f"{block}.{what[0]}"]  # (2B, L, C)
                result = whole.mean(axis=1, dtype=np.float64).reshape(value.shape)
            else:
                result = np.asarray(found[name])
                if what == "out":
                    result = result[:, :rows]
                result = result.reshape(value.shape)
            if what == "kept":
                assert np.array_equal(np.sort(result, -1), np.sort(value, -1)), f"{self.label}: {name}"
            elif what == "score":
                np.testing.assert_allclose(
                    result.astype(float), value.astype(float), rtol=1e-5, err_msg=f"{self.label}: {name}"
                )
            elif what == "idx":
                assert np.array_equal(result, value), f"{self.label}: {name}"
            else:
                error = np.abs(result.astype(np.float64) - value.astype(np.float64)).max()
                assert error <= self.tolerance(name), f"{self.label}: {name}: off by {error:.2e}"


@dataclass(frozen=True)
class EditRun(ClassRun):
    """One recorded run of VAR's notebook that edits pictures."""

    @property
    def label(self) -> str:
        return f"{self.variant.name}-{self.file.stem}"

    @property
    def cells(self) -> NDArray[np.bool_]:
        """What is kept at the last scale, (B, P, P)."""
        tensors = self.tensors()
        mask = tensors["edit_mask"].astype(np.bool_)
        return np.broadcast_to(mask, (len(tensors["label"]), *mask.shape[-2:]))


def roots() -> list[Path]:
    extra = [Path(p) for p in os.environ.get("HART_GOLDEN_DIR", "").split(os.pathsep) if p]
    for folder in extra:
        found = {file.parent.parent for pattern in RECORDED for file in folder.rglob(pattern)}
        if not found:
            raise FileNotFoundError(f"HART_GOLDEN_DIR: no recorded runs below {folder}")
        for strange in (f for f in found if not any((f / sign).is_file() for sign in (HART, VAR, MAR))):
            warnings.warn(
                f"{strange}: holds neither {HART} nor {VAR} nor {MAR}, its runs are not replayed",
                stacklevel=2,
            )
    return [HERE, *extra]


def variants() -> list[Path]:
    """Folders that hold a text-to-image variant, in the project and in HART_GOLDEN_DIR."""
    return folders(HART)


def class_variants() -> list[Path]:
    """Those that hold a variant of VAR."""
    return folders(VAR)


def heads_of(variant: Path) -> int | None:
    """Heads of a variant of VAR, which files without normalised attention do not tell."""
    heads: int | None = read_json(variant / "config.json")["var"].get("num_heads")
    return heads


def folders(sign: str) -> list[Path]:
    """Those that hold variants with this file and recorded runs."""
    found = {
        folder.parent.resolve()
        for root in roots()
        for folder in root.rglob("golden")
        if (folder.parent / sign).is_file() and any(folder.glob("run_*"))
    }
    return sorted(found)


def runs() -> list[Run]:
    return [Run(file) for v in variants() for file in sorted((v / "golden").glob("run_*.safetensors"))]


def pruned_runs() -> list[PrunedRun]:
    found = {file.resolve() for root in roots() for file in root.rglob(RECORDED[1])}
    return [PrunedRun(file) for file in sorted(found)]


def edit_runs() -> list[EditRun]:
    found = {file.resolve() for root in roots() for file in root.rglob(RECORDED[2])}
    return [EditRun(file) for file in sorted(found) if (file.parent.parent / VAR).is_file()]


def class_runs() -> list[ClassRun]:
    return [ClassRun(f) for v in class_variants() for f in sorted((v / "golden").glob("run_*.safetensors"))]


def drawn_by_graphs(run: Run, backend: Backend, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """What the graphs return where they draw a recorded run, and its pictures; every scale's indices."""
    recorder, found = recording(backend, manifest)
    given = run.given()
    program = manifest.program(run.settings(), len(next(iter(given.values()))))
    found["image"] = drawn(draw(recorder, program, given, run.noise())).images
    assert {f"scale{k}.idx" for k in range(len(run.patch_nums))} <= set(found)
    return found


def compare(run: Run, found: Arrays, factor: float = 1.0, partial: bool = False) -> None:
    """Indices must be equal, tensors within tolerance; ``partial`` allows unrecorded names."""
    expected = run.expected()
    if partial:
        expected = {name: value for name, value in expected.items() if name in found}
    missing = sorted(set(expected) - set(found))
    assert not missing, f"{run.label}: not produced: {missing}"
    assert expected, f"{run.label}: nothing to compare"
    first = expected.get("scale0.x_in")
    if partial and first is not None and found["scale0.x_in"].size < first.size:
        expected["scale0.x_in"] = np.split(first, 2)[0]  # graphs run a text in the conditional half alone
    for name, value in expected.items():
        result = np.asarray(found[name]).reshape(value.shape)
        if np.issubdtype(value.dtype, np.integer):
            wrong = int((result != value).sum())
            assert wrong == 0, f"{run.label}: {name}: {wrong} of {value.size} indices differ"
            continue
        error = np.abs(result.astype(np.float64) - value.astype(np.float64)).max()
        limit = factor * run.tolerance(name)
        assert error <= limit, f"{run.label}: {name}: off by {error:.2e}, allowed {limit:.0e}"
