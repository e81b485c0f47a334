"""A bundle is whole and unchanged, or it is not opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from hart_runtime import Pipeline
from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import read_regular
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.owned import owned_by_bundle
from hart_runtime.runtime.tensorrt.manifest import read_engine_manifest
from tests.golden_runs import HERE


@pytest.fixture
def copy(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


def edit_manifest(folder: Path, **changes: Any) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reseal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    from dataclasses import asdict

    from hart_runtime.runtime.bundle import describe_files

    files = json.loads((folder / MANIFEST).read_text())["files"]
    described = {k: asdict(v) for k, v in describe_files(folder, [name]).items()}
    edit_manifest(folder, files={**files, **described})


def poisoned(bundle: Path, tmp_path: Path, value: float) -> Path:
    """A sealed bundle in which one bias of the word embedding is ``value``."""
    folder = Path(shutil.copytree(bundle, tmp_path / "poisoned"))
    model = onnx.load(folder / "next_scale.onnx", load_external_data=False)
    bias = next(t for t in model.graph.initializer if t.name == "word_embed.bias")
    array = onnx.numpy_helper.to_array(bias).copy()
    array[0] = value
    bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
    (folder / "next_scale.onnx").write_bytes(model.SerializeToString())
    reseal(folder, "next_scale.onnx")
    return folder


def test_every_weight_is_stored_once(demo_bundle: Path) -> None:
    seen: dict[tuple[int, int], str] = {}
    manifest = open_bundle(demo_bundle).manifest
    for graph in manifest.graphs.values():
        model = onnx.load(demo_bundle / graph.file, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                seen[int(entry["offset"]), int(entry["length"])] = tensor.name
    total = sum(length for _, length in seen)
    assert manifest.files[WEIGHTS].size - total < 4096 * (len(seen) + 1)
    data = (demo_bundle / WEIGHTS).read_bytes()
    assert len({data[o : o + n] for o, n in seen}) == len(seen)


def test_graphs_are_valid_and_typed(demo_bundle: Path) -> None:
    """fp16 is written in the graph: matrix products take half, norms and softmax float."""
    for graph in open_bundle(demo_bundle).manifest.graphs.values():
        onnx.checker.check_model(str(demo_bundle / graph.file))
    model = onnx.load(demo_bundle / "transformer.onnx", load_external_data=False)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    kinds = {node.op_type for node in model.graph.node}
    assert "MultiHeadAttention" in kinds
    for node in model.graph.node:
        found = {types[name] for name in node.input if name in types}
        if node.op_type in ("MatMul", "Gemm", "MultiHeadAttention"):
            assert found == {onnx.TensorProto.FLOAT16}, node.name
        if node.op_type in ("RMSNormalization", "Cos", "Sin"):
            assert found == {onnx.TensorProto.FLOAT}, node.name


def test_nodes_carry_the_module_path(demo_bundle: Path) -> None:
    model = onnx.load(demo_bundle / "transformer.onnx", load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert any("blocks.2.ffn.down_proj" in name for name in names)


def test_a_missing_file(copy: Path) -> None:
    (copy / "decoder.onnx").unlink()
    with pytest.raises(InputError, match=r"decoder.onnx: missing"):
        open_bundle(copy)


def test_a_changed_file(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match=r"weights.bin: expected sha256"):
        open_bundle(copy)


def test_a_truncated_file(copy: Path) -> None:
    graph = copy / "transformer.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"transformer.onnx: expected \d+ bytes, found \d+"):
        open_bundle(copy)


def test_a_truncated_graph_with_a_matching_manifest(copy: Path) -> None:
    graph = copy / "transformer.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    reseal(copy, "transformer.onnx")
    with pytest.raises(InputError, match=r"transformer.onnx"):
        Pipeline.load(copy, device="cpu")


def test_a_newer_schema(copy: Path) -> None:
    edit_manifest(copy, schema=99)
    with pytest.raises(InputError, match="schema 99 is newer"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "a/../../outside.bin"])
def test_a_path_that_leaves_the_bundle(copy: Path, name: str) -> None:
    (copy.parent / "outside.bin").write_bytes(b"x")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    edit_manifest(copy, files={**files, name: {"sha256": ["0" * 64], "size": 1}})
    with pytest.raises(InputError, match="leaves the bundle"):
        open_bundle(copy)


def snapshot(bundle: Path) -> Path:
    """As a hub's cache has it: links to files that lie together, named by their hashes."""
    blobs, found = bundle.parent / "blobs", bundle.parent / "snapshots" / "abc"
    found.mkdir(parents=True)
    shutil.copytree(bundle, blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        moved = file.rename(blobs / f"{number:064x}")
        (found / file.name).symlink_to(os.path.relpath(moved, found))
    return found


def small_ones_elsewhere(bundle: Path) -> Path:
    for name in (MANIFEST, "tokenizer.json"):
        shutil.move(bundle / name, bundle.parent / name)
        (bundle / name).symlink_to(bundle.parent / name)
    return bundle


def link_to_it(bundle: Path) -> Path:
    (bundle.parent / "linked").symlink_to(bundle)
    return bundle.parent / "linked"


def renamed_inside(bundle: Path) -> Path:
    (bundle / WEIGHTS).rename(bundle / "w.bin")
    (bundle / WEIGHTS).symlink_to("w.bin")
    return bundle


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
@pytest.mark.parametrize("arrange", [snapshot, small_ones_elsewhere, link_to_it, renamed_inside])
def test_bundles_that_are_links_are_drawn_with(copy: Path, arrange: Callable[[Path], Path]) -> None:
    """But for OpenVINO, which leaves no folder for its weights, and says so before a graph is opened."""
    drawn = {}
    for backend in ("onnxruntime", "openvino"):
        drawn[backend] = Pipeline.load(copy, device="cpu", backend=backend)("a red circle")[0].tobytes()
    arranged = arrange(copy)
    for backend, expected in drawn.items():
        if arrange is snapshot and backend == "openvino":
            with pytest.raises(InputError, match=r"link to .* OpenVINO does not follow; use .* or copy"):
                Pipeline.load(arranged, device="cpu", backend=backend)
            continue
        found = Pipeline.load(arranged, device="cpu", backend=backend)("a red circle")[0].tobytes()
        assert found == expected


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
def test_weights_that_lie_apart_from_their_graphs(copy: Path) -> None:
    """ONNX Runtime and OpenVINO would refuse them, in words that help nobody."""
    shutil.move(copy / WEIGHTS, copy.parent / "elsewhere.bin")
    (copy / WEIGHTS).symlink_to(copy.parent / "elsewhere.bin")
    with pytest.raises(InputError, match=r"is a link to .*elsewhere.bin, .*; copy it here"):
        open_bundle(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", '{"schema": 1}', '{"schema": "x"}'])
def test_a_broken_manifest(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest"):
        open_bundle(copy)


def test_export_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(HERE / "t2i_main", root, ignore=shutil.ignore_patterns("golden"))
    (root / "tokenizer" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError):
        export_bundle(Request(find_checkpoint(root), "fp32"), tmp_path / "engines" / "x")
    assert not (tmp_path / "engines").exists()


def test_export_does_not_overwrite(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        export_bundle(Request(find_checkpoint(HERE / "t2i_main"), "fp32"), copy)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="not a bundle"):
        export_bundle(Request(find_checkpoint(HERE / "t2i_main"), "fp32"), tmp_path / "mine", force=True)


def test_bundle_names(tmp_path: Path) -> None:
    """After the folder, or the model of the hub that it is in the cache of."""
    places = {
        "models/hart": "hart",
        "models--mit-han-lab--hart-0.7b-1024px/snapshots/e28a41": "hart-0.7b-1024px",
        "a b": "a b",
    }
    for place, name in places.items():
        for part in ("llm", "tokenizer"):
            (tmp_path / place / part).mkdir(parents=True)
            (tmp_path / place / part / "config.json").write_text("{}")
        assert find_checkpoint(tmp_path / place).name == name
        assert find_checkpoint(tmp_path / place / "llm").name == name


OPEN_FILES = Path("/proc/self/fd")


def in_a_circle(file: Path) -> None:
    file.symlink_to(file.name)


def through_two(file: Path) -> None:
    file.symlink_to(f"{file.name}-other")
    file.with_name(f"{file.name}-other").symlink_to(file.name)


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def silent(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="this system does not list open files")
@pytest.mark.parametrize("thing", [in_a_circle, endless, silent, Path.mkdir, lambda file: None])
def test_what_cannot_be_read_stays_closed(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    thing(tmp_path / "file")
    before = len([*OPEN_FILES.iterdir()])
    for _ in range(3):
        with pytest.raises(OSError, match="file"):
            read_regular(tmp_path / "file")
    assert len([*OPEN_FILES.iterdir()]) == before


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows, and it has no FIFO")
@pytest.mark.parametrize("thing", [in_a_circle, through_two, endless, silent, Path.mkdir])
@pytest.mark.parametrize(
    "name", [MANIFEST, WEIGHTS, "decoder.onnx", "tokenizer.json", "tensorrt-11-x/engines.json"]
)
def test_other_things_in_the_place_of_a_file(copy: Path, name: str, thing: Callable[[Path], None]) -> None:
    """They are refused, and not waited for: neither where a bundle is opened nor where it is looked for."""
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    thing(copy / name)
    engines = name.endswith("engines.json")
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        _ = read_engine_manifest(copy / "tensorrt-11-x") if engines else open_bundle(copy)
    owned = owned_by_bundle(copy)
    assert owned is not None
    assert owned(Path(WEIGHTS))
