"""hart-export --check: what headers tell, of folders here and of a hub that is on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from hart_runtime.export.cli import main
from hart_runtime.hart.demo import CLASS_DEMO, DEMO_CHECKPOINT
from tests.golden_runs import HERE
from tests.hub_server import COMMIT, Hub

WEIGHTS = "llm/model.safetensors"


def check(*words: object) -> tuple[Result, dict[str, Any]]:
    """What the command says, and its report."""
    report = Path("report.json")
    report.unlink(missing_ok=True)
    done = CliRunner().invoke(main, ["--check", "--report", str(report), *map(str, words)])
    return done, json.loads(report.read_text()) if report.exists() else {}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The demo, in the layout of a snapshot in the hub's cache."""
    return shutil.copytree(DEMO_CHECKPOINT, tmp_path / "models--some--body" / "snapshots" / COMMIT)


def test_the_demo_fits(copy: Path) -> None:
    done, found = check(copy)
    assert done.exit_code == 0, done.output
    assert found["problems"] == []
    tensors = load_file(copy / WEIGHTS)
    llm = found["networks"]["llm"]
    assert llm["files"] == {"model.safetensors": (copy / WEIGHTS).stat().st_size}
    assert llm["tensors"] == len(tensors)
    assert llm["numbers"] == sum(tensor.numel() for tensor in tensors.values())
    config = json.loads((copy / "llm" / "config.json").read_text())
    assert found["pyramid"] == config["patch_nums"]
    assert found["system_prompt"] == "none"
    assert {*found["exports"]} >= {"fp32", "fp16", "int8"}
    assert found["exports"]["fp32"]["bytes"] > found["exports"]["fp16"]["bytes"]
    assert "family: hart, scales [1, 2, " in done.output
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["models--some--body", "report.json"]


def test_a_report_has_no_word_of_whose_it_is(copy: Path) -> None:
    """Also where something is wrong, of which messages name the file."""
    (copy / "tokenizer" / "model.safetensors").write_bytes(b"")
    done, found = check(copy)
    assert done.exit_code == 2
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith("tokenizer/model.safetensors: is empty")
    text = json.dumps(found)
    assert str(copy) not in text
    assert not any(part in text for part in copy.parts[1:-3])


def test_every_tensor_that_does_not_fit_is_listed(copy: Path) -> None:
    """A message names the first, a report all of them; and the other networks are looked at all the same."""
    tensors = load_file(copy / WEIGHTS)
    gone = sorted(name for name in tensors if name.startswith("blocks.0."))
    assert len(gone) > 5
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    kept["word_embed.weight"] = torch.zeros(3, 3)
    save_file({**kept, "stranger": torch.zeros(2)}, copy / WEIGHTS)
    done, found = check(copy)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].endswith("would not be exported as it is, for 1 reasons above")
    llm = found["networks"]["llm"]
    unused = [name for name in gone if name.endswith("zero_k_bias")]
    assert llm["missing"] == [name for name in gone if name not in unused]
    assert llm["unexpected"] == ["stranger"]
    assert llm["shape"][0].startswith("word_embed.weight [3, 3] instead of ")
    assert "missing" not in found["networks"]["tokenizer"]
    assert found["exports"] == {}


def test_the_stored_pyramid_is_read_beside_the_configured_one() -> None:
    """Of a recording of the published code, which stores its tables; then with another configuration."""
    root = shutil.copytree(HERE / "t2i_main", Path("published"), ignore=shutil.ignore_patterns("golden"))
    done, found = check(root)
    assert found["stored_pyramid"] == found["pyramid"], done.output
    assert found["stored_context"] == found["context"]
    file = root / "llm" / "config.json"
    values = json.loads(file.read_text())
    stored = found["stored_pyramid"]
    file.write_text(json.dumps({**values, "patch_nums": [1, *values["patch_nums"][2:]]}))
    done, found = check(root)
    assert done.exit_code == 2
    assert found["stored_pyramid"] == stored
    assert found["pyramid"] != stored
    assert f"scales by the table in the weights: {stored} behind" in done.output


def test_classes_have_no_context() -> None:
    done, found = check(CLASS_DEMO)
    assert done.exit_code == 0, done.output
    assert found["context"] is None
    assert found["system_prompt"] is None
    assert "text_encoder" not in found["networks"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such folder, and not a hub id"),
        (["."], ".: not a HART checkpoint, expected "),
        ([DEMO_CHECKPOINT, "--report", "no/where.json"], "the folder "),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(words: list[object], said: str) -> None:
    done, found = check(*words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert found == {}


def test_a_report_is_of_a_check() -> None:
    done = CliRunner().invoke(main, [str(DEMO_CHECKPOINT), "--report", "x.json"])
    assert done.exit_code == 2
    assert done.stderr == "error: --report x.json: is of --check, which is not given\n"


@pytest.fixture
def hub(copy: Path) -> Iterator[Hub]:
    with Hub(copy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def from_hub(hub: Hub, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read where its library is imported."""
    home = {"HF_ENDPOINT": hub.address, "HF_HOME": str(Path("hub").absolute()), "HF_HUB_OFFLINE": "0"}
    script = "from hart_runtime.export.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, "--check", "--report", "report.json", *words],
        env={**os.environ, **home, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_of_the_hub_headers_are_read_and_nothing_else(hub: Hub, copy: Path) -> None:
    """The report is that of the folder; a pickled file is named, and neither it nor a number is fetched."""
    _, here = check(copy)
    torch.save({"x": torch.zeros(3)}, copy / "llm" / "ema_model.bin")
    done = from_hub(hub, "some/body")
    assert done.returncode == 0, done.stderr
    found = json.loads(Path("report.json").read_text())
    (note,) = found.pop("notes")
    assert note.startswith("llm/ema_model.bin: 0.0 MB, pickled")
    assert {**here, "notes": [note]} == {**found, "notes": [note]}
    assert hub.sent["llm/ema_model.bin"] == 0
    for name in ("llm", "tokenizer", "text_encoder"):
        file = copy / name / "model.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert 8 + header <= hub.sent[f"{name}/model.safetensors"] < file.stat().st_size / 2


def test_of_a_hub_without_ranges_it_is_said(hub: Hub) -> None:
    hub.ranges = False
    done = from_hub(hub, "some/body")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "error: some/body: llm/model.safetensors: its server gives whole files and no ranges"
    )


@pytest.mark.parametrize(("name", "gated"), [("some/body", True), ("no/body", False)])
def test_what_the_hub_does_not_show_is_one_sentence(hub: Hub, name: str, gated: bool) -> None:
    hub.gated = gated
    done = from_hub(hub, name)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {name}: no such folder here, and the hub does not show it (")
    assert "`hf auth login`" in line
    assert not Path("report.json").exists()
