"""Prompts to pictures on the demo bundle, from Python."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hart_runtime import Pipeline, Scale
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.install import install
from hart_runtime.hart.demo.checker import look
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.onnx_runtime import CpuExecutor, on_the_cpu
from hart_runtime.runtime.backends.sessions import has_cuda
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.families.hart import GRAPHS
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.pipeline import MOST_ENCODED
from tests.test_bundle import poisoned

PROMPT = "a red circle on a white background"


def pixels(images: Sequence[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_a_prompt_becomes_the_picture_asked_for(demo: Pipeline) -> None:
    image = demo(PROMPT, seed=0)[0]
    assert image.size == (64, 64)
    verdict = look(np.asarray(image, np.float32) / np.float32(255))
    assert (verdict.color, verdict.shape, verdict.background) == ("red", "circle", "white")


@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_does_not_depend_on_its_batch(demo: Pipeline, smooth: bool) -> None:
    prompts = [PROMPT, "a small blue star on a yellow background", "large green ring, black background"]
    together = demo(prompts, seed=3, batch=3, smooth=smooth)
    alone = [demo(prompt, seed=3, smooth=smooth)[0] for prompt in prompts]
    pairs = demo(prompts, seed=3, batch=2, smooth=smooth)
    assert pixels(together) == pixels(alone) == pixels(pairs)


def test_same_seed_same_bytes_other_seed_other_picture(demo: Pipeline) -> None:
    first, second, third = demo([PROMPT] * 2, seed=1)[0], demo(PROMPT, seed=1)[0], demo(PROMPT, seed=2)[0]
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != third.tobytes()


def test_seeds_count_up_within_a_prompt(demo: Pipeline) -> None:
    result = demo.generate([PROMPT, "a black ring on a gray background"], seed=7, num_images=2)
    assert result.seeds == [7, 8, 7, 8]
    assert result.images[1].tobytes() == demo(PROMPT, seed=8)[0].tobytes()


def test_settings_matter(demo: Pipeline) -> None:
    plain = demo(PROMPT)[0].tobytes()
    assert demo(PROMPT, residual=False)[0].tobytes() != plain
    assert demo(PROMPT, steps=20)[0].tobytes() != plain
    assert demo(PROMPT, guidance=0.0)[0].tobytes() != plain


def test_one_can_watch_it_come_into_focus(demo: Pipeline) -> None:
    scales: list[Scale] = []
    image = demo(PROMPT, callback=scales.append, previews=True)[0]
    assert [scale.patch_num for scale in scales] == list(demo.bundle.manifest.model.patch_nums)
    previews = [np.asarray(s.images[0], dtype=np.float32) for s in scales if s.images]
    assert len(previews) == len(scales)
    errors = [float(np.abs(p - np.asarray(image, dtype=np.float32)).mean()) for p in previews]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance": -1.0}, "`guidance`: expected 0 to 1000, found -1.0"),
        ({"guidance": float("nan")}, "`guidance`"),
        ({"top_k": 0}, "`top_k`: expected 1 to 512"),
        ({"top_k": 513}, "`top_k`: expected 1 to 512"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"seed": -1}, "`seed`"),
        ({"num_images": 0}, "`num_images`"),
        ({"batch": 9}, "`batch`: expected 1 to 8"),
        ({"steps": 1}, "at least 2 steps"),
        ({"steps": "many"}, "`steps`: expected a number"),
    ],
)
def test_values_out_of_range(demo: Pipeline, options: dict[str, float], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        demo(PROMPT, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", ["", "  ", ["a red circle", ""], []])
def test_empty_prompts(demo: Pipeline, prompts: str | list[str]) -> None:
    with pytest.raises(InputError, match="prompt"):
        demo(prompts)


@pytest.mark.skipif(has_cuda(), reason="this ONNX Runtime has CUDA")
def test_cuda_without_a_cuda_provider_says_what_to_install(demo_bundle: Path) -> None:
    with pytest.raises(InputError, match=re.escape(install("cuda"))):
        Pipeline.load(demo_bundle, device="cuda")


def test_openvino_is_asked_for_by_name_on_the_cpu(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="`backend='openvino'` runs on the CPU, found `device='cuda'`"):
        Pipeline.load(demo_bundle, device="cuda", backend="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=re.escape(install("openvino"))):
        Pipeline.load(demo_bundle, backend="openvino")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_latents_stop_the_run(demo_bundle: Path, tmp_path: Path, value: float) -> None:
    folder = poisoned(demo_bundle, tmp_path, value)
    with pytest.raises(RunError, match="scale or residual: the latent holds NaN or infinity"):
        Pipeline.load(folder, device="cpu")(PROMPT)


def test_the_weights_of_one_bundle_are_not_read_for_another(demo_bundle: Path) -> None:
    """Two backends on one bundle work side by side and agree."""
    bundle = open_bundle(demo_bundle)
    first, second = (Pipeline(bundle, on_the_cpu(bundle)) for _ in range(2))
    assert first(PROMPT)[0].tobytes() == second(PROMPT)[0].tobytes()
    assert (demo_bundle / MANIFEST).is_file()


def test_the_text_encoder_is_gone_before_the_rest_comes(demo: Pipeline) -> None:
    prompts = [PROMPT, "a small blue star", PROMPT, "a green ring"]
    opened: list[tuple[set[str], weakref.ref[CpuExecutor]]] = []

    def open_part(part: Bundle) -> Backend:
        assert all(executor() is None for _, executor in opened), "two parts at once"
        executor = CpuExecutor(part)
        opened.append((set(part.manifest.graphs), weakref.ref(executor)))
        return PlannedBackend(part, executor)

    laps: list[str] = []
    pipeline = Pipeline.for_prompts(demo.bundle, prompts, 2, open_part, lap=laps.append)
    assert laps == ["load", "text encoder", "load"]
    assert [graphs for graphs, _ in opened] == [{"text_encoder"}, set(GRAPHS) - {"text_encoder"}]
    assert pixels(pipeline(prompts, seed=5)) == pixels(demo(prompts, seed=5))
    with pytest.raises(InputError, match="opened for other prompts, found 'a square'"):
        pipeline([PROMPT, "a square"])


def test_with_many_prompts_everything_stays_open(demo: Pipeline) -> None:
    prompts = [f"a circle {number}" for number in range(MOST_ENCODED + 1)]
    opened: list[set[str]] = []

    def open_part(part: Bundle) -> Backend:
        opened.append(set(part.manifest.graphs))
        return on_the_cpu(part)

    pipeline = Pipeline.for_prompts(demo.bundle, prompts, 2, open_part)
    assert opened == [set(GRAPHS)]
    assert pixels(pipeline(PROMPT)) == pixels(demo(PROMPT))


def test_the_runtime_never_imports_torch(demo_bundle: Path) -> None:
    """Also not by accident: torch, onnx and transformers are made impossible to import."""
    script = f"""
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir", "transformers", "safetensors"):
    sys.modules[name] = None
