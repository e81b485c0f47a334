"""What hart-build tells a package that tunes engines on a GPU, and what it keeps of what it hears."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.families.names import (
    FAST,
    RESIDUAL_CONDITION,
    RESIDUAL_STEP,
    SAMPLE,
    TRANSFORMER,
)
from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.tensorrt import timing_cache
from hart_runtime.runtime.tensorrt.build import build_engines, plan_engines
from hart_runtime.runtime.tensorrt.builder import BuildOptions
from hart_runtime.runtime.tensorrt.cli import main as build_main
from hart_runtime.runtime.tensorrt.inspection import (
    FUSED,
    IN_PART,
    NOT_FUSED,
    UNKNOWN,
    attention_of,
)
from hart_runtime.runtime.tensorrt.manifest import (
    engine_file,
    find_engines,
    mismatches,
    read_engine_manifest,
)
from hart_runtime.runtime.tensorrt.package import Package, graph_read
from hart_runtime.runtime.tensorrt.timing_cache import timing_file
from tests import paper_tensorrt as paper
from tests.paper_tensorrt import H200, PaperTensorRT, paper_package
from tests.test_engines import touch_graph

L40S = Gpu("NVIDIA L40S", "8.9", 142, 47_800_000_000)
RTX_4060 = Gpu("NVIDIA GeForce RTX 4060", "8.9", 24, 8_585_216_000)


@pytest.fixture
def folder(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "demo"))


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setattr(timing_cache, "user_cache_path", lambda name: place / name)
    return place / "hart-runtime"


def test_float32_products_are_exact_unless_asked_otherwise(folder: Path) -> None:
    package, api = paper_package()
    bundle = open_bundle(folder)
    build_engines(bundle, package, BuildOptions(), H200)
    assert {frozenset(config.flags) for config in api.configs} == {frozenset()}
    _, manifest, again = build_engines(bundle, package, BuildOptions(tf32=True), H200)
    assert len(again) == len(bundle.manifest.engined), "another arithmetic is another engine"
    assert {frozenset(config.flags) for config in api.configs[-11:]} == {frozenset({"TF32"})}
    assert manifest.options.tf32


def test_another_range_of_codes_builds_what_it_concerns(folder: Path) -> None:
    package, _ = paper_package()
    bundle = open_bundle(folder)
    build_engines(bundle, package, BuildOptions(), H200)
    wider = BuildOptions(top_k=(1, 100))
    _, manifest, again = build_engines(bundle, package, wider, H200)
    assert again == [SAMPLE]
    assert manifest.options == wider
    assert build_engines(bundle, package, wider, H200)[2] == []
    wider = BuildOptions(top_k=(50, 60))
    _, manifest, again = build_engines(bundle, package, replace(wider, batches=(1, 1)), H200)
    assert (again, manifest.options) == ([SAMPLE], wider)


def test_what_leaves_tokens_out_is_built_where_it_is_asked_for(folder: Path) -> None:
    """Beside it what draws codes and the residual of the conditional half alone; the rest is current."""
    package, _ = paper_package()
    bundle = open_bundle(folder)
    build_engines(bundle, package, BuildOptions(), H200)
    target, manifest, again = build_engines(bundle, package, BuildOptions(keep="0.5,0.25"), H200)
    assert set(again) == {FAST, SAMPLE, RESIDUAL_CONDITION, RESIDUAL_STEP}
    assert manifest.engines.keys() == bundle.manifest.graphs.keys()
    assert read_engine_manifest(target) == manifest
    assert build_engines(bundle, package, BuildOptions(keep="0.5,0.25"), H200)[2] == []
    assert build_engines(bundle, package, BuildOptions(keep="0.5,0.5"), H200)[2] == [FAST]
    described = json.loads((target / "engines.json").read_text())
    described["options"]["keep"] = "half"
    (target / "engines.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"engines.json: options.keep: keep: expected the shares"):
        read_engine_manifest(target)
    _, manifest, again = build_engines(bundle, package, BuildOptions(), H200)
    assert FAST not in manifest.engines


def test_a_profile_that_is_refused_ends_the_build(folder: Path) -> None:
    package, api = paper_package()
    api.add_profile = lambda profile: -1
    with pytest.raises(RunError, match=r"tensorrt 10\.13\.3\.9 refuses the profile any"):
        build_engines(open_bundle(folder), package, BuildOptions(), H200)
    assert not list(folder.glob("*tensorrt-*/"))


def test_measurements_are_kept_beside_the_engines_and_for_the_user(folder: Path, user_cache: Path) -> None:
    package, api = paper_package()
    bundle = open_bundle(folder)
    build_engines(bundle, package, BuildOptions(), H200)
    name = timing_file(package, H200)
    assert name == "timing-tensorrt-10.13.3.9-nvidia-h200.cache"
    assert (folder / name).read_bytes() == (user_cache / name).read_bytes()
    assert len(api.measured) == 12
    for kept, lost in ((folder, user_cache), (user_cache, folder)):
        (lost / name).unlink()
        build_engines(bundle, package, BuildOptions(), H200, force=True)
        assert len(api.measured) == 12, f"{kept} was enough"
        assert (lost / name).exists()
    both = [place / name for place in (folder, user_cache)]
    known = [built_from(bundle, package, name) for name in (TRANSFORMER, SAMPLE)]
    one, other = (paper.MEASURED + b"h200:" + graph.encode() for graph in known)
    for file, data in zip(both, (one, other), strict=True):
        file.write_bytes(data)
    build_engines(bundle, package, BuildOptions(), H200, force=True)
    every = {built_from(bundle, package, name) for name in bundle.manifest.engined}
    assert set(api.measured[11:]) == every - set(known)


def built_from(bundle: Bundle, package: Package, name: str) -> str:
    """Stem of the file that a graph's engine is built from."""
    return Path(graph_read(package, bundle.manifest.graphs[name])).stem


