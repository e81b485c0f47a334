"""What engines hold is drawn with, and what they do not hold is refused before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_runtime import Pipeline
from hart_runtime.common.errors import InputError
from hart_runtime.common.schedule import published_top_k
from hart_runtime.common.settings import Overrides, SamplingSettings
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.families.hart import NAME
from hart_runtime.runtime.families.names import FAST, SAMPLE, SMOOTH, TRANSFORMER
from hart_runtime.runtime.manifest import NOT_PRUNED, FileSpec, Manifest, manifest_of
from hart_runtime.runtime.memory.plan import ALIGNMENT, make_plan
from hart_runtime.runtime.spec import ModelSpec
from hart_runtime.runtime.tensorrt.build import plan_engines
from hart_runtime.runtime.tensorrt.builder import BuildOptions
from hart_runtime.runtime.tensorrt.limits import EngineLimits
from hart_runtime.runtime.tensorrt.manifest import EngineManifest, EngineSpec, graphs_of
from hart_runtime.runtime.tensorrt.profiles import LARGEST_TOP_K, Profile, Range, choose, make_profiles
from tests.paper_tensorrt import H200, paper_package

PROMPTS = ["a red circle on a white background", "a small blue star", "a green ring"]
PUBLISHED = ModelSpec(
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), 24, 1536, 24, 4096, 32, 1024, 300, 1536, 1024
)


def top_k_of(profiles: list[Profile]) -> list[tuple[int, int, int]]:
    ranges = [profile.values["top_k"] for profile in profiles]
    return [(r.min[0], r.opt[0], r.max[0]) for r in ranges]


def test_profiles_hold_what_the_schedule_fixes() -> None:
    manifest = manifest_of(NAME, PUBLISHED)
    fixed = [published_top_k(k) for k in range(14)]
    assert top_k_of(make_profiles(manifest, SAMPLE, (1, 1), True)) == [(n, n, n) for n in fixed]
    assert top_k_of(make_profiles(manifest, SAMPLE, (1, 1), False)) == [(300, 300, 600)]
    wider = make_profiles(manifest, SAMPLE, (1, 1), True, (100, 1000))
    assert top_k_of(wider) == [(100, n, 1000) for n in fixed]
    assert top_k_of(make_profiles(manifest, SAMPLE, (1, 1), True, (400, 400)))[-1] == (300, 300, 400)
    assert all(profile.values == {} for profile in make_profiles(manifest, SMOOTH, (1, 1), True))
    own = manifest_of(NAME, PUBLISHED, sampling=SamplingSettings(top_k=4000))
    assert set(top_k_of(make_profiles(own, SAMPLE, (1, 1), True))) == {(LARGEST_TOP_K,) * 3}
    small = manifest_of(NAME, replace(PUBLISHED, vocab_size=512))
    assert top_k_of(make_profiles(small, SAMPLE, (1, 1), True))[0] == (512, 512, 512)


def test_what_is_one_at_the_first_scale_alone_has_room_for_two() -> None:
    """Rows of the transformer, of single pictures; with larger batches no scale has one row alone. Sides."""
    manifest = manifest_of(NAME, PUBLISHED)
    for batches, rows in (((1, 1), (1, 1, 2)), ((1, 3), (1, 1, 3)), ((2, 2), (2, 2, 2))):
        first, second, *_ = make_profiles(manifest, TRANSFORMER, batches, True)
        x = first.shapes["x"]
        assert (x.min[0], x.opt[0], x.max[0]) == rows
        assert x.min[1:] == x.max[1:] == (300, 1536)
        assert second.shapes["x"].max[0] == 2 * batches[1]
    first, *_, last = make_profiles(manifest, SMOOTH, (1, 3), True)
    logits = [(p.shapes["logits"].min[:3], p.shapes["logits"].max[:3]) for p in (first, last)]
    assert logits == [((1, 1, 1), (3, 2, 2)), ((1, 64, 64), (3, 64, 64))]
    (one,) = make_profiles(manifest, TRANSFORMER, (1, 1), False)
    assert (one.shapes["x"].min[0], one.shapes["x"].max[0]) == (1, 2)


def test_a_profile_is_chosen_by_values_too() -> None:
    """Two scales of one size keep different numbers of codes."""
    shape = {"x": Range((1, 4), (1, 4), (1, 4))}
    profiles = [Profile(str(k), shape, {"k": Range((k,), (k,), (k,))}) for k in (600, 300)]
    assert choose(profiles, {"x": (1, 4)}, {"k": (300,)}) == 1
    assert choose(profiles, {"x": (1, 4)}, {"k": (600,), "told beside": (7,)}) == 0
    assert choose(profiles, {"x": (1, 4)}) == 0
    with pytest.raises(ValueError, match=r"600: k \(600,\) to \(600,\), found \(400,\); 300: k"):
        choose(profiles, {"x": (1, 4)}, {"k": (400,)})


def limits_of(manifest: Manifest, options: BuildOptions) -> EngineLimits:
    """Those of engines that were built with options."""
    engines = {
        name: EngineSpec(
            file=FileSpec(0, ("",)),
            sources={},
            profiles=tuple(
                make_profiles(manifest, name, options.batches, options.per_scale, options.top_k, options.keep)
            ),
            inputs=graph.inputs,
            outputs=graph.outputs,
            on_host=(),
            seconds=0.0,
        )
        for name, graph in graphs_of(manifest, options.keep).items()
    }
    made = EngineManifest(
        "tensorrt", "10.13.3.9", ("9.0",), H200, "linux", manifest.precision, options, engines
    )
    return EngineLimits(Path("engines/demo/tensorrt-10.13.3.9"), made, manifest)


@pytest.fixture
def built_for(demo_bundle: Path) -> Callable[..., Pipeline]:
    """A pipeline whose backend has the limits of engines, and computes on the CPU."""
    bundle = open_bundle(demo_bundle)

    def load(**options: object) -> Pipeline:
        backend = on_the_cpu(bundle)
        backend.limits = limits_of(bundle.manifest, BuildOptions(**options))  # type: ignore[arg-type]
        return Pipeline(bundle, backend)

    return load


def test_prompts_are_drawn_with_what_was_built(built_for: Callable[..., Pipeline], demo_bundle: Path) -> None:
    bundle = open_bundle(demo_bundle)
    expected = [image.tobytes() for image in Pipeline(bundle, on_the_cpu(bundle))(PROMPTS, seed=3)]
    for batches, sizes in (((1, 1), [1, 1, 1]), ((1, 2), [2, 1]), ((2, 2), [2, 1]), ((4, 8), [3])):
        parts = list(built_for(batches=batches).batches(PROMPTS, seed=3))
        assert [len(part.images) for part in parts] == sizes, "nobody gets what was drawn to fill a batch"
        assert [image.tobytes() for part in parts for image in part.images] == expected
        assert [prompt for part in parts for prompt in part.prompts] == PROMPTS
        assert [seed for part in parts for seed in part.seeds] == [3, 3, 3]


@pytest.mark.parametrize(
    ("built", "asked", "said"),
    [
        (
            {},
            {"batch": 2},
            "`batch=2`: the engines in tensorrt-10.13.3.9 hold 1 pictures at once; build others with: "
            "hart-build `bundle='engines/demo'` `backend='tensorrt'` `batch='1..2'`",
        ),
        (
            {"batches": (2, 4), "top_k": (1, 9)},
            {"batch": 1},
            "`batch=1`: the engines in tensorrt-10.13.3.9 hold 2..4 pictures at once; build others with: "
            "hart-build `bundle='engines/demo'` `backend='tensorrt'` `batch='1..4'` `top_k='1..9'`",
        ),
        (
            {},
            {"top_k": 100},
            "`top_k=100`: the engines in tensorrt-10.13.3.9 hold 5 codes a token at scale 0; build others "
            "with: hart-build `bundle='engines/demo'` `backend='tensorrt'` `top_k='100'`",
        ),
        (
            {"top_k": (200, 300), "per_scale": False, "batches": (1, 2)},
            {"top_k": 400},
            "`top_k=400`: the engines in tensorrt-10.13.3.9 hold 5..300 codes a token at scale 0; build "
            "others with: hart-build `bundle='engines/demo'` `backend='tensorrt'` `batch='1..2'` "
            "`top_k='200..400'`",
        ),
        (
            {},
            {"prune": True, "keep": "0.5,0.25"},
            "`prune` and `unguided_scales`: the engines in tensorrt-10.13.3.9 compute all tokens of both "
            "guidance halves; use `backend='onnxruntime'`, or build others with: hart-build "
            "`bundle='engines/demo'` `backend='tensorrt'` `keep='0.5,0.25'`",
        ),
        (
            {},
            {"unguided_scales": 1},
            "`prune` and `unguided_scales`: the engines in tensorrt-10.13.3.9 compute all tokens of both "
            "guidance halves; use `backend='onnxruntime'`",
        ),
        (
            {"keep": "0.5,0.25", "batches": (1, 2)},
            {"prune": True, "keep": "1,0.5"},
            "`prune` and `keep`: the engines in tensorrt-10.13.3.9 draw with `prune=True` and "
            "`keep='0.5,0.25'`, or leave nothing out; use `backend='onnxruntime'`, or build others with: "
            "hart-build `bundle='engines/demo'` `backend='tensorrt'` `batch='1..2'` `keep='1,0.5'`",
        ),
        (
            {"keep": "0.5,0.25"},
            {"unguided_scales": 1},
            "`prune` and `keep`: the engines in tensorrt-10.13.3.9 draw with `prune=True` and "
            "`keep='0.5,0.25'`, or leave nothing out; use `backend='onnxruntime'`",
        ),
    ],
)
def test_what_engines_do_not_hold_is_refused(
    built_for: Callable[..., Pipeline], built: dict[str, object], asked: dict[str, Any], said: str
) -> None:
    pipeline = built_for(**built)
    with pytest.raises(InputError) as caught:
        next(pipeline.batches(PROMPTS[0], **asked))
    assert str(caught.value) == said


def test_a_range_that_was_asked_for_is_drawn(built_for: Callable[..., Pipeline], demo: Pipeline) -> None:
    pipeline = built_for(top_k=(50, 60))
    for top_k in (20, 50, 60):  # the bundle's own 5 lie beside
        drawn = pipeline(PROMPTS[0], top_k=top_k)[0].tobytes()
        assert drawn == demo(PROMPTS[0], top_k=top_k)[0].tobytes()
    with pytest.raises(InputError, match=r"hold 5\.\.60 codes"):
        pipeline(PROMPTS[0], top_k=61)


def test_tokens_that_were_built_to_be_left_out_are(
    built_for: Callable[..., Pipeline], demo: Pipeline
) -> None:
    pipeline = built_for(keep="0.5,0.25")
    choices: list[Overrides] = [
        {"prune": True, "keep": "0.50,.25"},  # the same tokens in other words
        {"prune": True, "keep": "0.5,0.25", "unguided_scales": 2},
        {},
    ]
    for choice in choices:
        assert pipeline(PROMPTS[0], **choice)[0].tobytes() == demo(PROMPTS[0], **choice)[0].tobytes()


def test_profiles_of_what_leaves_tokens_out() -> None:
    """Tokens that take part are fixed; guidance may be left out or not, in all graphs that see its half."""
    manifest = manifest_of(NAME, PUBLISHED)
    keep = "0.5,0.25"
    fast = make_profiles(manifest, FAST, (1, 2), True, keep=keep)
    x, chosen = (fast[13].shapes[name] for name in ("x", "taking_part"))
    assert (x.min, x.opt, x.max) == ((1, 4096, 1536), (2, 4096, 1536), (4, 4096, 1536))
    assert chosen.min == chosen.max == (1024,)
    assert {fast[13].shapes["past_key_0"].min, fast[13].shapes["past_key_0"].opt} == {(4502, 2, 1536)}
    assert fast[12].shapes["memory_attn_0"].min == (2, 1296, 1536)
    assert make_profiles(manifest, TRANSFORMER, (1, 2), True, keep=keep) == make_profiles(
        manifest, TRANSFORMER, (1, 2), True
    )
    hidden = make_profiles(manifest, SAMPLE, (1, 2), True, keep=keep)[13].shapes["hidden"]
    assert (hidden.min[0], hidden.opt[0], hidden.max[0]) == (1, 2, 4)


@pytest.mark.parametrize(
    ("model", "keep", "said"),
    [
        (PUBLISHED, "0.5", "`keep`: expected the shares of tokens kept at the last two scales"),
        (
            PUBLISHED,
            "0.5,1",
            "`keep='0.5,1'`: 4096 tokens of scale 13 take part, and tensorrt chooses at most",
        ),
        (replace(PUBLISHED, patch_nums=(1, 2)), "1,1", "two others, this model's are [1, 2]"),
        (replace(PUBLISHED, modulated=True), "0.5,0.25", f"`keep='0.5,0.25'`: {NOT_PRUNED}"),
    ],
)
def test_shares_that_are_not_built(model: ModelSpec, keep: str, said: str) -> None:
    package, _ = paper_package()
    with pytest.raises(InputError) as caught:
        plan_engines(Bundle(Path(), manifest_of(NAME, model), ""), package, BuildOptions(keep=keep))
    assert said in str(caught.value)


@pytest.mark.parametrize("top_k", [LARGEST_TOP_K + 1, 4096])
def test_more_codes_than_engines_can_keep(top_k: int) -> None:
    manifest = manifest_of(NAME, PUBLISHED)
    widest = limits_of(manifest, BuildOptions(top_k=(1, LARGEST_TOP_K)))
    most = SamplingSettings(top_k=LARGEST_TOP_K)
    widest.check(manifest.program(most, 1), most)
    more = SamplingSettings(top_k=top_k)
    with pytest.raises(
        InputError,
        match=f"`top_k={top_k}`: .* hold 1..3840 codes a token at scale 0, and "
        "tensorrt keeps at most 3840; ask for fewer, or use `backend='onnxruntime'`",
    ):
        widest.check(manifest.program(more, 1), more)
    package, _ = paper_package()
    with pytest.raises(
        InputError, match=rf"`top_k`: expected 1\.\.3840 \(tensorrt keeps no more\), found {top_k}"
    ):
        plan_engines(Bundle(Path(), manifest, ""), package, BuildOptions(top_k=(top_k, top_k)))


sides = st.lists(st.integers(1, 14), min_size=2, max_size=4).map(sorted).map(tuple)
models = st.builds(
    ModelSpec,
    patch_nums=sides,
    depth=st.just(1),
    embed_dim=st.integers(1, 24).map(lambda n: 16 * n),
    num_heads=st.just(1),
    vocab_size=st.just(64),
    latent_channels=st.sampled_from([1, 4, 32]),
    image_size=st.just(16),
    context_token=st.integers(1, 20),
    context_dim=st.just(8),
    diff_width=st.just(8),
)


@settings(max_examples=60, deadline=None)
@given(models, st.sampled_from(["fp32", "fp16"]), st.integers(1, 3))
def test_models_that_put_tensors_between_addresses_are_refused(
    model: ModelSpec, precision: str, batch: int
) -> None:
    """Whatever is not refused lies where engines take it."""
    manifest = manifest_of(NAME, replace(model, image_size=16 * model.patch_nums[-1]), precision)
    options = BuildOptions(batches=(batch, batch))
    package, _ = paper_package()
    plan = make_plan(manifest.program(manifest.sampling, batch))
    bound = [
        v for call in plan.calls for v in (*call.inputs.values(), *call.outputs.values()) if v is not None
    ]
    aligned = all(view.offset % ALIGNMENT == 0 for view in bound if view.nbytes)
    bundle = Bundle(Path("nowhere"), manifest, "")
    if aligned:
        plan_engines(bundle, package, options)
        return
    with pytest.raises(InputError, match="no multiple of 256, which tensorrt does not take"):
        plan_engines(bundle, package, options)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_published_model_is_taken(precision: str) -> None:
    package, _ = paper_package()
    manifest = manifest_of(NAME, PUBLISHED, precision)
    _, jobs = plan_engines(Bundle(Path("nowhere"), manifest, ""), package, BuildOptions(batches=(1, 4)))
    assert {job.reason for job in jobs} == {"there are no engines yet"}
    with pytest.raises(InputError, match="new_key_0 of transformer, with 1 pictures at once"):
        plan_engines(
            Bundle(Path("nowhere"), manifest_of(NAME, replace(PUBLISHED, embed_dim=24 * 4), "fp16"), ""),
            package,
            BuildOptions(),
        )
