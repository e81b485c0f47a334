"""Engines really built with TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.hashing import sha256_of
from hart_runtime.common.install import install
from hart_runtime.export.cli import main as export_main
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.families.names import SAMPLE, TRANSFORMER
from hart_runtime.runtime.memory.gpu import Gpu, present_gpu
from hart_runtime.runtime.spec import GraphSpec, TensorSpec
from hart_runtime.runtime.tensorrt.build import build_engines, parse_range
from hart_runtime.runtime.tensorrt.builder import BuildOptions, build_engine
from hart_runtime.runtime.tensorrt.cli import main as build_main
from hart_runtime.runtime.tensorrt.cli import parse_capabilities
from hart_runtime.runtime.tensorrt.manifest import (
    ENGINE_MANIFEST,
    ENGINE_SCHEMA,
    build_command,
    engine_file,
    find_engines,
    mismatches,
    read_engine_manifest,
)
from hart_runtime.runtime.tensorrt.package import Package, available_packages
from hart_runtime.runtime.tensorrt.profiles import make_profiles
from tests.golden_runs import HERE
from tests.test_bundle import reseal

CAPABILITIES = ("8.6", "8.9", "12.0")
Values = dict[str, Any]
ADA = Gpu("NVIDIA GeForce RTX 4060", "8.9", 24, 8_585_216_000)


@pytest.fixture(scope="module")
def built(demo_bundle: Path, rtx: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with static engines. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("engines") / "demo"
    shutil.copytree(demo_bundle, folder)
    options = BuildOptions(batches=(1, 2), compute_capabilities=CAPABILITIES)
    build_engines(open_bundle(folder), rtx, options)
    return folder


def engines_of(bundle: Path) -> Path:
    (folder,) = bundle.glob("tensorrt-rtx-*")
    return folder


def copy_of(bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder)
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def touch_graph(bundle: Path, name: str) -> None:
    """Change one byte of a graph, without changing what it computes, and seal the bundle again."""
    path = bundle / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    model.doc_string = "x"
    path.write_bytes(model.SerializeToString())
    reseal(bundle, path.name)


def build(*arguments: object) -> Result:
    return CliRunner().invoke(build_main, [str(a) for a in arguments])


def test_static_engines_cover_every_scale(built: Path) -> None:
    manifest, bundle = read_engine_manifest(engines_of(built)), open_bundle(built)
    scales = bundle.manifest.scale_dims(1)
    assert set(manifest.engines) == set(bundle.manifest.engined)
    for name, engine in manifest.engines.items():
        free = {n for tensor in engine.inputs for n in tensor.shape if isinstance(n, str)}
        names = {n.removeprefix("2*") for n in free}
        expected = [{}] if names <= {"batch", "guided"} else [d for d in scales if names <= set(d)]
        assert len(engine.profiles) == len(expected), name
        for profile in engine.profiles:
            assert set(profile.shapes) == {t.name for t in engine.inputs}, "no input without a shape"
    lengths = [p.shapes["x"].opt[1] for p in manifest.engines["transformer"].profiles]
    assert lengths == [d["length"] for d in scales]
    assert manifest.engines["sample"].on_host == ("top_k",)
    assert engines_of(built).name.endswith("sm86-sm89-sm120-linux-x86_64-fp16")


def test_dynamic_engines_have_one_profile(built: Path, rtx: Package, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    done = build("--engine", folder, "--scales", "dynamic", "--batch", "1..4", "--compute-capability", "8.9")
    assert done.exit_code == 0, done.output
    assert len(list(folder.glob("tensorrt-rtx-*"))) == 2, "beside the others, not instead"
    manifest = read_engine_manifest(next(folder.glob(f"*{rtx.version}-sm89-linux*")))
    assert {len(e.profiles) for e in manifest.engines.values()} == {1}
    x = manifest.engines["transformer"].profiles[0].shapes["x"]
    assert (x.min[:2], x.max[:2]) == ((1, 4), (8, 64)), "from one row of text to both halves of four pictures"


def test_weights_are_stored_once(built: Path, rtx: Package) -> None:
    """In engines of single pictures too, whose first scale has one row and one cell: fixed at one, weights of
    queries, keys and values and those of the vocabulary were there twice.
    """
    bundle = open_bundle(built)
    model, options = bundle.manifest.model, BuildOptions(compute_capabilities=("8.9",))
    shapes = {
        TRANSFORMER: (model.embed_dim, 3 * model.embed_dim),
        SAMPLE: (model.embed_dim, model.vocab_size),
    }
    for name, shape in shapes.items():
        first, second, *_ = make_profiles(bundle.manifest, name, (1, 1), per_scale=True)
        graph = bundle.manifest.graphs[name]
        path = bundle.path(graph.file)
        engine = build_engine(rtx, path, graph, [first, second], options).serialized
        tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
        weights = [tensor for tensor in tensors if tensor.shape == shape]
        assert len(weights) == (model.depth if name == TRANSFORMER else 1)
        for weight in weights:
            assert engine.count(weight[5, :64].tobytes()) == 1, name


def test_engines_for_any_gpu_of_a_kind_name_none(built: Path) -> None:
    """Nobody measured anything on this machine, and nobody could look at what was built."""
    manifest = read_engine_manifest(engines_of(built))
    assert manifest.gpu is None
    assert {(e.scratch, e.attention) for e in manifest.engines.values()} == {(None, None)}
    assert not list(built.glob("timing-*"))


def test_a_second_build_does_nothing(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    before = contents(folder)
    done = build("--engine", folder, "--batch", "1..2", "--compute-capability", ",".join(CAPABILITIES))
    assert done.exit_code == 0, done.output
    assert "every engine is current" in done.stdout
    assert contents(folder) == before


def test_only_what_changed_is_built_again(built: Path, rtx: Package, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    touch_graph(folder, "latent")
    (engines_of(folder) / engine_file("smooth")).write_bytes(b"damaged")
    bundle, options = open_bundle(folder), BuildOptions((1, 2), compute_capabilities=CAPABILITIES)
    assert "latent built from other graphs" in str(
        mismatches(read_engine_manifest(engines_of(folder)), bundle, rtx, ADA)
    )
    target, manifest, again = build_engines(bundle, rtx, options)
    assert sorted(again) == ["latent", "smooth"]
    assert mismatches(manifest, bundle, rtx, ADA) == []
    assert sha256_of(target / engine_file("smooth")) == manifest.engines["smooth"].file.identity
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


NO_LARGE_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); "
"""How a full disk looks to a process that may not fill one."""


def interrupted(bundle: Path, before: str, stop: int | None) -> subprocess.CompletedProcess[str]:
    """Run hart-build in a process of its own; send it a signal when it is at work."""
    code = f"{before}from hart_runtime.runtime.tensorrt.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--engine", str(bundle), "--force"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if stop is not None:
        while not list(bundle.glob(".tensorrt-rtx-*/*.engine")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(stop)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    ("before", "stop", "code"),
    [("", signal.SIGINT, 130), ("", signal.SIGTERM, 143), (NO_LARGE_FILES, None, 1)],
    ids=["SIGINT", "SIGTERM", "disk full"],
)
def test_an_interrupted_build_leaves_the_bundle_as_it_was(
    built: Path, tmp_path: Path, before: str, stop: int | None, code: int
) -> None:
    folder = copy_of(built, tmp_path)
    as_it_was = contents(folder)
    ended = interrupted(folder, before, stop)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(folder) == as_it_was
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    if stop is None:
        assert "could not be written" in ended.stderr


def test_exporting_again_builds_missing_engines_alone(
    demo_bundle: Path, rtx: Package, tmp_path: Path
) -> None:
    """A bundle without engines gets them; one that lacks an engine gets that one."""
    folder = copy_of(demo_bundle, tmp_path)
    arguments = ["--output", str(folder), "--backend", rtx.name]
    graphs = contents(folder)
    for missing, built in (
        (None, "12 engines built"),
        ("decoder", "1 engines built"),
        ("", "every engine is current"),
    ):
        if missing:
            (engines_of(folder) / engine_file(missing)).unlink()
        done = CliRunner().invoke(export_main, arguments)
        assert done.exit_code == 0, done.output
        assert "is there already, from the same checkpoint with the same options" in done.stdout
        assert built in done.stdout
    assert {name: size for name, size in contents(folder).items() if name in graphs} == graphs


def test_exporting_again_keeps_engines_with_options_of_their_own(
    built: Path, rtx: Package, tmp_path: Path
) -> None:
    """Built by somebody who wants them: what is missing of them is built as they were."""
    folder = copy_of(built, tmp_path)
    (engines_of(folder) / engine_file("decoder")).unlink()
    before = contents(folder)
    done = CliRunner().invoke(export_main, ["--output", str(folder), "--backend", rtx.name])
    assert done.exit_code == 0, done.output
    assert "1 engines built" in done.stdout
    assert read_engine_manifest(engines_of(folder)).options.batches == (1, 2)
    kept = {name: size for name, size in contents(folder).items() if not name.endswith(ENGINE_MANIFEST)}
    assert (
        before.items() - {k: v for k, v in before.items() if k.endswith(ENGINE_MANIFEST)}.items()
        <= kept.items()
    )


def test_engines_are_compared_before_they_are_loaded(built: Path, rtx: Package, tmp_path: Path) -> None:
    bundle = open_bundle(built)
    assert find_engines(bundle, rtx, ADA)[0] == engines_of(built)
    mend = build_command(built, "tensorrt-rtx")
    with pytest.raises(InputError, match=r"for compute capability 8\.6, .*, this GPU has 7\.5") as caught:
        find_engines(bundle, rtx, replace(ADA, capability="7.5"))
    assert mend in str(caught.value)
    with pytest.raises(InputError, match=r"installed is 99\.0") as caught:
        find_engines(bundle, replace(rtx, version="99.0"), ADA)
    assert mend in str(caught.value)

    folder = copy_of(built, tmp_path)
    engine = engines_of(folder) / engine_file("decoder")
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"decoder.engine: expected sha256 .* not loaded"):
        find_engines(open_bundle(folder), rtx, ADA)
    engine.unlink()
    with pytest.raises(InputError, match=r"decoder.engine: missing"):
        find_engines(open_bundle(folder), rtx, ADA)


OPTIONS: list[tuple[Values, str]] = [
    ({"batches": [1, 0]}, r"options.batches: expected two numbers from 1 to 64, found \[1, 0\]"),
    ({"batches": [0, 4]}, "options.batches: expected two numbers"),
    ({"batches": [1, 10**9]}, "options.batches: expected two numbers"),
    ({"batches": [3, 2]}, "options.batches: expected two numbers"),
    ({"top_k": [0, 0]}, "options: expected|options.top_k: expected"),
    ({"workspace": -1.0}, "options.workspace: expected more than 0, found -1.0"),
]
PROFILES: list[tuple[Callable[[list[Values]], object], str]] = [
    (lambda profiles: profiles.clear(), "engines.sample.profiles: expected 5 or one for all, found 0"),
    (lambda profiles: profiles.pop(), "engines.sample.profiles: expected 5 or one for all, found 4"),
    (lambda profiles: profiles[1]["shapes"].pop("hidden"), r"sample.profiles\[1\]: expected rising ranges"),
    (lambda profiles: profiles[1]["values"].clear(), r"sample.profiles\[1\]: expected rising ranges"),
    (lambda profiles: profiles[2]["shapes"]["hidden"].update(max=[1]), r"sample.profiles\[2\]: expected"),
    (
        lambda profiles: profiles[2]["shapes"]["hidden"].update(min=[99] * 3),
        r"sample.profiles\[2\]: expected",
    ),
]


def with_options(values: Values, **changed: Any) -> Values:
    return {**values, "options": {**values["options"], **changed}}


def with_profiles(values: Values, change: Callable[[list[Values]], object]) -> Values:
    copied: Values = json.loads(json.dumps(values))
    change(copied["engines"]["sample"]["profiles"])
    return copied


def test_a_manifest_that_cannot_be_read_says_so(built: Path, rtx: Package, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    file = engines_of(folder) / ENGINE_MANIFEST
    values = json.loads(file.read_text())
    for text, words in (
        ("{", "damaged"),
        (json.dumps({**values, "schema": ENGINE_SCHEMA + 1}), "newer"),
        (json.dumps({**values, "engines": {"decoder": {}}}), "engines.decoder: file is missing"),
        (json.dumps({**values, "version": "1." * 10**5}), "version: expected at most 255 characters"),
        (json.dumps({**values, "version": "1\n2"}), r"tensorrt-rtx '1\\n2', installed is"),
        (json.dumps({**values, "system": "a\tb"}), r"built on 'a\\tb', this is"),
        (json.dumps({**values, "system": "x" * 10**5}), "system: expected at most 255 characters"),
        (json.dumps({**values, "gpu": {**asdict(ADA), "name": "x" * 10**5}}), "gpu: expected"),
        (json.dumps({**values, "gpu": {**asdict(ADA), "memory": 10**400}}), "gpu: expected"),
        *((json.dumps(with_options(values, **changed)), words) for changed, words in OPTIONS),
        *((json.dumps(with_profiles(values, change)), words) for change, words in PROFILES),
        (json.dumps({**values, "compute_capabilities": ["8.6"] * 10**5}), "and 99995 more, this GPU has"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words) as caught:
            find_engines(open_bundle(folder), rtx, ADA)
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


def test_a_backend_asked_for_by_name_is_not_replaced(built: Path) -> None:
    bundle = open_bundle(built)
    with pytest.raises(InputError, match="runs on a GPU"):
        open_backend(bundle, "cpu", backend="tensorrt-rtx")
    if "tensorrt" not in {package.name for package in available_packages()}:
        with pytest.raises(InputError, match=re.escape(install("tensorrt"))):
            open_backend(bundle, backend="tensorrt")
    assert open_backend(bundle, "cpu", backend="onnxruntime").device == "cpu"


@pytest.mark.skipif(present_gpu() is not None, reason="this machine has a GPU")
def test_auto_says_nothing_of_gpus_where_there_is_none(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_backend(open_bundle(built)).device == "cpu"
    assert [record.message for record in caplog.records] == []


def test_a_dropped_input_is_an_error(rtx: Package, tmp_path: Path, demo_bundle: Path) -> None:
    """The parser ignores ``nonpad_kv_seqlen``: attention would read the whole cache."""
    shape: tuple[str | int, ...] = ("batch", 4, 8, 16)
    qkv = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, shape) for n in "qkv"]
    lengths = helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT16, shape)
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["out"])
    graph = helper.make_graph([node], "attention", [*qkv, lengths], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    path = tmp_path / "attention.onnx"
    onnx.save(model, path)
    specs = [TensorSpec(n, "float16", ("batch", 4, 8, 16)) for n in "qkv"]
    spec = GraphSpec(path.name, 24, (*specs, TensorSpec("lengths", "int64", ("batch",))), ())
    with pytest.raises(RunError, match="ignores the inputs lengths"):
        build_engine(rtx, path, spec, [], BuildOptions())


def test_what_a_user_may_mistype(built: Path) -> None:
    assert parse_range("`batches`", "1..4") == (1, 4)
    assert parse_range("`batches`", "2") == (2, 2)
    assert parse_capabilities("12.0,8.6, 8.6") == ("8.6", "12.0")
    for arguments, words in (
        (("--batch", "x"), "--batch: expected a number or a range"),
        (("--batch", "2..1"), "--batch: expected 1..8"),
        (("--batch", "9"), "--batch: expected 1..8"),
        (("--compute-capability", "9.0"), "builds for 7.5"),
        (("--compute-capability", "sm89"), "expected numbers such as 8.6,8.9"),
    ):
        done = build("--engine", built, "--backend", "tensorrt-rtx", *arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
    done = build("--engine", built / "nowhere")
    assert done.exit_code == 2
    assert "no bundle here" in done.stderr


def test_an_export_ends_in_engines(rtx: Package, tmp_path: Path) -> None:
    checkpoint, output = HERE / "t2i_main", tmp_path / "main"
    arguments = [str(checkpoint), "--output", str(output), "--backend", "tensorrt-rtx"]
    done = CliRunner().invoke(export_main, arguments)
    assert done.exit_code == 0, done.output
    assert "12 graphs" in done.stdout
    assert "11 engines built" in done.stdout, "no text encoder in this checkpoint"
    assert len(read_engine_manifest(engines_of(output)).engines) == 11
