"""The commands: what they write, what they refuse, and how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hart_runtime.export.cli import main as export_main
from hart_runtime.runtime.cli import main as run_main
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.manifest import SCHEMA_VERSION
from tests.conftest import ExportOnce
from tests.golden_runs import HERE
from tests.test_bundle import poisoned

PROMPT = "a red circle on a white background"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_main, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one sentence on stderr that names the matter, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(("error: ", "Usage: "))
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def test_draw_and_draw_again(demo_bundle: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    done = run("--engine", demo_bundle, PROMPT, "--seed", 5, "--guidance", 2.5, "--output", first)
    assert done.exit_code == 0, done.output
    assert "decoder" in done.output
    assert str(first) in done.output
    carried = json.loads(Image.open(first).info["hart"])
    assert (carried["prompt"], carried["seed"]) == (PROMPT, 5)
    assert carried["settings"]["guidance"] == 2.5
    assert run("--engine", demo_bundle, "--from-image", first, "--output", again).exit_code == 0
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.png", "first.png"]


def test_several_pictures_and_json(demo_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n", encoding="utf-8")
    output = tmp_path / "x.png"
    done = run(
        "--engine", demo_bundle, "--prompts-file", prompts, "--num-images", 2, "--output", output, "--json"
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert [Path(i["path"]).name for i in summary["images"]] == [f"x-{i}.png" for i in range(4)]
    assert [i["seed"] for i in summary["images"]] == [0, 1, 0, 1]
    assert all(Path(i["path"]).is_file() for i in summary["images"])
    assert summary["seconds"]["decoder"] > 0


def test_a_prompt_over_the_limit_is_cut_with_a_warning(demo_bundle: Path, tmp_path: Path) -> None:
    prompt = PROMPT + " and then a lot of words that do not fit at all"
    code = "from hart_runtime.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, "--engine", str(demo_bundle), prompt, "--output", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning: the prompt is over 16 tokens, cut off: '" in done.stderr
    assert "fit at all" in done.stderr


def test_bad_input_writes_nothing(demo_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "x.png"
    output.parent.mkdir()
    to = ("--output", output)
    refused(run("--engine", tmp_path / "none", PROMPT, *to), "no bundle here", "hart-export")
    refused(run("--engine", demo_bundle, *to), "no prompt")
    refused(run("--engine", demo_bundle, " ", *to), "prompt 1 is empty")
    refused(run("--engine", demo_bundle, PROMPT, "--top-k", 0, *to), "--top-k")
    refused(run("--engine", demo_bundle, PROMPT, "--batch", 99, *to), "--batch", "99")
    refused(run("--engine", demo_bundle, PROMPT, "--num-images", 0, *to), "--num-images")
    refused(run("--engine", demo_bundle, PROMPT, "--seed", "x", *to), "--seed")
    refused(run("--engine", demo_bundle, PROMPT, "--steps", 1, *to), "steps")
    refused(run("--engine", demo_bundle, "--prompts-file", tmp_path / "none.txt", *to), "none.txt")
    refused(run("--engine", demo_bundle, PROMPT, "--output", tmp_path / "x.jpg"), ".png")
    refused(run("--engine", demo_bundle, PROMPT, "--output", tmp_path / "no" / "x.png"), "does not exist")
    assert list(output.parent.iterdir()) == []


def test_a_damaged_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (folder / "decoder.onnx").write_bytes(b"nonsense")
    refused(run("--engine", folder, PROMPT, "--output", tmp_path / "x.png"), "decoder.onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    for step, word in ((1, "newer"), (-1, "older")):
        (folder / MANIFEST).write_text(json.dumps({**manifest, "schema": SCHEMA_VERSION + step}))
        refused(run("--engine", folder, PROMPT, "--output", tmp_path / "x.png"), word, "export the bundle")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(demo_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    refused(run("--engine", demo_bundle, PROMPT, "--output", folder / "x.png"), "not writable")


def test_from_image_refuses_what_it_cannot_repeat(demo_bundle: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.png"
    Image.new("RGB", (4, 4)).save(strange)
    refused(run("--engine", demo_bundle, "--from-image", strange), "carries no prompt")
    (tmp_path / "text.png").write_text("not a picture")
    refused(run("--engine", demo_bundle, "--from-image", tmp_path / "text.png"), "not a readable picture")
    good = tmp_path / "good.png"
    assert run("--engine", demo_bundle, PROMPT, "--output", good).exit_code == 0
    refused(run("--engine", demo_bundle, PROMPT, "--from-image", good), "its own prompt")
    refused(run("--engine", demo_bundle, "--from-image", good, "--seed", 3), "--seed")
    other = Path(shutil.copytree(demo_bundle, tmp_path / "other"))
    manifest = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps({**manifest, "name": "other"}))
    refused(run("--engine", other, "--from-image", good), "was drawn with bundle")
    (other / MANIFEST).write_text(json.dumps({**manifest, "noise": 1}))
    refused(run("--engine", other, PROMPT), "noise: expected 2, found 1", "export the bundle again")
    record = json.loads(Image.open(good).info["hart"])
    for words, change in (("version 3", {"noise_version": 3}), ("version 1", {})):
        del record["noise_version"]
        info = PngInfo()
        info.add_itxt("hart", json.dumps({**record, **change}))
        record["noise_version"] = 1
        Image.new("RGB", (4, 4)).save(strange, pnginfo=info)
        refused(run("--engine", demo_bundle, "--from-image", strange), words, "the hart-runtime that drew it")


def test_a_failed_run_ends_with_one(demo_bundle: Path, tmp_path: Path) -> None:
    folder = poisoned(demo_bundle, tmp_path, float("nan"))
    done = run("--engine", folder, PROMPT, "--output", tmp_path / "x.png")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: scale or residual: the latent holds NaN")
    assert not (tmp_path / "x.png").exists()


def test_a_bundle_without_text_encoder(export_once: ExportOnce, tmp_path: Path) -> None:
    bundle = export_once(HERE / "t2i_main", "fp32")
    refused(run("--engine", bundle, PROMPT, "--output", tmp_path / "x.png"), "no text encoder")


def test_what_is_drawn_is_kept(demo_bundle: Path, tmp_path: Path) -> None:
    code = "from hart_runtime.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, "--engine", demo_bundle, PROMPT]
    output = tmp_path / "x.png"
    options = ["--num-images", 500, "--batch", 1, "--output", output]
    with subprocess.Popen([str(a) for a in (*command, *options)], stderr=subprocess.PIPE) as process:
        while not (tmp_path / "x-1.png").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.terminate()  # as Ctrl-C, which a shell may have had ignored
        _, stderr = process.communicate()
    assert process.returncode == 143
    found = re.search(r"(\d+) of 500 pictures are drawn and kept, the last of them (.+)", stderr.decode())
    assert found, stderr
    drawn, last = int(found[1]), Path(found[2])
    assert last == tmp_path / f"x-{drawn - 1}.png"
    assert drawn >= 2
    assert {f"x-{i}.png" for i in range(drawn)} <= {file.name for file in tmp_path.iterdir()}
    assert run("--engine", demo_bundle, "--from-image", last, "--output", output).exit_code == 0
    assert output.read_bytes() == last.read_bytes()


def test_help_imports_nothing_heavy() -> None:
    """The reason that ``hart-run --help`` answers at once."""
    script = (
        "import sys; from hart_runtime.runtime.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnxruntime', 'tokenizers', 'PIL', 'torch', 'rich'} & set(sys.modules)\n"
        "print(len([m for m in sys.modules if m.startswith('hart_runtime')]))\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *_, ours, heavy = done.stdout.splitlines()
    assert heavy == "heavy: []"
    assert int(ours) <= 16  # every module is a file to find and read


def test_export_refuses_with_a_sentence(tmp_path: Path, demo_bundle: Path) -> None:
    def export(*arguments: object) -> Result:
        return CliRunner().invoke(export_main, [str(a) for a in arguments])

    refused(export(tmp_path / "none", "--output", tmp_path / "x"), "no such folder")
    refused(export(tmp_path, "--output", tmp_path / "x"), "not a HART checkpoint")
    refused(
        export("--output", demo_bundle, "--precision", "int8"), "exists already", "fp16", "int8", "--force"
    )
    refused(export("--precision", "int3"), "int3")
    assert not (tmp_path / "x").exists()


def test_hub_ids_are_looked_up_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download code, on a hub cache laid out as huggingface_hub lays it out."""
    from huggingface_hub import constants

    from hart_runtime.export import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(CliRunner().invoke(export_main, ["nobody/nothing"]), "nobody/nothing", "hub")
    repository = tmp_path / "models--somebody--hart"
    snapshot = repository / "snapshots" / ("a" * 40)
    (snapshot / "llm").mkdir(parents=True)
    (snapshot / "llm" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (hub.resolve("somebody/hart") / "llm" / "config.json").is_file()


def test_revisions_and_the_hubs_cache(tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads its environment once."""
    repository = tmp_path / "models--somebody--hart"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for branch, commit in (("main", "a" * 40), ("older", "b" * 40)):
        (repository / "refs" / branch).write_text(commit)
        (repository / "blobs" / commit).write_text("{}")
        for part in ("llm", "tokenizer"):
            folder = repository / "snapshots" / commit / part
            folder.mkdir(parents=True)
            (folder / "config.json").symlink_to(repository / "blobs" / commit)
    script = (
        "from hart_runtime.common.checkpoint import find_checkpoint\n"
        "from hart_runtime.export.hub import resolve\n"
        "for given in [('somebody/hart',), ('somebody/hart', 'older'), ('somebody/hart@older',)]:\n"
        "    found = find_checkpoint(resolve(*given) / 'llm')\n"
        "    print(found.source, found.tokenizer.folder.name)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    older = f"somebody/hart@{'b' * 40} tokenizer"
    assert done.stdout.splitlines() == [f"somebody/hart@{'a' * 40} tokenizer", older, older]


def test_what_a_revision_can_be_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def export(*arguments: object) -> Result:
        return CliRunner().invoke(export_main, [str(a) for a in arguments])

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(export("--revision", "main"), "demo checkpoint")
    refused(export(tmp_path, "--revision", "main"), "--revision main", "is a folder")
    refused(export("some/body@main", "--revision", "v2"), "names a revision already")
    refused(export("some/body", "--revision", "v2"), "HF_HUB_OFFLINE", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
