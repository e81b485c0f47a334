"""What --dry-run says is what an export makes, and it reads no weights for it."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.precisions import FP32
from hart_runtime.export import dry_run
from hart_runtime.export.cli import main
from hart_runtime.export.dry_run import forecast
from hart_runtime.export.request import Request
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import PAST
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.memory.forecast import DRIVER, doubled, needed, scratch_of
from hart_runtime.runtime.memory.plan import make_plan
from tests.conftest import ExportOnce


def configurations(source: Path, target: Path) -> Path:
    """A copy of a checkpoint without its weights."""
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))


def test_the_demo_as_it_is_exported(demo_bundle: Path, tmp_path: Path) -> None:
    found = forecast(Request(find_checkpoint(DEMO_CHECKPOINT), FP32))
    assert found.checked
    manifest = open_bundle(demo_bundle).manifest
    stored = manifest.files[WEIGHTS].size
    assert found.weights["fp16"].nbytes == pytest.approx(stored, rel=0.04)  # files align their tensors
    for name in ("transformer", "decoder", "residual_step", "text_encoder"):
        model = onnx.load(demo_bundle / f"{name}.onnx", load_external_data=False)
        elements = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
        assert found.graphs["fp16"][name].parameters == pytest.approx(elements, rel=0.02), name
    plan = make_plan(manifest.program(manifest.sampling, 2))
    memory = found.memory["fp16", 2]
    assert memory.cache + memory.between == plan.nbytes + plan.constant_nbytes
    assert memory.cache == sum(slot.nbytes for slot in plan.slots if slot.label.startswith(PAST))
    bare = configurations(DEMO_CHECKPOINT, tmp_path / "bare")
    assert forecast(Request(find_checkpoint(bare), FP32)).weights == found.weights


def test_the_demo_in_int8(export_once: ExportOnce) -> None:
    """Weights of text encoder and transformer are rounded in different ways, its table in a third."""
    found = forecast(Request(find_checkpoint(DEMO_CHECKPOINT), FP32))
    bundle = export_once(DEMO_CHECKPOINT, "int8")
    manifest = open_bundle(bundle).manifest
    assert found.weights["int8"].nbytes == pytest.approx(
        manifest.files[WEIGHTS].size, rel=0.07
    )  # aligned, and small
    for name in ("transformer", "text_encoder", "decoder"):
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        nbytes = sum(
            int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            for tensor in model.graph.initializer
        )
        assert found.graphs["int8"][name].nbytes == pytest.approx(nbytes, rel=0.03), name


def test_the_full_size_from_configurations_alone(full: Path) -> None:
    found = forecast(Request(find_checkpoint(full), FP32, max_batch=4))
    assert not found.checked
    assert {batch for _, batch in found.memory} == {1, 2, 4}
    assert found.graphs["fp32"]["transformer"].parameters == 679_624_704
    tokens, width, layers = 9750 - 64 * 64, 1536, 24  # nobody reads the keys of the last scale
    for batch in (1, 4):
        assert found.memory["fp32", batch].cache == 2 * layers * 2 * batch * tokens * width * 4
        for reduced in ("fp16", "int8", "fp8"):
            assert found.memory[reduced, batch].cache == 2 * layers * 2 * batch * tokens * width * 2
    assert found.memory["fp32", 4].inside > found.memory["fp32", 1].inside
    assert 1e9 < found.memory["fp32", 1].inside < 3e9  # the decoder, in strips


def test_what_a_gpu_needs(full: Path) -> None:
    """Addresses by the plan, and about the scratch that the modules have on PyTorch's meta device."""
    found = forecast(Request(find_checkpoint(full), FP32, max_batch=4))
    assert {kind for kind, _ in found.device} == {"fp32", "fp16", "fp8"}, "int8 is for CPUs"
    for (kind, batch), memory in found.device.items():
        there = found.memory[kind, batch]
        assert memory.arena + memory.constants == there.cache + there.between
        assert there.inside / 1.2 < memory.scratch < 1.2 * doubled(there.inside)
        assert memory.weights + memory.text == there.weights
        assert memory.total > memory.weights + memory.arena + memory.scratch
    assert found.device["fp16", 1].total < 7e9, "a card of 8 GB draws"


