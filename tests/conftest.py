"""Fixtures that are expensive to make and shared by many tests."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest

from export.bundle import export_bundle
from hart.demo import DEMO_CHECKPOINT
from runtime import Pipeline


class ExportOnce(Protocol):
    def __call__(
        self, checkpoint: Path, precision: str, patch_nums: tuple[int, ...] | None = ..., ema: bool = ...
    ) -> Path: ...


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> ExportOnce:
    """Export a checkpoint, or return the bundle if this session made it already."""
    made: dict[object, Path] = {}

    def export(
        checkpoint: Path, precision: str, patch_nums: tuple[int, ...] | None = None, ema: bool = True
    ) -> Path:
        key = (checkpoint, precision, patch_nums, ema)
        if key not in made:
            output = tmp_path_factory.mktemp("bundles") / f"{checkpoint.name}-{precision}"
            export_bundle(checkpoint, output, precision, patch_nums=patch_nums, ema=ema)
            made[key] = output
        return made[key]

    return export


@pytest.fixture(scope="session")
def demo_bundle(export_once: ExportOnce) -> Path:
    return export_once(DEMO_CHECKPOINT, "fp16")


@pytest.fixture(scope="session")
def demo(demo_bundle: Path) -> Pipeline:
    return Pipeline.load(demo_bundle, device="cpu")