@pytest.mark.parametrize("data", [b"", b"damaged", paper.MEASURED + b"another GPU:transformer"])
def test_measurements_that_cannot_be_used_cost_nothing_but_time(
    folder: Path, user_cache: Path, data: bytes
) -> None:
    package, api = paper_package()
    name = timing_file(package, H200)
    (folder / name).write_bytes(data)
    user_cache.mkdir(parents=True)
    (user_cache / name).mkdir()  # neither read nor written
    build_engines(open_bundle(folder), package, BuildOptions(), H200)
    assert len(api.measured) == 12
    assert (folder / name).read_bytes().startswith(paper.MEASURED + b"h200:")


def test_what_an_interrupted_build_measured_is_kept(folder: Path) -> None:
    package, api = paper_package()
    before = {file.name for file in folder.iterdir()}

    def stop(graph: str) -> None:
        if graph.startswith(TRANSFORMER):
            raise KeyboardInterrupt

    api.before_build = stop
    with pytest.raises(KeyboardInterrupt):
        build_engines(open_bundle(folder), package, BuildOptions(), H200)
    assert {file.name for file in folder.iterdir()} - before == {timing_file(package, H200)}
    done = list(api.measured)
    api.before_build = lambda graph: None
    build_engines(open_bundle(folder), package, BuildOptions(), H200)
    assert done
    assert not any(graph.startswith(TRANSFORMER) for graph in done)
    assert len(api.measured) == len(set(api.measured)) == 12


