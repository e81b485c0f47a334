"""What campaigns start from: a bundle of the demo that draws fast, engines, a checkpoint and a picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.find import MANIFEST
from tests.torture.subjects import PROMPT, SEED, Ground
from tests.torture.workers import FORK

TENSORRT = "11.4.0.106"


def apart(function: Callable[[], None]) -> None:
    """Do something in a forked process, so that none of its threads is in those that are forked later."""
    process = FORK.Process(target=function)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function} ended with {process.exitcode}")


def on_a_strict_machine() -> None:
    """Put the strict stand-ins in the place of CUDA and TensorRT, for the rest of this process."""
    from tests.strict import install_cuda, install_tensorrt
    from tests.strict.device import Card

    patch = pytest.MonkeyPatch()
    install_tensorrt(patch, install_cuda(patch, (Card(),)), TENSORRT)


def prepare(folder: Path, bundle: Path | None) -> Ground:
    """Make all of it below ``folder``.

    Args:
        bundle: of the demo; exported first if left out.
    """
    found = Ground(*(folder / name for name in ("bundle", "checkpoint", "picture.png", "engines")))
    if bundle is None:
        apart(lambda: _export(folder / "demo"))
    shutil.copytree(bundle or folder / "demo", found.bundle)
    values = json.loads((found.bundle / MANIFEST).read_bytes())
    values["sampling"]["steps"] = "2"
    (found.bundle / MANIFEST).write_text(json.dumps(values))
    shutil.copytree(DEMO_CHECKPOINT, found.checkpoint)
    shutil.copytree(found.bundle, found.engines)
    apart(lambda: _draw(found))
    apart(lambda: _build(found.engines))
    return found


def _export(output: Path) -> None:
    from hart_runtime.common.checkpoint import find_checkpoint
    from hart_runtime.export.bundle import export_bundle
    from hart_runtime.export.request import Request

    export_bundle(Request(find_checkpoint(DEMO_CHECKPOINT), "fp32"), output)


def _draw(ground: Ground) -> None:
    from hart_runtime.runtime.cli import main

    words = (PROMPT, "--engine", ground.bundle, "--seed", SEED, "--output", ground.picture, "--threads", 1)
    main([*map(str, words), "--backend", "onnxruntime", "--device", "cpu", "--json"], standalone_mode=False)


def _build(bundle: Path) -> None:
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.memory.gpu import present_gpu
    from hart_runtime.runtime.tensorrt.build import build_engines
    from hart_runtime.runtime.tensorrt.builder import BuildOptions
    from hart_runtime.runtime.tensorrt.package import import_package

    on_a_strict_machine()
    opened = open_bundle(bundle)
    options = BuildOptions(batches=(1, 1), top_k=(1, opened.manifest.model.vocab_size))
    build_engines(opened, import_package("tensorrt"), options, present_gpu())
