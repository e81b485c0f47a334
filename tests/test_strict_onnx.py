"""ONNX Runtime on CUDA, with a strict stand-in of its provider: conformance, and what is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hart_runtime import Pipeline
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.backends import sessions
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from tests.strict import install_cuda, install_onnx_gpu
from tests.strict.cuda_names import cudaError_t
from tests.strict.device import Card
from tests.strict.onnx_gpu import StrictOnnx
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

PROMPT = "a red circle on a white background"


@pytest.fixture
def onnx(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictOnnx]:
    cuda = install_cuda(monkeypatch)
    played = install_onnx_gpu(monkeypatch, cuda)
    yield played
    gc.collect()
    cuda.finish()


@pytest.fixture
def backend(onnx: StrictOnnx) -> Callable[[Bundle], Backend]:
    return lambda bundle: open_backend(bundle, "cuda", backend="onnxruntime", strict=True)


def test_a_third_picture_is_launches_only(onnx: StrictOnnx, demo_bundle: Path) -> None:
    """One a planned call; nothing is read back or awaited but the picture, and only what is new is copied."""
    counts = onnx.cuda.counts
    pipeline = Pipeline.load(demo_bundle, device="cuda", strict=True)
    features, mask = pipeline.encode([PROMPT])
    given = pipeline.backend.to_host(features)
    for _ in range(2):
        pipeline.from_features(given, mask, smooth=True)
    onnx.cuda.count_anew()
    counts = onnx.cuda.counts
    pipeline.from_features(given, mask, smooth=True)
    manifest = pipeline.bundle.manifest
    program = manifest.program(replace(manifest.sampling, smooth=True), 1)
    calls = sum(1 for _ in program.runs()) + 1  # and the decoder
    assert (counts.launches, counts.executions) == (calls - 1, 1)  # `context` has features of its caller
    scales, steps = len(manifest.model.patch_nums), 8
    random = 3 * scales + steps + 1  # uniform numbers, pools and places in them; start and steps of the rest
    assert counts.uploads == random + 2, "the text and its mask beside them"
    assert counts.downloads <= 2
    assert counts.upload_bytes < manifest.model.vocab_size * 4 * 64 * 20


def test_nothing_waits_between_the_first_scale_and_the_picture(onnx: StrictOnnx, demo_bundle: Path) -> None:
    pipeline = Pipeline.load(demo_bundle, device="cuda")
    pipeline(PROMPT)
    manifest, backend = pipeline.bundle.manifest, pipeline.backend
    features, mask = pipeline.encode([PROMPT])
    steps = pipeline.drawer.steps({"features": features, "mask": mask}, [3], manifest.sampling, paced=False)
    next(steps)
    with onnx.cuda.without_waits():
        for snapshot in steps:
            if snapshot.index == snapshot.total - 2 and snapshot.stage == "residual":
                break
    steps.close()  # type: ignore[attr-defined]
    assert backend.device == "cuda"


def test_the_text_encoder_is_given_back_before_the_rest_is_opened(
    onnx: StrictOnnx, demo_bundle: Path
) -> None:
    held: list[dict[str, int]] = []

    def open_part(part: Bundle) -> Backend:
        held.append(onnx.cuda.alive())
        return open_backend(part, "cuda")

    pipeline = Pipeline.for_prompts(open_bundle(demo_bundle), [PROMPT], 1, open_part)
    assert [{**alive, "reserved bytes": 0} for alive in held] == [{"reserved bytes": 0}] * 2
    assert pipeline(PROMPT)[0].size == (64, 64)


def test_one_arena_holds_the_scratch_of_all_graphs(onnx: StrictOnnx, demo_bundle: Path) -> None:
    """And of all pipelines of a process: a second one brings its weights alone."""
    taken = []
    pipelines = []
    for _ in range(2):
        pipelines.append(Pipeline.load(demo_bundle, device="cuda"))
        opened = onnx.arena_bytes
        for batch in (1, 2, 1):
            pipelines[-1]([PROMPT] * batch)
        taken.append(onnx.arena_bytes - opened)
    assert taken[0] > 0 == taken[1]


def test_a_lost_device_is_a_sentence(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = install_cuda(monkeypatch)
    install_onnx_gpu(monkeypatch, cuda)
    pipeline = Pipeline.load(demo_bundle, device="cuda")
    pipeline(PROMPT)
    cuda.fail("cudaMemcpyAsync", 8, cudaError_t.cudaErrorIllegalAddress, sticky=True)
    for _ in range(2):
        with pytest.raises(RunError, match="cudaErrorIllegalAddress"):
            pipeline(PROMPT)
    del pipeline
    gc.collect()
    cuda.tell()


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ("cudaStreamBeginCapture", cudaError_t.cudaErrorStreamCaptureUnsupported),
        ("cudaStreamEndCapture", cudaError_t.cudaErrorStreamCaptureInvalidated),
        ("cudaGraphInstantiate", cudaError_t.cudaErrorMemoryAllocation),
    ],
)
def test_a_capture_that_breaks_is_a_plain_run(
    onnx: StrictOnnx,
    demo_bundle: Path,
    caplog: pytest.LogCaptureFixture,
    call: str,
    status: cudaError_t,
) -> None:
    """As when another thread asks for memory on the GPU meanwhile. One graph of them, once, in one line."""
    pipeline = Pipeline.load(demo_bundle, device="cuda")
    expected = np.asarray(pipeline(PROMPT, seed=3)[0])
    onnx.cuda.fail(call, 3, status)
    for _ in range(2):
        assert np.array_equal(np.asarray(pipeline(PROMPT, seed=3)[0]), expected)
    told = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert len(told) == 1
    assert f"CUDA failure {int(status)}: {status.name}; it runs without CUDA graphs from now on" in told[0]
    assert onnx.cuda.counts.launches > onnx.cuda.counts.executions / 2, "the others are captured"


def test_a_missing_cudnn_is_told_before_a_picture(
    demo_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ONNX Runtime looks for it when the first graph wants it."""
    played = install_onnx_gpu(monkeypatch, install_cuda(monkeypatch))
    provider = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    provider.parent.mkdir()
    provider.touch()
    monkeypatch.setattr(played.api, "__file__", str(tmp_path / "__init__.py"), raising=False)
    monkeypatch.setattr(sessions, "CUDNN", ("libnowhere.so.9",))
    with pytest.raises(InputError, match=r"needs cuDNN, .*libnowhere.so.9.*install it with: .*\[cuda\]"):
        Pipeline.load(demo_bundle, device="cuda")
    assert Pipeline.load(demo_bundle).backend.device == "cpu"
    assert "needs cuDNN" in caplog.text


def test_without_a_gpu_cuda_is_refused_and_auto_is_silent(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install_onnx_gpu(monkeypatch, install_cuda(monkeypatch, ()))
    with pytest.raises(InputError, match=r"found no CUDA GPU \(the driver sees none\)"):
        Pipeline.load(demo_bundle, device="cuda")
    assert Pipeline.load(demo_bundle).backend.device == "cpu"
    assert caplog.records == []


@pytest.mark.parametrize(
    ("card", "driver", "words"),
    [
        (Card("NVIDIA GeForce GTX 1080", (6, 1)), 13000, "kernels from compute capability 7.5 on"),
        (Card(), 12040, "the NVIDIA driver is for CUDA 12.4"),
    ],
)
def test_what_is_too_old_has_its_own_sentence(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, card: Card, driver: int, words: str
) -> None:
    install_onnx_gpu(monkeypatch, install_cuda(monkeypatch, (card,), driver=driver))
    with pytest.raises(InputError, match=words):
        Pipeline.load(demo_bundle, device="cuda")
    assert Pipeline.load(demo_bundle).backend.device == "cpu"