def test_engines_are_for_one_model_of_gpu(folder: Path) -> None:
    """Two cards of one compute capability are two cards."""
    package, _ = paper_package()
    bundle = open_bundle(folder)
    target, manifest, _ = build_engines(bundle, package, BuildOptions(), L40S)
    assert manifest.gpu == L40S
    assert find_engines(bundle, package, L40S)[0] == target
    assert mismatches(manifest, bundle, package, replace(L40S, memory=int(L40S.memory * 0.99))) == []
    with pytest.raises(
        InputError, match=r"built on NVIDIA L40S \(142 multi.*, this is .*RTX 4060 \(24 multi"
    ):
        find_engines(bundle, package, RTX_4060)
    for other in (replace(L40S, memory=L40S.memory // 2), replace(L40S, multiprocessors=100)):
        assert len(mismatches(manifest, bundle, package, other)) == 1
    assert len(build_engines(bundle, package, BuildOptions(), RTX_4060)[2]) == 12
    assert find_engines(bundle, package, RTX_4060)[0] == target


def reasons(
    folder: Path, options: BuildOptions, gpu: Gpu = H200, force: bool = False
) -> dict[str, str | None]:
    package, _ = paper_package()
    _, jobs = plan_engines(open_bundle(folder), package, options, gpu, force)
    return {job.name: job.reason for job in jobs}


def test_every_reason_to_build_is_told(folder: Path) -> None:
    package, _ = paper_package()
    assert set(reasons(folder, BuildOptions()).values()) == {"there are no engines yet"}
    target, *_ = build_engines(open_bundle(folder), package, BuildOptions(), H200)
    assert set(reasons(folder, BuildOptions()).values()) == {None}
    assert set(reasons(folder, BuildOptions(), force=True).values()) == {"it is forced"}
    assert set(reasons(folder, BuildOptions(tf32=True)).values()) == {"another `tf32` is asked for"}
    other = replace(H200, name="NVIDIA H100", memory=H200.memory // 2)
    assert set(reasons(folder, BuildOptions(), other).values()) == {f"it was built on another GPU, {H200}"}
    assert set(reasons(folder, BuildOptions(), L40S).values()) == {f"there are only {target.name}"}
    wider = reasons(folder, BuildOptions(top_k=(1, 9)))
    assert {name for name, reason in wider.items() if reason} == {SAMPLE}
    touch_graph(folder, "latent")
    (target / engine_file("smooth")).write_bytes(b"damaged")
    (target / engine_file("decoder")).unlink()
    found = {name: reason for name, reason in reasons(folder, BuildOptions()).items() if reason}
    assert found == {
        "latent": "its graph or the weights changed",
        "smooth": "its file is damaged",
        "decoder": "its file is missing",
    }


def run(folder: Path, api: PaperTensorRT, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    package, _ = paper_package()
    monkeypatch.setattr(
        "hart_runtime.runtime.tensorrt.cli.choose_package", lambda _: replace(package, api=api)
    )
    monkeypatch.setattr("hart_runtime.runtime.memory.gpu.present_gpu", lambda: H200)
    monkeypatch.setattr("hart_runtime.runtime.memory.gpu.shares_memory", lambda: False)
    done = CliRunner().invoke(build_main, ["--engine", str(folder), *arguments])
    assert done.exit_code == 0, done.output
    return done


def test_a_dry_run_says_what_and_why_and_builds_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, api = paper_package()
    before = {file.name for file in folder.iterdir()}
    lines = run(folder, api, monkeypatch, "--dry-run", "--batch", "1..2").stdout.splitlines()
    assert {file.name for file in folder.iterdir()} == before
    (line,) = [line for line in lines if line.split()[0] == TRANSFORMER]
    assert line.split(maxsplit=5) == [
        *(TRANSFORMER, "5", "profiles", "from", "transformer_tensorrt-10.3.onnx"),
        "build: there are no engines yet",
    ]
    assert [line.partition(" needs")[0] for line in lines[-2:]] == ["batch 1", "batch 2"]
    assert "scratch (an estimate)" in lines[-1]
    run(folder, api, monkeypatch)
    again = run(folder, api, monkeypatch, "--dry-run", "--tf32").stdout
    assert "build: another --tf32 is asked for" in again


def test_a_dry_run_needs_no_package(folder: Path) -> None:
    done = CliRunner().invoke(build_main, ["--engine", str(folder), "--backend", "tensorrt", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("build: there are no engines yet") == 12


def test_the_summary_says_how_attention_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, api = paper_package()
    done = run(folder, api, monkeypatch)
    (line,) = [line for line in done.stdout.splitlines() if line.split()[0] == TRANSFORMER]
    assert line.endswith("6.0 MB scratch  attention fused")
    assert "warning" not in done.stderr
    assert "scratch 0.01" in done.stdout, "what was asked of the engines takes the place of the estimate"
    (line,) = [line for line in done.stdout.splitlines() if line.split()[0] == SAMPLE]
    assert "attention" not in line
    api.layers = [paper.PRODUCT, paper.SOFTMAX]
    done = run(folder, api, monkeypatch, "--force")
    assert "warning: transformer: its attention is not fused; where it is not fused, " in done.stderr
    assert "transformer: its attention is not fused" in run(folder, api, monkeypatch).stderr, (
        "as long as it is"
    )
    api.loads = False
    done = run(folder, api, monkeypatch, "--force")
    assert "attention" not in done.output, "what could not be asked is not told"


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([paper.FUSED, paper.PRODUCT], FUSED),
        (["_gemm_mha_v2_myl3_6", "__myl_AddCastMean_myl3_7"], FUSED),
        ([paper.PRODUCT, paper.SOFTMAX, paper.PRODUCT], NOT_FUSED),
        ([{"Name": "softmax_3", "LayerType": "SoftMax"}], NOT_FUSED),
        (["__myl_AddCasMaxSubExpSumDivMulCas_myl0_9"], NOT_FUSED),
        ([paper.FUSED, paper.SOFTMAX], IN_PART),
        (["{ForeignNode[x/MatMul...y/Add]}"], UNKNOWN),
        ([], UNKNOWN),
    ],
)
def test_fused_attention_is_known_by_its_kernels(layers: list[object], found: str) -> None:
    assert attention_of(json.dumps({"Layers": layers, "Bindings": []})) == found


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"Layers": 3}', "{}"])
def test_an_inspector_that_tells_nothing(text: str) -> None:
    assert attention_of(text) == UNKNOWN
