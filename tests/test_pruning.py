"""Drawing with less to do: tokens of large scales left out, or the last scales' unconditional half."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hart_runtime.common.checkpoint import SAMPLING_FILE, find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.pruning import Pruning, pruning_of, sources, tokens_kept
from hart_runtime.common.schedule import scale_steps
from hart_runtime.common.settings import SPEEDS, Overrides, SamplingSettings, parse_keep
from hart_runtime.compare.recorded import recording
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.generate import generate
from hart_runtime.hart.model import Hart
from hart_runtime.hart.pruning import restored
from hart_runtime.runtime.backends.names import ONNXRUNTIME, OPENVINO
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.call import checked_settings
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.runtime.pipeline import Pipeline
from tests.conftest import ExportOnce

PUBLISHED = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
CHOICES = [
    SamplingSettings(guidance=3.0, smooth=False, prune=True),
    SamplingSettings(guidance=3.0, smooth=False, prune=True, keep="0.3,1"),
    SamplingSettings(guidance=3.0, smooth=False, unguided_scales=1),
    SamplingSettings(guidance=3.0, smooth=False, unguided_scales=3, residual=False),
    SamplingSettings(guidance=3.0, smooth=True, unguided_scales=2, prune=True),
]


def test_which_scales() -> None:
    assert pruning_of(PUBLISHED, "0.5,0.25") == Pruning(11, {12: 1152, 13: 1024})
    assert pruning_of((1, 36, 48, 48, 64), "0.5,0.25") == Pruning(1, {2: 1152, 3: 1152, 4: 1024})
    assert pruning_of((1, 2, 4, 6, 8), "0.5,0.25") == Pruning(2, {3: 18, 4: 16})
    assert pruning_of((1, 36, 48, 50), "1,0.25") == Pruning(1, {2: 2304, 3: 625})
    assert [tokens_kept(9, share) for share in (0.5, 0.25, 1.0, 1e-9)] == [5, 3, 9, 1]


@pytest.mark.parametrize(
    "keep", ["", "0.5", "0.5,0.25,1", "0,0.5", "0.5,1.1", "nan,1", "a,b", "-1,1", "inf,1", "\uff11,1"]
)
def test_shares_that_are_none(keep: str) -> None:
    with pytest.raises(InputError, match=r"`keep`: .*two numbers over 0 and up to 1"):
        parse_keep(keep)


@pytest.mark.parametrize(("side", "target"), [(36, 48), (36, 64), (3, 4), (5, 5), (2, 7)])
def test_what_a_place_receives(side: int, target: int) -> None:
    """The plain mean of all that it touches, as PyTorch's area interpolation has it."""
    memory = torch.randn(2, side * side, 3)
    as_map = memory.transpose(1, 2).unflatten(2, (side, side))
    expected = F.interpolate(as_map, size=(target, target), mode="area").flatten(2).transpose(1, 2)
    found = restored(memory, torch.from_numpy(sources(side, target)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_guidance_is_left_out_of_the_last_scales() -> None:
    steps = scale_steps((1, 2, 3, 4, 5), SamplingSettings(unguided_scales=2), 600)
    plain = scale_steps((1, 2, 3, 4, 5), SamplingSettings(), 600)
    assert [step.guided for step in steps] == [True, True, True, False, False]
    assert [step.guidance for step in steps[3:]] == [0, 0]
    assert [(s.logit_gain, s.temperature) for s in steps] == [(s.logit_gain, s.temperature) for s in plain]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unguided_scales": 6}, "`unguided_scales`: expected 0 to 5, found 6"),
        ({"unguided_scales": -1}, "`unguided_scales`: expected 0 to 5, found -1"),
        ({"prune": True, "keep": "0.5,2"}, "`keep`: expected the shares of tokens kept"),
        ({"keep": "half"}, "`keep`: expected the shares of tokens kept"),
        ({"speed": "faster"}, "`speed='faster'`: expected one of exact, balanced, fast"),
    ],
)
def test_what_is_refused(export_once: ExportOnce, options: dict[str, Any], words: str) -> None:
    manifest = open_bundle(export_once(DEMO_CHECKPOINT, "fp32")).manifest
    with pytest.raises(InputError) as caught:
        checked_settings(manifest, ["a prompt"], **options)
    assert words in str(caught.value)


