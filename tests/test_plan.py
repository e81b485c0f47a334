"""The memory plan, the profiles and the shapes behind them, for models of any shape."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import NEW
from hart_runtime.runtime.families.names import FAST, SMOOTH, TRANSFORMER, UNCONDITIONAL
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.memory.plan import ALIGNMENT, Plan, make_plan
from hart_runtime.runtime.program import cache_of
from hart_runtime.runtime.shapes import evaluate, shape_of, solve
from hart_runtime.runtime.tensorrt.profiles import choose, make_profiles
from tests.model_specs import manifest_of, manifests

SAMPLING = st.builds(
    SamplingSettings,
    smooth=st.booleans(),
    residual=st.booleans(),
    steps=st.sampled_from(["2", "3", "8"]),
)
BATCHES = st.integers(1, 4)


def test_made_up_manifests_look_like_real_ones(demo_bundle: Path) -> None:
    real = open_bundle(demo_bundle).manifest
    assert manifest_of("hart", real.model, precision="fp16").graphs == real.graphs


def plan_of(manifest: Manifest, batch: int, sampling: SamplingSettings) -> Plan:
    return make_plan(manifest.program(sampling, batch))


@settings(max_examples=25, deadline=None)
@given(manifests(), BATCHES, SAMPLING)
def test_tensors_that_live_together_do_not_overlap(
    manifest: Manifest, batch: int, sampling: SamplingSettings
) -> None:
    plan = plan_of(manifest, batch, sampling)
    for slot in plan.slots:
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset >= 0
        assert slot.offset + slot.nbytes <= (plan.constant_nbytes if slot.constant else plan.nbytes)
    for a, b in itertools.combinations(plan.slots, 2):
        if a.constant != b.constant:
            continue
        together = a.constant or (a.born <= b.dies and b.born <= a.dies)  # constants stay for good
        apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
        assert apart or not together or not a.nbytes or not b.nbytes, (a, b)


@settings(max_examples=25, deadline=None)
@given(manifests(), BATCHES, SAMPLING)
def test_every_binding_is_inside_its_slot_and_of_the_exact_size(
    manifest: Manifest, batch: int, sampling: SamplingSettings
) -> None:
    plan = plan_of(manifest, batch, sampling)
    scales = iter(manifest.scale_dims(1))
    for number, call in enumerate(plan.calls):
        spec = manifest.graphs[call.graph]
        bound = {name: view for name, view in (call.inputs | call.outputs).items() if view is not None}
        for view in bound.values():
            assert view.start >= 0
            assert view.start + view.nbytes <= view.slot.nbytes
            assert view.slot.born <= number <= view.slot.dies
        dims = solve([t for t in spec.inputs if t.name in bound], {n: v.shape for n, v in bound.items()})
        assert dims.get("batch", batch) == (1 if call.graph == "decoder" else batch)
        if call.graph == TRANSFORMER:
            scale = next(scales)
            assert (dims["past"], dims["length"]) == (scale["past"], scale["length"])
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in bound:
                assert bound[tensor.name].shape == shape_of(tensor, dims)
                assert str(bound[tensor.name].dtype) == tensor.dtype
    assert next(scales, None) is None, "the transformer runs once per scale"


@settings(max_examples=15, deadline=None)
@given(manifests(["var"]), BATCHES)
def test_keys_of_all_scales_lie_in_a_row(manifest: Manifest, batch: int) -> None:
    steps = [call for call in plan_of(manifest, batch, SamplingSettings()).calls if call.graph == TRANSFORMER]
    for name in [n for n in steps[0].outputs if n.startswith(NEW)]:
        first, end = steps[0].outputs[name], 0
        for call in steps[:-1]:
            new = call.outputs[name]
            assert (new.slot, new.start) == (first.slot, end)
            end += new.nbytes
        assert end == first.slot.nbytes
        assert first.slot.shape[0] == manifest.scale_dims(1)[-1]["past"]


@settings(max_examples=15, deadline=None)
@given(manifests(["hart"]), BATCHES)
def test_new_keys_lie_right_behind_the_old_ones(manifest: Manifest, batch: int) -> None:
    plan = plan_of(manifest, batch, SamplingSettings())
    text, both, *steps = [call for call in plan.calls if call.graph in {TRANSFORMER, UNCONDITIONAL}]
    for name in [n for n in text.outputs if n.startswith(NEW)]:
        cache = cache_of(name)
        assert cache is not None
        first = both.outputs[cache]
        assert first.start == 0
        end = first.nbytes
        for call in steps[:-1]:
            new = call.outputs[name]
            assert new.slot is first.slot
            assert new.start == end
            end += new.nbytes
        assert end == first.slot.nbytes
        assert first.slot.shape[0] == manifest.scale_dims(1)[-1]["past"]
        assert text.outputs[name].slot.dies == plan.calls.index(both), "the text's own half is copied"
        assert steps[-1].outputs[name].slot.label == "unread"
        assert {name, cache}.isdisjoint(steps[-1].results)


@settings(max_examples=25, deadline=None)
@given(manifests(), BATCHES, SAMPLING, st.integers(1, 1 << 12))
def test_memory_is_given_back_only_for_good(
    manifest: Manifest, batch: int, sampling: SamplingSettings, large: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hart_runtime.runtime.memory.plan.LARGE", large)
        plan = plan_of(manifest, batch, sampling)
    assert plan.idle or large > 1
    for number, parts in plan.idle.items():
        for offset, nbytes in parts:
            for slot in (slot for slot in plan.slots if not slot.constant):
                apart = slot.offset + slot.nbytes <= offset or offset + nbytes <= slot.offset
                assert apart or slot.dies < number


@settings(max_examples=15, deadline=None)
@given(manifests(), BATCHES, SAMPLING)
def test_nothing_is_read_before_it_is_written(
    manifest: Manifest, batch: int, sampling: SamplingSettings
) -> None:
    written: set[int] = set()
    for call in plan_of(manifest, batch, sampling).calls:
        for name, view in call.inputs.items():
            supplied = name in (*call.uploads, *call.constants)
            assert view is None or supplied or not view.nbytes or id(view.slot) in written
        written |= {id(v.slot) for v in call.outputs.values()}


@settings(max_examples=20, deadline=None)
@given(manifests(), BATCHES, SAMPLING, st.booleans())
def test_profiles_cover_every_call(
    manifest: Manifest, batch: int, sampling: SamplingSettings, per_scale: bool
) -> None:
    profiles = {name: make_profiles(manifest, name, (1, batch), per_scale) for name in manifest.graphs}
    scale = -1
    for call in plan_of(manifest, batch, sampling).calls:
        scale += call.graph == TRANSFORMER
        shapes = {name: view.shape for name, view in call.inputs.items() if view is not None}
        chosen = profiles[call.graph][choose(profiles[call.graph], shapes)]
        if per_scale:
            assert chosen.name in {f"scale{scale}", "any"}
    names = [len(found) for found in profiles.values()]
    assert (max(names) == len(manifest.model.patch_nums)) if per_scale else set(names) == {1}


@settings(max_examples=20, deadline=None)
@given(
    manifests(["hart"], fewest=4, modulated=False),
    *(BATCHES, SAMPLING, st.booleans(), st.sampled_from(["0.5,0.25", "1,0.3"]), st.booleans()),
)
def test_profiles_cover_what_leaves_tokens_out(
    manifest: Manifest, batch: int, sampling: SamplingSettings, per_scale: bool, keep: str, guided: bool
) -> None:
    """Guidance left out of any number of scales, or none; and everything that is left in, as before."""
    scales = len(manifest.model.patch_nums)
    built = {
        name: make_profiles(manifest, name, (1, batch), per_scale, keep=keep) for name in manifest.graphs
    }
    unguided = 0 if guided else scales - 1
    pruned = replace(sampling, prune=True, keep=keep, unguided_scales=unguided)
    for settings_drawn in (sampling, pruned):
        plan = make_plan(manifest.program(settings_drawn, batch), every_output=True)
        for call in plan.calls:
            choose(built[call.graph], {k: view.shape for k, view in call.inputs.items() if view is not None})
            assert call.outputs.keys() == {tensor.name for tensor in manifest.graphs[call.graph].outputs}
    assert {call.graph for call in plan.calls} >= {FAST}


@settings(max_examples=20, deadline=None)
@given(manifests(), BATCHES, st.booleans())
def test_profiles_cover_recordings(manifest: Manifest, batch: int, per_scale: bool) -> None:
    """Which have a number for every code of every token, where a seed has a pool."""
    profiles = make_profiles(manifest, SMOOTH, (1, batch), per_scale)
    dims = manifest.scale_dims(batch)
    for each in dims:
        recorded = {**each, "pool": each["side"] ** 2 * manifest.model.vocab_size}
        chosen = {
            choose(profiles, {t.name: shape_of(t, d) for t in manifest.graphs[SMOOTH].inputs})
            for d in (each, recorded)
        }
        assert len(chosen) == 1
    seeded = {p.shapes[t.name].opt for p in profiles for t in manifest.graphs[SMOOTH].inputs}
    assert (1, dims[-1]["pool"]) in seeded, "tuned for what is drawn"


@settings(max_examples=20, deadline=None)
@given(manifests(), BATCHES)
def test_a_batch_out_of_range_is_told_apart(manifest: Manifest, batch: int) -> None:
    graph = manifest.graphs["decoder"]
    shapes = {"f_hat": shape_of(graph.inputs[0], {"batch": batch + 1})}
    with pytest.raises(ValueError, match="f_hat"):
        choose(make_profiles(manifest, "decoder", (1, batch), True), shapes)


def test_what_runs_in_smaller_batches_is_covered(demo_bundle: Path) -> None:
    """Engines for four pictures at once encode one prompt and decode one picture."""
    manifest = open_bundle(demo_bundle).manifest
    for name, low in (("text_encoder", 1), ("decoder", 1), ("next_scale", 4)):
        graph = manifest.graphs[name]
        for profile in make_profiles(manifest, name, (4, 4), True):
            assert profile.shapes[graph.inputs[0].name].min[0] == low


def test_a_picture_needs_less_memory_than_its_tensors(demo_bundle: Path) -> None:
    plan: Plan = plan_of(open_bundle(demo_bundle).manifest, 2, SamplingSettings())
    assert plan.nbytes < 0.9 * sum(slot.nbytes for slot in plan.slots)


def test_dimensions_are_arithmetic_and_nothing_else() -> None:
    assert evaluate("past + length", {"past": 3, "length": 4}) == 7
    assert evaluate("next_side**2", {"next_side": 5}) == 25
    for text in ("__import__('os')", "past.real", "past", "1 / 2", "("):
        with pytest.raises(ValueError, match="dimension"):
            evaluate(text, {"length": 1})
