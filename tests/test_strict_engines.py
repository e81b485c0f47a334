"""The engine executor on strict stand-ins of CUDA and TensorRT: conformance, and what may go wrong."""

from __future__ import annotations

import gc
import mmap
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hart_runtime import Pipeline
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.settings import Overrides
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.memory.gpu import present_gpu
from hart_runtime.runtime.tensorrt import runtime_cache
from hart_runtime.runtime.tensorrt.build import build_engines
from hart_runtime.runtime.tensorrt.builder import BuildOptions
from hart_runtime.runtime.tensorrt.package import import_package
from tests.strict import install_cuda, install_tensorrt
from tests.strict.cuda_names import cudaError_t
from tests.strict.device import ORIN, Card, StrictCuda
from tests.strict.tensorrt import StrictTensorRT
from tests.test_conformance import (  # noqa: F401  (the suite, on the fixture below)
    demo_fp32,
    test_broken_weights_end_the_run,
    test_golden_class_run,
    test_golden_run,
    test_pictures_do_not_depend_on_the_batch,
    test_previews_show_the_picture_and_do_not_change_it,
    test_settings_may_change_between_pictures,
    test_the_same_run_gives_the_same_bytes,
)

H200 = Card("NVIDIA H200", (9, 0), memory=141 << 30, processors=132)
MACHINES: dict[str, tuple[str, Card]] = {
    "jetson-10.3": ("10.3.0", ORIN),
    "rtx-1.7": ("rtx-1.7.1.116", Card()),
    "tensorrt-10.7": ("10.7.0", Card()),
    "tensorrt-10.13": ("10.13.3.9", H200),
    "tensorrt-10.16": ("10.16.1.11", Card()),
    "tensorrt-11.4": ("11.4.0.106", H200),
}
"""Version of the library and the GPU beside it."""
EVERY_TIME = ("jetson-10.3", "tensorrt-11.4", "rtx-1.7")
"""The ends of what is supported; those between have a target of their own."""
PROMPTS = ["a red circle on a white background", "a small blue star on a yellow background"]


@pytest.fixture(
    params=[
        name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.gpu_standin) for name in MACHINES
    ]
)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictTensorRT]:
    """A machine with a GPU; nothing is left on it when a test is over."""
    version, card = MACHINES[request.param]
    trt = on_a_machine(monkeypatch, version, card)
    yield trt
    gc.collect()
    trt.cuda.finish()


def on_a_machine(
    monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0.106", *cards: Card
) -> StrictTensorRT:
    cuda = install_cuda(monkeypatch, cards or (Card(),))
    return install_tensorrt(monkeypatch, cuda, version)


def package_of(trt: StrictTensorRT) -> str:
    return "tensorrt-rtx" if trt.ahead_of_time else "tensorrt"


def with_engines(bundle: Bundle, folder: Path, trt: StrictTensorRT, **options: Any) -> Bundle:
    """A copy of a bundle with engines for the machine."""
    copy = Path(shutil.copytree(bundle.folder, folder, copy_function=shutil.copy2))
    package = import_package(package_of(trt))
    largest = min(4, bundle.manifest.max_batch)
    moved = replace(bundle, folder=copy)
    build_engines(
        moved,
        package,
        BuildOptions(**({"batches": (1, largest), "top_k": (1, bundle.manifest.model.vocab_size)} | options)),
        present_gpu(),
    )
    return moved


@pytest.fixture
def backend(machine: StrictTensorRT, tmp_path: Path) -> Callable[[Bundle], Backend]:
    def opened(bundle: Bundle) -> Backend:
        built = with_engines(bundle, tmp_path / "with-engines", machine)
        return open_backend(built, backend=package_of(machine))

    return opened


def difference(found: Any, expected: Any) -> float:
    """Largest of a pixel, of 255."""
    return float(np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max())


def test_half_precision_draws_the_same_picture(
    machine: StrictTensorRT, demo_bundle: Path, tmp_path: Path
) -> None:
    """Batches 1 to 4; where a near tie falls the other way in half, a part of a picture may change."""
    bundle = open_bundle(demo_bundle)
    built = with_engines(bundle, tmp_path / "bundle", machine)
    drawn = Pipeline(built, open_backend(built, backend=package_of(machine)))
    expected = Pipeline(bundle, on_the_cpu(bundle))(PROMPTS, num_images=2, seed=3)
    for batch in (1, 2, 3, 4):
        found = drawn(PROMPTS, num_images=2, seed=3, batch=batch)
        means = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
            for a, b in zip(found, expected, strict=True)
        ]
        assert np.median(means) < 2, means