def test_names_of_speeds(export_once: ExportOnce, class_bundle: Path) -> None:
    manifest = open_bundle(export_once(DEMO_CHECKPOINT, "fp32")).manifest
    its_own = replace(manifest, speeds={"fast": replace(manifest.sampling, prune=True, keep="1,0.97")})
    assert checked_settings(its_own, ["a prompt"], speed="fast") == its_own.speeds["fast"]
    assert checked_settings(manifest, ["a prompt"], speed="fast", prune=False).prune is False
    usual = replace(manifest, speeds={})
    of = {name: checked_settings(usual, ["a prompt"], speed=name) for name in SPEEDS}
    assert of["exact"] == manifest.sampling
    assert (of["balanced"].prune, of["balanced"].unguided_scales) == (False, 1)
    assert (of["fast"].prune, of["fast"].unguided_scales) == (True, 2)
    classes = open_bundle(class_bundle).manifest  # whose tokens cannot be left out
    assert checked_settings(classes, ["none"], speed="fast") == replace(classes.sampling, unguided_scales=2)


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ([], "speeds: expected an object, found []"),
        ({"faster": {}}, "speeds: unknown faster"),
        ({"exact": {}}, "speeds: unknown exact"),
        ({"fast": 2}, "speeds.fast: expected an object, found 2"),
        ({"fast": {"guidance": 1.0}}, "speeds.fast: unknown guidance"),
        ({"fast": {"keep": "0.5"}}, "speeds.fast: keep: expected the shares of tokens"),
        ({"fast": {"unguided_scales": 6}}, "speeds.fast: unguided_scales: expected 0 to 5, found 6"),
        ({"fast": {"prune": 1}}, "speeds.fast: prune: expected True or False, found 1"),
    ],
)
def test_speeds_of_a_checkpoint_that_are_none(tmp_path: Path, speeds: object, said: str) -> None:
    copy = Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "demo"))
    file = copy / SAMPLING_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "speeds": speeds}))
    with pytest.raises(InputError) as caught:
        _ = find_checkpoint(copy).speeds
    assert str(caught.value).startswith(f"{file}: {said}")


@pytest.mark.parametrize("patch_nums", [(1, 2), (1, 2, 3), (36, 48, 64)])
def test_a_pyramid_without_a_scale_to_remember_is_not_pruned(patch_nums: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="behind at least two others, this model's are"):
        pruning_of(patch_nums, "0.5,0.25")


@pytest.fixture(scope="module")
def pruned() -> dict[str, torch.Tensor]:
    """What the reference does on the demo's five scales, 1, 2, 3, 5 and 8 cells wide."""
    found: dict[str, torch.Tensor] = {}
    model = load_hart(find_checkpoint(DEMO_CHECKPOINT))
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, *model_text(model), generator=generator)
    mask = torch.arange(features.shape[1]) < torch.tensor([[4], [9]])
    settings = SamplingSettings(smooth=False, prune=True)
    generate(
        model, features, mask, SeededNoise([1, 2]), settings, record=lambda k, v: found.update({k: v.clone()})
    )
    return found


def model_text(model: Hart) -> tuple[int, int]:
    return model.transformer.config.context_token, model.transformer.config.context_dim