def test_the_text_encoder_is_closed_first(demo_bundle: Path) -> None:
    """Its weights are told of by themselves: what lies on the device is never both."""
    manifest = open_bundle(demo_bundle).manifest
    stored = manifest.files[WEIGHTS].size
    memory = needed(manifest, 2)
    text = forecast(Request(find_checkpoint(DEMO_CHECKPOINT), FP32)).graphs["fp16"]["text_encoder"].nbytes
    assert memory.text == pytest.approx(text, rel=0.05)
    assert memory.weights == stored - memory.text
    assert needed(manifest, 2, engines=True).scratch == max(scratch_of(manifest, 2).values())
    known = needed(manifest, 2, scratch=10**9)
    assert (known.scratch, known.measured, memory.measured) == (10**9, True, False)
    large = replace(memory, text=10**12)
    assert large.total == DRIVER + 10**12


def test_an_arena_doubles() -> None:
    mega = 1 << 20
    grown = {0: 0, 1: 1, mega: 1, mega + 1: 3, 2047 * mega: 2047, 2047 * mega + 1: 3071, 3072 * mega: 4095}
    assert {nbytes: doubled(nbytes) // mega for nbytes in grown} == grown


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments), "--dry-run"])
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_what_is_printed(full: Path, tmp_path: Path) -> None:
    text = run(full, "--output", tmp_path / "bundle", "--precision", "fp32")
    assert "from configurations alone" in text
    assert "679,624,704" in text
    on_a_gpu = [line for line in text.splitlines() if line.startswith("on a GPU in fp32, batch ")]
    assert [line.split()[6] for line in on_a_gpu] == ["1", "2", "4", "8"]
    assert text.isascii()
    assert "\x1b" not in text
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_fit(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "machine_memory", lambda: (int(16e9), int(1e9)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    text = run(full, "--output", tmp_path / "bundle", "--precision", "fp32")
    lines = [line for line in text.splitlines() if line.startswith("does not fit")]
    assert any("export needs" in line and "1.0 GB of 16.0 GB are available" in line for line in lines)
    assert any("fp32 with batch 4" in line for line in lines)
    assert not any("fp32 with batch 2" in line for line in lines)
    assert any("free on its disk" in line for line in lines)
    roomy = (int(1e15), int(1e15))
    monkeypatch.undo()
    monkeypatch.setattr(dry_run, "machine_memory", lambda: roomy)
    assert "everything fits this machine" in run(DEMO_CHECKPOINT, "--output", tmp_path / "bundle")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("part", "left"),
    [
        *((part, "nothing") for part in ("llm", "tokenizer", "text_encoder")),
        *(("llm", left) for left in (INDEX, "optimizer.bin", "training_args.bin", "ema/README.md")),
    ],
)
def test_what_was_not_looked_at_is_named(part: str, left: str, tmp_path: Path) -> None:
    """A download of configurations holds an index, too; training leaves files that hold no weights."""
    root = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint")
    (root / part / "model.safetensors").unlink()
    if left != "nothing":
        (root / part / left).parent.mkdir(exist_ok=True)
        (root / part / left).write_text('{"weight_map": {"head.bias": "model-00001-of-00001.safetensors"}}')
    assert f"of weight files, not their values; there are none of {part}" in run(root)
    refused = CliRunner().invoke(main, [str(root), "--output", str(tmp_path / "bundle")])
    assert refused.exit_code == 2, "an export needs them"
    assert str(root / part) in refused.stderr
    other = "llm" if part != "llm" else "tokenizer"
    rename = (root / other / "model.safetensors").read_bytes().replace(b".bias", b".bios", 1)
    (root / other / "model.safetensors").write_bytes(rename)
    assert CliRunner().invoke(main, [str(root), "--dry-run"]).exit_code == 2


def corrupt_numbers(file: Path) -> None:
    """Cut every weight off a safetensors file; its header and size stay."""
    raw = file.read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    with file.open("wb") as rewritten:
        rewritten.write(raw[:header])
        rewritten.truncate(len(raw))


def rename_a_key(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"word_embed.bias", b"word_embed.bios", 1))


@pytest.mark.parametrize("damage", [corrupt_numbers, rename_a_key])
def test_headers_are_looked_at_and_numbers_are_not(damage: Callable[[Path], None], tmp_path: Path) -> None:
    root = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint")
    for file in (root / "llm").glob("*.safetensors"):
        damage(file)
    done = CliRunner().invoke(main, [str(root), "--dry-run"])
    if damage is corrupt_numbers:
        assert done.exit_code == 0, done.output
        assert "headers of weight files" in done.stdout
    else:
        assert done.exit_code == 2
        assert "word_embed.bios" in done.stderr