def test_tokens_left_out(machine: StrictTensorRT, demo_fp32: Path, tmp_path: Path) -> None:
    draws_with_less(machine, demo_fp32, tmp_path, per_scale=True)


def test_tokens_left_out_by_engines_of_one_profile(
    demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws_with_less(on_a_machine(monkeypatch), demo_fp32, tmp_path, per_scale=False)


def draws_with_less(trt: StrictTensorRT, folder: Path, place: Path, per_scale: bool) -> None:
    """As ONNX Runtime does, whatever was drawn before; three times, so that it is captured and replayed."""
    bundle = open_bundle(folder)
    built = with_engines(bundle, place / "bundle", trt, keep="0.5,0.25", per_scale=per_scale)
    drawn = Pipeline(built, open_backend(built, backend=package_of(trt)))
    expected = Pipeline(bundle, on_the_cpu(bundle))
    pruned: Overrides = {"prune": True, "keep": "0.5,0.25"}
    choices: list[Overrides] = [pruned, {}, {**pruned, "unguided_scales": 2}]
    wanted = [expected(PROMPTS, seed=3, **choice) for choice in choices]
    for _ in range(3):
        for choice, pictures in zip(choices, wanted, strict=True):
            found = drawn(PROMPTS, seed=3, batch=2, **choice)
            assert max(map(difference, found, pictures)) <= 2, choice
    with pytest.raises(
        InputError, match=r"draw with `prune=True` and `keep='0.5,0.25'`, or leave nothing out"
    ):
        drawn(PROMPTS[0], prune=True, keep="1,0.5")


def test_a_third_picture_is_launches_only(
    demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a planned call, nothing awaited before the picture, and only what is new is copied."""
    trt = on_a_machine(monkeypatch)
    counts = trt.cuda.counts
    built = with_engines(open_bundle(demo_fp32), tmp_path / "bundle", trt)
    pipeline = Pipeline(built, open_backend(built, backend="tensorrt"))
    given = pipeline.encode(PROMPTS[:1])
    features = pipeline.backend.to_host(given[0])
    for _ in range(2):
        pipeline.from_features(features, given[1], smooth=True)
    before = replace(counts, waits=counts.waits.copy(), calls=counts.calls.copy())
    pipeline.from_features(features, given[1], smooth=True)
    program = built.manifest.program(replace(built.manifest.sampling, smooth=True), 1)
    calls = sum(1 for _ in program.runs()) + 1  # and the decoder
    beside = 1  # `context` is given features that lie outside of the plan
    assert counts.launches - before.launches == calls - beside
    assert counts.executions - before.executions == beside
    scales, steps = len(built.manifest.model.patch_nums), 8
    random = 2 * scales + steps + 1
    assert counts.uploads - before.uploads <= random + scales + 2  # and the text with its mask
    assert counts.downloads - before.downloads <= 2 + scales + steps


def test_what_is_compiled_late_is_in_the_cache_when_a_backend_closes(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX compiles in the background: a kernel that a run wants is there with a later one."""
    trt = on_a_machine(monkeypatch, "rtx-1.7.1.116")
    monkeypatch.setattr(runtime_cache, "user_cache_path", lambda name: tmp_path / "cache" / name)
    built = with_engines(open_bundle(demo_bundle), tmp_path / "bundle", trt)
    pipeline = Pipeline(built, open_backend(built, backend="tensorrt-rtx"))
    pipeline(PROMPTS[0])
    (file,) = tmp_path.glob("cache/hart-runtime/*.cache")
    early = set(file.read_bytes().split(b";"))
    pipeline(PROMPTS[0])
    assert set(file.read_bytes().split(b";")) == early, "nothing is written while pictures are drawn"
    del pipeline
    gc.collect()
    late = set(file.read_bytes().split(b";"))
    assert early < late
    assert b"image in profile 0" in late - early, "the last graph of a picture"
    trt.cuda.finish()


def test_engines_are_mapped_and_not_read(
    machine: StrictTensorRT, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Jetson bytes on the host would be the device's; when an engine is loaded its mapping is gone."""
    built = with_engines(open_bundle(demo_bundle), tmp_path / "bundle", machine)
    given: list[tuple[type, int]] = []
    loads = machine.api.Runtime.deserialize_cuda_engine

    def seen(runtime: Any, plan: Any) -> Any:
        given.append((type(plan.obj), plan.nbytes))
        return loads(runtime, plan)

    monkeypatch.setattr(machine.api.Runtime, "deserialize_cuda_engine", seen)
    backend = open_backend(built, backend=package_of(machine))
    sizes = sorted(path.stat().st_size for path in built.folder.glob("*/*.engine"))
    assert sorted(given, key=lambda pair: pair[1]) == [(mmap.mmap, size) for size in sizes]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or ".engine" not in maps.read_text()
    assert backend.device == "cuda"


@pytest.mark.parametrize("scales", [True, False])
def test_top_k_may_change(
    demo_fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scales: bool,
) -> None:
    """A size that is read on the host: another one is another plan, whatever was captured before."""
    trt = on_a_machine(monkeypatch)
    bundle = open_bundle(demo_fp32)
    built = with_engines(bundle, tmp_path / "bundle", trt, per_scale=scales)
    drawn = Pipeline(built, open_backend(built, backend="tensorrt"))
    reference = Pipeline(bundle, on_the_cpu(bundle))
    for options in (
        {},
        {},
        {"top_k": 300},
        {},
        {"top_k": 300},
        {"top_k": 300},
        {"top_p": 0.5},
        {"steps": 4},
        {},
    ):
        found = drawn(PROMPTS[0], seed=2, **options)  # type: ignore[arg-type]
        expected = reference(PROMPTS[0], seed=2, **options)  # type: ignore[arg-type]
        assert difference(found[0], expected[0]) <= 2, options
    trt.cuda.tell()


def test_two_pipelines_in_one_process(
    demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two GPUs, in turns."""
    trt = on_a_machine(monkeypatch, "11.4.0.106", Card(bus=1), Card(bus=2))
    built = with_engines(open_bundle(demo_fp32), tmp_path / "bundle", trt)
    one = Pipeline.load(built.folder, device="cuda:0", backend="tensorrt")
    other = Pipeline.load(built.folder, device="cuda:1", backend="tensorrt")
    for seed in range(3):
        assert one(PROMPTS[0], seed=seed)[0].tobytes() == other(PROMPTS[0], seed=seed)[0].tobytes()
    del one
    gc.collect()
    assert trt.cuda.alive()
    other(PROMPTS[0])
    del other
    gc.collect()
    trt.cuda.finish()


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost"])
def test_without_memory_auto_goes_on(
    demo_fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    """Whichever allocation it is that fails: a sentence with the sizes, and the next attempt draws."""
    trt = on_a_machine(monkeypatch)
    built = with_engines(open_bundle(demo_fp32), tmp_path / "bundle", trt)
    failures = []
    for number in range(1, 6):
        trt.cuda.fail(call, number, cudaError_t.cudaErrorMemoryAllocation)
        caplog.clear()
        try:
            pipeline = Pipeline.load(built.folder)
            if pipeline.backend.device == "cpu":
                failures.append(caplog.records[0].getMessage())
            else:
                with pytest.raises(RunError, match="out of memory") as caught:
                    pipeline(PROMPTS[0])
                failures.append(str(caught.value))
                assert pipeline(PROMPTS[0], seed=1)[0].size
        finally:
            pipeline = None  # type: ignore[assignment]
            caught = None  # type: ignore[assignment]
            gc.collect()
    assert len(failures) == 5
    assert all("MB were asked for, " in text and "batch" in text for text in failures), failures
    trt.cuda.finish()


def test_an_interrupted_capture_ends(
    demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream would stay capturing, and nothing could be done on it ever again."""
    trt = on_a_machine(monkeypatch)
    built = with_engines(open_bundle(demo_fp32), tmp_path / "bundle", trt)
    pipeline = Pipeline.load(built.folder, backend="tensorrt")
    expected = pipeline(PROMPTS[0])[0].tobytes()
    run, captures = trt.api.IExecutionContext.execute_async_v3, [0]

    def interrupted(context: Any, stream_handle: int) -> bool:
        if any(stream.capture for stream in trt.cuda.streams.values()):
            captures[0] += 1
            if captures[0] == 3:
                raise KeyboardInterrupt
        return bool(run(context, stream_handle))

    monkeypatch.setattr(trt.api.IExecutionContext, "execute_async_v3", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPTS[0])
    for _ in range(4):
        assert pipeline(PROMPTS[0])[0].tobytes() == expected
    del pipeline
    gc.collect()
    trt.cuda.finish()


def test_a_lost_device_is_a_sentence(
    demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a picture; nothing loops on it, and nothing hides it."""
    trt = on_a_machine(monkeypatch)
    built = with_engines(open_bundle(demo_fp32), tmp_path / "bundle", trt)
    pipeline = Pipeline.load(built.folder, backend="tensorrt")
    pipeline(PROMPTS[0])
    trt.cuda.fail("cudaMemcpyAsync", 8, cudaError_t.cudaErrorIllegalAddress, sticky=True)
    with pytest.raises(RunError, match="cudaErrorIllegalAddress"):
        pipeline(PROMPTS[0])
    with pytest.raises(RunError, match="cudaErrorIllegalAddress"):
        pipeline(PROMPTS[0])
    del pipeline
    gc.collect()
    trt.cuda.tell()


def test_a_refusal_has_a_reason(demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = on_a_machine(monkeypatch)
    bundle = open_bundle(demo_fp32)
    trt.fail_build = "no implementation for node X"
    with pytest.raises(RunError, match=r"cannot build an engine .*no implementation for node X"):
        with_engines(bundle, tmp_path / "failed", trt)
    assert not list((tmp_path / "failed").glob("tensorrt-*"))
    trt.fail_build = ""
    built = with_engines(bundle, tmp_path / "bundle", trt, batches=(1, 1))
    with pytest.raises(InputError, match="batch"):
        Pipeline.load(built.folder, backend="tensorrt")(PROMPTS, batch=2)


def test_tf32_is_off_unless_asked_for(
    demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left on, it changes pictures: what is typed float32 would not be that."""
    trt = on_a_machine(monkeypatch)
    bundle = open_bundle(demo_fp32)
    expected = Pipeline(bundle, on_the_cpu(bundle))(PROMPTS[0], guidance=7.5, smooth=True)[0]
    exact = with_engines(bundle, tmp_path / "exact", trt)
    found = Pipeline.load(exact.folder, backend="tensorrt")(PROMPTS[0], guidance=7.5, smooth=True)[0]
    assert difference(found, expected) <= 2
    with pytest.raises(InputError, match=r"tf32.*was built without it"):
        Pipeline.load(exact.folder, backend="tensorrt", tf32=True)
    rounded = with_engines(bundle, tmp_path / "rounded", trt, tf32=True)
    found = Pipeline.load(rounded.folder, backend="tensorrt")(PROMPTS[0], guidance=7.5, smooth=True)[0]
    assert difference(found, expected) > 2


@pytest.mark.parametrize(
    ("cards", "driver", "device", "words"),
    [
        ((), 13000, "cuda", "found no CUDA GPU"),
        ((Card(),), 0, "cuda", "found no CUDA GPU"),
        ((Card(),), 12040, "cuda", "the NVIDIA driver is for CUDA 12.4, cuda-bindings is for CUDA 13.0"),
        ((Card(), Card("NVIDIA T4", (7, 5))), 13000, "cuda:2", "cuda:1 is NVIDIA T4"),
        ((Card(),), 13000, "cuda:x", "expected one of auto, cpu, cuda, cuda:N"),
    ],
)
def test_what_is_missing_has_its_own_sentence(
    built_once: Path,
    monkeypatch: pytest.MonkeyPatch,
    cards: tuple[Card, ...],
    driver: int,
    device: str,
    words: str,
) -> None:
    cuda = install_cuda(monkeypatch, cards, driver=driver)
    install_tensorrt(monkeypatch, cuda, "11.4.0.106")
    with pytest.raises(InputError, match=words):
        Pipeline.load(built_once, device=device, backend="tensorrt")


@pytest.mark.parametrize(
    ("cards", "driver", "told"),
    [((), 13000, 0), ((Card(),), 0, 0), ((Card(),), 12040, 1), ((Card("NVIDIA L4"),), 13000, 1)],
)
def test_auto_tells_what_can_be_mended(
    built_once: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cards: tuple[Card, ...],
    driver: int,
    told: int,
) -> None:
    cuda = install_cuda(monkeypatch, cards, driver=driver)
    install_tensorrt(monkeypatch, cuda, "11.4.0.106")
    if told and driver == 13000:
        monkeypatch.setattr(cuda, "cards", (Card("NVIDIA A10", (8, 6)),))
    assert Pipeline.load(built_once).backend.device == "cpu"
    assert len(caplog.records) == told, caplog.text


@pytest.fixture
def built_once(demo_fp32: Path, tmp_path: Path) -> Path:
    """A bundle with engines, made before the machine changes."""
    with pytest.MonkeyPatch.context() as patch:
        trt = on_a_machine(patch)
        return with_engines(open_bundle(demo_fp32), tmp_path / "bundle", trt).folder


def test_the_played_cuda_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: StrictCuda = on_a_machine(monkeypatch).cuda
    from hart_runtime.runtime.memory.gpu import find_gpu

    assert find_gpu().name == cuda.cards[0].name
