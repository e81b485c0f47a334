"""What is refused before anything is downloaded, or before the gigabytes are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result

from hart_runtime.export.cli import main
from hart_runtime.export.hub import CONFIGURATIONS, WANTED
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.find import MANIFEST
from tests.golden_runs import HERE

Download = Callable[..., Result]


class Hub:
    """Delivers a copy of the demo, as far as it is asked for, and remembers what was."""

    def __init__(self, root: Path) -> None:
        self.root, self.source = root, DEMO_CHECKPOINT
        self.asked: list[list[str]] = []
        self.change: Callable[[Path], object] = lambda root: None

    def deliver(self, name: str, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        self.asked.append(allow_patterns)
        self.root.mkdir(parents=True, exist_ok=True)
        for file in self.source.rglob("*"):
            target = self.root / file.relative_to(self.source)
            if any(file.match(pattern) for pattern in allow_patterns) and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        self.change(self.root)
        return str(self.root)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "models--some--body" / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.deliver)
    monkeypatch.chdir(tmp_path)
    return made


def export(*arguments: object) -> Result:
    done = CliRunner().invoke(main, ["some/body", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    return done


def stranger(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("work")


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (None, ["--backend", "tensorrt-rtx", "--precision", "int8"], "engines are fp32 or fp16"),
        (None, ["--system-prompt", "none.txt"], "none.txt: no such file"),
        (Path.touch, ["--output", "place"], "place: is a file"),
        (Path.touch, ["--output", "place/inside"], "is no folder"),
        (stranger, ["--output", "place"], "is not a bundle"),
        (stranger, ["--output", "place", "--force"], "is not a bundle"),
    ],
)
def test_before_anything(
    hub: Hub, tmp_path: Path, made: Callable[[Path], None] | None, options: list[str], words: str
) -> None:
    if made:
        made(tmp_path / "place")
    assert words in export(*options).stderr
    assert hub.asked == []


def changed(name: str, **values: Any) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        file = root / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (changed("llm/config.json", depth=0), [], "llm/config.json: depth"),
        (changed("tokenizer/config.json", quantizer_type="var"), [], "tokenizer/config.json: quantizer_type"),
        (changed("text_encoder/config.json", hidden_size=64), [], "text_encoder"),
        (changed("sampling.json", guidance=-1), [], "sampling.json: guidance"),
        (lambda root: (root / "text_encoder/tokenizer.json").unlink(), [], "expected tokenizer.json"),
        (lambda root: None, ["--text-encoder", "/no/such/folder"], "/no/such/folder: no such folder"),
    ],
)
def test_before_the_weights(
    hub: Hub, tmp_path: Path, change: Callable[[Path], object], options: list[str], words: str
) -> None:
    hub.change = change
    assert words in export(*options).stderr
    assert hub.asked == [CONFIGURATIONS]


def test_the_place_that_a_name_leads_to(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "engines" / "body").mkdir(parents=True)
    (tmp_path / "engines" / "body" / MANIFEST).write_text("{}")
    assert "engines/body: exists and is not a bundle" in export().stderr
    assert hub.asked == [CONFIGURATIONS]


def test_then_the_weights(hub: Hub) -> None:
    hub.change = lambda root: [file.write_bytes(b"") for file in root.rglob("llm/*.safetensors")]
    assert "model.safetensors: is empty" in export("--output", "x").stderr.splitlines()[-1]
    assert hub.asked == [CONFIGURATIONS, WANTED]


@pytest.mark.parametrize("name", ["var.pth", "vae.pth", "var.safetensors"])
def test_files_that_tell_of_themselves(hub: Hub, tmp_path: Path, name: str) -> None:
    """There is no configuration beside them."""
    hub.source = tmp_path / "published"
    hub.source.mkdir()
    for file in {"var.pth", "vae.pth", name} - ({"var.pth"} if "safetensors" in name else set()):
        (hub.source / file).write_bytes(b"" if file == name else (HERE / "var_plain" / file).read_bytes())
    assert f"{name}: is empty" in export("--output", "x").stderr
    assert hub.asked == [CONFIGURATIONS, WANTED]