from hart_runtime import Pipeline
print(len(Pipeline.load({str(demo_bundle)!r}, device="cpu")({PROMPT!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr


def test_a_prompt_that_is_too_long_is_told_of(demo: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    demo([PROMPT, f"{PROMPT} " * 3 + "at last"])
    assert len(caplog.messages) == 1
    assert "over 16 tokens, cut off: " in caplog.messages[0]
    assert "at last" in caplog.messages[0]


@pytest.mark.parametrize("words", ["a red circle " * 80_000, "x" * 100_000, "\n" + "日本 " * 5_000])
def test_of_a_long_prompt_the_beginning_is_told(
    demo: Pipeline, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    demo(words)
    (said,) = caplog.messages
    assert len(said) < 1500
    assert said.endswith("...'")


@pytest.mark.parametrize(
    "prompts", [b"a red circle", bytearray(b"x"), {"a red circle": 1}, {"x", "y"}, 5, Path("x"), None]
)
def test_what_is_no_list_of_texts(demo: Pipeline, prompts: Any) -> None:
    with pytest.raises(InputError, match="expected a text or a list of texts"):
        demo(prompts)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, ForkingPickler.dumps])
def test_a_pipeline_stays_in_its_process(demo: Pipeline, copied: Callable[[object], object]) -> None:
    with pytest.raises(InputError, match=r"^a pipeline cannot be pickled or copied; load it") as caught:
        copied(demo)
    assert str(demo.bundle.folder) in str(caught.value)
