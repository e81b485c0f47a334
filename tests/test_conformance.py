"""What every backend must do, whatever it runs on: ``make test-gpu`` says which ran and why not."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hart_runtime import Pipeline
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.settings import Overrides
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.memory.gpu import present_gpu
from hart_runtime.runtime.memory.plan import ALIGNMENT
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.tensorrt.build import build_engines
from hart_runtime.runtime.tensorrt.builder import BuildOptions
from hart_runtime.runtime.tensorrt.package import import_package
from hart_runtime.runtime.tensorrt.profiles import LARGEST_TOP_K
from tests.conftest import ExportOnce
from tests.golden_runs import HERE, ClassRun, Run, class_runs, compare, drawn_by_graphs, runs
from tests.host_executor import HostExecutor
from tests.test_bundle import poisoned

PROMPTS = ["a red circle on a white background", "a small blue star on a gray background", "a green ring"]
MUST_OPEN = os.environ.get("HART_MUST_OPEN")
"""The one backend to test, which has to open here."""
FACTOR = 10.0
"""Exported graphs reorder sums, so they get ten times the reference model's tolerance."""


def on_the_cpu(bundle: Bundle) -> Backend:
    return open_backend(bundle, "cpu", backend="onnxruntime")


def at_planned_addresses(bundle: Bundle) -> Backend:
    """Everything of the TensorRT backends but TensorRT, with memory that shows mistakes."""
    return PlannedBackend(bundle, HostExecutor(bundle))


def on_openvino(bundle: Bundle) -> Backend:
    return open_backend(bundle, backend="openvino")


def on_cuda(bundle: Bundle) -> Backend:
    return open_backend(bundle, "cuda", backend="onnxruntime", strict=True)


def on_engines(name: str) -> Callable[[Bundle], Backend]:
    def open_engines(bundle: Bundle) -> Backend:
        batches = (1, min(3, bundle.manifest.max_batch))
        package = import_package(name)
        gpu = present_gpu()
        if gpu is None:
            raise InputError("found no CUDA GPU (or no driver for it)")
        top_k = (1, min(bundle.manifest.model.vocab_size, LARGEST_TOP_K))
        build_engines(bundle, package, BuildOptions(batches=batches, top_k=top_k), gpu)
        return open_backend(bundle, backend=name)

    return open_engines


BACKENDS: dict[str, Callable[[Bundle], Backend]] = {
    "onnxruntime-cpu": on_the_cpu,
    "planned-cpu": at_planned_addresses,
    "openvino-cpu": on_openvino,
    "onnxruntime-cuda": on_cuda,
    "tensorrt": on_engines("tensorrt"),
    "tensorrt-rtx": on_engines("tensorrt-rtx"),
}


@cache
def unusable(name: str, folder: Path) -> str | None:
    """Why a backend cannot run here, None if it can."""
    try:
        BACKENDS[name](open_bundle(folder))
    except InputError as error:
        return str(error)
    return None


@pytest.fixture(params=[MUST_OPEN] if MUST_OPEN else BACKENDS)
def backend(request: pytest.FixtureRequest, demo_fp32: Path) -> Callable[[Bundle], Backend]:
    """A way to open bundles; skipped, with its reason, where this machine cannot."""
    if not request.param.endswith("cpu") and (reason := unusable(request.param, demo_fp32)):
        if MUST_OPEN:
            pytest.fail(reason)
        pytest.skip(f"{request.param}: {reason}")
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def demo_fp32(export_once: ExportOnce) -> Path:
    return export_once(DEMO_CHECKPOINT, "fp32")


def opened_for(run: Run, bundle: Bundle, backend: Callable[[Bundle], Backend]) -> Backend:
    """What runs a recording's bundle. Engines take no model of some sizes, and say so: those that people
    have recordings of are then left out, with the reason.
    """
    try:
        return backend(bundle)
    except InputError as error:
        if f"no multiple of {ALIGNMENT}" not in str(error) or run.variant.is_relative_to(HERE.resolve()):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.label)