@pytest.mark.parametrize(("scale", "side", "count"), [(3, 5, 13), (4, 8, 16)])
def test_who_takes_part_and_what_others_receive(
    pruned: dict[str, torch.Tensor], scale: int, side: int, count: int
) -> None:
    """Each block, branch and row for itself; said here once more, in other words than the code's."""
    x, block = pruned[f"scale{scale}.x_in"], 0
    while f"scale{scale}.block{block}.attn.kept" in pruned:
        for branch in ("attn", "ffn"):
            name = f"scale{scale}.block{block}.{branch}"
            kept, added = pruned[f"{name}.kept"], pruned[f"{name}.out"]
            earlier = pruned[f"scale2.block{block}.{branch}.out"]
            assert kept.shape == (4, count)
            for row in range(4):
                off = x[row].double() - x[row].double().mean(0)
                order = (off**2).sum(-1).argsort(descending=True)[:count]
                assert set(kept[row].tolist()) == set(order.tolist())
                for place in set(range(side * side)) - set(kept[row].tolist()):
                    rows, columns = (touched(i, side) for i in divmod(place, side))
                    cells = [earlier[row, 3 * i + j] for i in rows for j in columns]
                    torch.testing.assert_close(added[row, place], torch.stack(cells).mean(0))
            x = x + added
        torch.testing.assert_close(x, pruned[f"scale{scale}.block{block}.out"])
        before = pruned[f"scale{scale - 1}.block{block}.k"].shape[1]
        assert pruned[f"scale{scale}.block{block}.k"].shape[1] == before + count
        block += 1
    assert block > 1


def touched(place: int, side: int) -> range:
    """Of three cells along an axis, those that a place of a finer one lies in."""
    return range(math.floor(3 * place / side), math.ceil(3 * (place + 1) / side))


@pytest.mark.parametrize("backend", [ONNXRUNTIME, OPENVINO])
@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_graphs_draw_as_the_reference(
    settings: SamplingSettings, backend: str, export_once: ExportOnce
) -> None:
    bundle = open_bundle(export_once(DEMO_CHECKPOINT, "fp32"))
    pipeline = Pipeline(bundle, open_backend(bundle, backend=backend))
    recorder, found = recording(pipeline.backend, bundle.manifest)
    prompts = ["a red circle on a white background", "a blue square on a green background"]
    features, mask = pipeline.encode(prompts)
    given = {"features": np.asarray(pipeline.backend.to_host(features)), "mask": mask}
    found["image"] = drawn(
        draw(recorder, bundle.manifest.program(settings, 2), given, SeededNoise([3, 9]))
    ).images
    expected: dict[str, np.ndarray] = {}
    generate(
        load_hart(find_checkpoint(DEMO_CHECKPOINT)),
        torch.from_numpy(given["features"]),
        torch.from_numpy(given["mask"]),
        SeededNoise([3, 9]),
        settings,
        record=lambda name, value: expected.update({name: value.numpy().copy()}),
    )
    scales = len(bundle.manifest.model.patch_nums)
    for k in range(scales):
        assert np.array_equal(found[f"scale{k}.idx"].ravel(), expected[f"scale{k}.idx"].ravel()), k
        hidden = expected[f"scale{k}.hidden"]
        assert np.abs(found[f"scale{k}.hidden"] - hidden).max() < 1e-4 * np.abs(hidden).max(), k
        halves = 2 if k < scales - settings.unguided_scales else 1
        assert len(hidden) == halves * 2
    assert np.abs(found["image"] - expected["image"]).max() < 2e-4
    pruned = {name for name in expected if name.endswith(".kept")}
    assert bool(pruned) is settings.prune


@pytest.mark.parametrize("backend", [ONNXRUNTIME, OPENVINO])
def test_choices_may_change_between_pictures(backend: str, export_once: ExportOnce) -> None:
    """Each has a plan of its own, and draws what it drew before."""
    bundle = open_bundle(export_once(DEMO_CHECKPOINT, "fp32"))
    pipeline = Pipeline(bundle, open_backend(bundle, backend=backend))
    choices: list[Overrides] = [
        {},
        {"unguided_scales": 1},
        {"unguided_scales": 2},
        {"prune": True},
        {"prune": True, "keep": "1,0.5"},
    ]
    drawn = [pipeline("a red circle on a white background", **choice)[0].tobytes() for choice in choices]
    assert len(set(drawn)) == len(choices)
    for choice, before in reversed([*zip(choices, drawn, strict=True)]):
        assert pipeline("a red circle on a white background", **choice)[0].tobytes() == before
