"""The wheel, as somebody gets it who has no clone: in an empty environment, beside another ``hart``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hart_runtime.serve.security import PAGE
from tests.imports import PACKAGE, ROOT, sources
from tests.release.build import build

pytestmark = pytest.mark.release

PROMPT = "a red circle on a white background"
SCRIPT = f"""
from hart_runtime import InputError, Pipeline, Scale, SamplingSettings

def told(scale: Scale) -> None:
    print(scale.index)

pipeline = Pipeline.load(BUNDLE, device="cpu")
images = pipeline("{PROMPT}", seed=3, guidance=2.5, steps=4, callback=told)
settings: SamplingSettings = pipeline.generate("{PROMPT}", top_k=5).settings
images[0].save("scripted.png")
try:
    pipeline("{PROMPT}", top_k=0)
except InputError as error:
    print(error)
"""


def call(command: list[object], folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built twice, from two clean clones: equal bytes."""
    folder = tmp_path_factory.mktemp("wheels")
    one, two = (build(folder / name, "--no-isolation") for name in ("one", "two"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    with tarfile.open(one[0]) as source:
        members = source.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    assert not [member.name for member in members if "/tests/" in member.name]
    return one[1]


def test_one_package_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {PACKAGE}
    modules = {name.replace("/", ".").removesuffix(".py").removesuffix(".__init__") for name in names}
    assert set(sources()) <= modules
    assert f"{PACKAGE}/py.typed" in names
    for weights in ("checkpoint/llm/model", "classes/tokenizer/model", "classes/var/var_d4"):
        assert f"{PACKAGE}/hart/demo/{weights}.safetensors" in names
    assert f"{PACKAGE}/hart/shapes/mid-256px.json" in names
    assert {f"{PACKAGE}/serve/page/{file}" for file, _ in PAGE.values()} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "/tests/" in name or name.endswith((".onnx", ".pyc"))]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment outside the tree: the wheel, and the published code's ``hart`` beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    call([python, "-m", "pip", "install", "--quiet", wheel], folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "hart" / "modules").mkdir(parents=True)  # no __init__.py, as published
    (site / "hart" / "utils.py").write_text("NAME = 'not ours'\n")
    (site / "hart" / "modules" / "models.py").write_text("from hart.utils import NAME\n")
    return folder


def test_from_nothing_to_a_picture(installed: Path, demo_bundle: Path) -> None:
    """Bare first: one sentence, whose command works; then a picture, and the other ``hart`` still imports."""
    bin_ = installed / "venv" / "bin"
    (site,) = (installed / "venv" / "lib").glob("python*/site-packages")
    ours = {p.name for p in site.iterdir()} & {
        "hart_runtime",
        "export",
        "runtime",
        "bench",
        "compare",
        "common",
    }
    assert ours == {"hart_runtime"}
    run = [bin_ / "hart-run", "--engine", demo_bundle, PROMPT, "--seed", 5]
    refused = call(run, installed, 2)
    (line,) = refused.stderr.strip().splitlines()
    found = re.match(r"error: no inference library is installed: for the CPU (.+?), for an NVIDIA GPU ", line)
    assert found, line
    assert f"{bin_ / 'python'} -m pip install 'hart-runtime[cpu]'" == found[1]
    call(["bash", "-c", found[1]], installed)
    call(run, installed)
    assert Image.open(installed / "out.png").size == (64, 64)
    assert not (site / "torch").exists()
    code = "from hart.modules.models import NAME; from hart.utils import NAME as again; print(NAME, again)"
    assert call([bin_ / "python", "-c", code], installed).stdout == "not ours not ours\n"
    needs = call([bin_ / "hart-export"], installed, 2).stderr
    assert "hart-export needs torch, onnx" in needs
    assert needs.strip().endswith("install 'hart-runtime[export]'")
    version = call([bin_ / "hart-run", "--version"], installed).stdout.split()[-1]
    assert version in call([bin_ / "python", "-m", "pip", "show", "hart-runtime"], installed).stdout

    for name in ("hart", "runtime", "export", "common"):  # scripts that are called as our folders are
        (installed / f"{name}.py").write_text(SCRIPT.replace("BUNDLE", repr(str(demo_bundle))))
    done = call([bin_ / "python", "hart.py"], installed)
    assert done.stdout.splitlines()[-1] == "`top_k`: expected 1 to 512, found 0"
    assert Image.open(installed / "scripted.png").size == (64, 64)


def test_what_the_image_runs(wheel: Path, demo_bundle: Path, tmp_path: Path) -> None:
    """The commands of deploy/Dockerfile but for the user's account, where no container is."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    (extras,), (install,) = (
        re.findall(line, text, re.MULTILINE)
        for line in (r"^ARG EXTRAS=(\S+)$", r"^RUN (pip install .+?) && ")
    )
    assert "\nCOPY dist/*.whl /wheels/\n" in text
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    shell = ["env", f"EXTRAS={extras}", f"PATH={bin_}:{os.environ['PATH']}", "sh", "-ec"]
    call([*shell, install.replace("/wheels", str(wheel.parent))], tmp_path)
    assert "hart-serve" in call([*shell, "hart-serve --help"], tmp_path).stdout
    run = "serve run hart_runtime.serve.ray:build engine=nowhere"
    assert f"Error: {tmp_path}/nowhere: no bundle here" in call([*shell, run], tmp_path, 2).stderr
    (tmp_path / "prompts.txt").write_text(PROMPT)
    call([*shell, f"hart-batch prompts.txt --engine {demo_bundle} --output out --ray local"], tmp_path)
    assert len([*(tmp_path / "out").glob("pictures/*/*.png")]) == 1


def test_a_type_checker_sees_the_options(installed: Path) -> None:
    folder = installed / "typed"
    folder.mkdir()
    (folder / "good.py").write_text(SCRIPT.replace("BUNDLE", "'engines'"))
    (folder / "bad.py").write_text(
        "from hart_runtime import Pipeline\n"
        "pipeline = Pipeline.load('engines')\n"
        "pipeline('x', guidance_scale=3.0)\n"
        "pipeline('x', steps=[1])\n"
        "reveal_type(pipeline('x', top_k=3))\n"
    )
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    check += [str(installed / "venv" / "bin" / "python"), "--cache-dir", str(folder / "cache")]
    call([*check, "good.py"], folder)
    said = call([*check, "bad.py"], folder, 1).stdout
    assert 'bad.py:3: error: Unexpected keyword argument "guidance_scale"' in said
    assert "bad.py:4: error: " in said
    assert 'bad.py:5: note: Revealed type is "list[PIL.Image.Image]"' in said


def test_the_clone_is_not_what_was_tested(installed: Path) -> None:
    code = "import hart_runtime, hart_runtime.runtime.loop as l; print(hart_runtime.__file__, l.__file__)"
    said = call([installed / "venv" / "bin" / "python", "-c", code], installed).stdout
    assert str(ROOT) not in said
    assert said.count(str(installed)) == 2