def test_golden_run(run: Run, backend: Callable[[Bundle], Backend], export_once: ExportOnce) -> None:
    patch_nums = None if run.patch_nums == run.config.patch_nums else run.patch_nums
    bundle = open_bundle(export_once(run.variant, "fp32", patch_nums, run.ema))
    found = drawn_by_graphs(run, opened_for(run, bundle, backend), bundle.manifest)
    compare(run, found, FACTOR, partial=True)


@pytest.mark.parametrize("run", class_runs(), ids=lambda run: run.label)
def test_golden_class_run(
    run: ClassRun, backend: Callable[[Bundle], Backend], export_once: ExportOnce
) -> None:
    bundle = open_bundle(export_once(run.variant, "fp32"))
    found = drawn_by_graphs(run, opened_for(run, bundle, backend), bundle.manifest)
    found[f"scale{len(run.patch_nums) - 1}.f_hat"] = found["final.f_hat"]
    compare(run, found, FACTOR, partial=True)


def test_pictures_do_not_depend_on_the_batch(backend: Callable[[Bundle], Backend], demo_fp32: Path) -> None:
    bundle = open_bundle(demo_fp32)
    pipeline = Pipeline(bundle, backend(bundle))
    together = pipeline.generate(PROMPTS, seed=4, batch=3).images
    for number, prompt in enumerate(PROMPTS):
        alone = pipeline.generate(prompt, seed=4, batch=1).images[0]
        difference = np.abs(np.asarray(alone).astype(int) - np.asarray(together[number]))
        assert difference.max() <= (0 if pipeline.backend.device == "cpu" else 1)


@pytest.mark.parametrize("options", [{}, {"smooth": True}, {"residual": False}, {"steps": 3}])
def test_the_same_run_gives_the_same_bytes(
    backend: Callable[[Bundle], Backend], demo_fp32: Path, options: Overrides
) -> None:
    """Three times: planned backends run plainly, capture, and replay."""
    bundle = open_bundle(demo_fp32)
    pipeline = Pipeline(bundle, backend(bundle))
    images = [pipeline(PROMPTS[0], seed=1, **options)[0].tobytes() for _ in range(3)]
    assert images[0] == images[1] == images[2]
    reference = Pipeline(bundle, on_the_cpu(bundle))(PROMPTS[0], seed=1, **options)[0]
    difference = np.frombuffer(images[0], np.uint8).astype(int) - np.asarray(reference).ravel()
    assert np.abs(difference).max() <= 2


def test_settings_may_change_between_pictures(backend: Callable[[Bundle], Backend], demo_fp32: Path) -> None:
    bundle = open_bundle(demo_fp32)
    pipeline = Pipeline(bundle, backend(bundle))
    first = pipeline(PROMPTS[0])[0].tobytes()
    for options in ({"guidance": 3.0}, {"top_k": 50, "top_p": 1.0}, {"smooth": True}, {"residual": False}):
        assert pipeline(PROMPTS[0], **options)[0].tobytes() != first
    assert pipeline(PROMPTS[0])[0].tobytes() == first


def test_previews_show_the_picture_and_do_not_change_it(
    backend: Callable[[Bundle], Backend], demo_fp32: Path
) -> None:
    bundle = open_bundle(demo_fp32)
    pipeline = Pipeline(bundle, backend(bundle))
    previews: list[bytes] = []

    def keep(scale: object) -> None:
        previews.append(scale.images[0].tobytes())  # type: ignore[attr-defined]

    watched = pipeline(PROMPTS[1], callback=keep, previews=True)[0].tobytes()
    assert watched == pipeline(PROMPTS[1])[0].tobytes()
    without_residual = pipeline(PROMPTS[1], residual=False)[0].tobytes()
    assert previews[-1] == without_residual
    assert len(set(previews)) == len(previews)


def test_broken_weights_end_the_run(
    backend: Callable[[Bundle], Backend], demo_fp32: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(poisoned(demo_fp32, tmp_path, float("nan")))
    pipeline = Pipeline(bundle, backend(bundle))
    with pytest.raises(RunError, match="NaN or infinity"):
        pipeline(PROMPTS[0])
