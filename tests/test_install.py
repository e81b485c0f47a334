"""What pip is told to install, and what is said where something is missing or there twice."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner
from setuptools.config.pyprojecttoml import load_file  # type: ignore[import-untyped]

from hart_runtime.common import install
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.backends.names import MODULES
from hart_runtime.runtime.cli import main as run_main
from hart_runtime.runtime.tensorrt.package import OLDEST
from tests.imports import PACKAGE, ROOT, imported, sources

PROMPT = "a red circle on a white background"


def requirements() -> list[str]:
    return importlib.metadata.requires("hart-runtime") or []


def of(extra: str) -> list[str]:
    return [r.partition(";")[0].strip() for r in requirements() if f'extra == "{extra}"' in r]


def test_the_bare_package_runs_nothing() -> None:
    bare = [re.match(r"[\w-]+", r) for r in requirements() if "extra ==" not in r]
    names = {found[0] for found in bare if found}
    assert names == {"click", "numpy", "pillow", "platformdirs", "rich", "tokenizers"}


def test_extras_are_those_that_people_know() -> None:
    extras = set(importlib.metadata.metadata("hart-runtime").get_all("Provides-Extra") or [])
    runs = {"cpu", "cuda", "openvino", "tensorrt", "tensorrt-rtx"}
    assert extras == {*runs, "batch", "bench", "compare", "dev", "export", "fid", "ray", "safety", "serve"}
    assert [r.partition(">")[0] for r in of("cpu")] == ["onnxruntime"]
    assert sorted(r.partition(">")[0] for r in of("cuda")) == ["cuda-bindings", "onnxruntime-gpu[cuda,cudnn]"]
    assert sorted(r.partition(">")[0] for r in of("tensorrt")) == ["cuda-bindings", "tensorrt"]
    assert sorted(r.partition(">")[0] for r in of("tensorrt-rtx")) == ["cuda-bindings", "tensorrt-rtx"]
    for extra in sorted(extras - runs - {"dev"}):  # ONNX Runtime's two builds exclude each other
        assert not any("onnxruntime" in r for r in of(extra))


def declared() -> dict[str, list[str]]:
    """The extras of pyproject.toml, and what the bare package needs under no name."""
    project = load_file(ROOT / "pyproject.toml")["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_tensorrt_is_asked_for_from_the_oldest_version_that_there_is_a_form_for() -> None:
    assert f"tensorrt>={'.'.join(map(str, OLDEST))}" in declared()["tensorrt"]


DISTRIBUTIONS = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "openvino": "openvino",
    "tensorrt_rtx": "tensorrt-rtx",
}
"""Of modules that are called otherwise."""
BACKENDS = {
    "cpu": {"onnxruntime"},
    "cuda": {"onnxruntime", "cuda"},
    "openvino": {"openvino"},
    **{name: {module, "cuda"} for name, module in MODULES.items()},
}
"""Modules that each backend imports beside those of the bare package."""


def test_whatever_a_backend_imports_is_in_its_extra() -> None:
    """And nothing else is imported where pictures are drawn: not onnx, not torch."""
    found = set(MODULES.values())  # by name
    for name, file in sources().items():
        if name.startswith((f"{PACKAGE}.runtime", f"{PACKAGE}.common")):
            found |= {module.partition(".")[0] for module in imported(file)}
    found -= {*sys.stdlib_module_names, PACKAGE, "typing_extensions"}  # the last for type checkers alone
    extras = declared()
    bare = {requirement_name(r) for r in extras[""]}
    needed = {module for module in found if DISTRIBUTIONS.get(module, module) not in bare}
    assert needed == set().union(*BACKENDS.values())
    for extra, modules in BACKENDS.items():
        brought = {requirement_name(r) for r in extras[extra]}
        wanted = {DISTRIBUTIONS.get(module, module) for module in modules}
        if extra == "cuda":  # never both of ONNX Runtime's builds
            wanted = wanted - {"onnxruntime"} | {"onnxruntime-gpu"}
        assert brought == wanted


def requirement_name(requirement: str) -> str:
    found = re.match(r"[\w-]+", requirement)
    assert found is not None
    return found[0]


def test_a_clone_stays_editable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.clone() == ROOT
    command = install.install("tensorrt-rtx")
    assert f" install -c {ROOT / 'constraints.txt'} -e '{ROOT}[tensorrt-rtx]'" in command
    monkeypatch.setattr(install, "clone", lambda: None)
    assert install.install("export").endswith(" install 'hart-runtime[export]'")


def test_pip_is_that_of_the_python_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install.pip() == "pip"
    monkeypatch.setenv("PATH", "/nowhere")
    assert install.pip() == f"{sys.executable} -m pip"


def test_what_is_required_is_looked_for_and_not_imported() -> None:
    before = set(sys.modules)
    install.require("this", "bench", "this_is_nowhere"[:4])  # "this": the Zen of Python
    assert "this" not in set(sys.modules) - before
    with pytest.raises(InputError) as caught:
        install.require("hart-x", "bench", "nowhere_a", "sys", "nowhere_b")
    assert (
        str(caught.value) == f"hart-x needs nowhere_a, nowhere_b; install it with: {install.install('bench')}"
    )


def run(bundle: Path, tmp_path: Path, before: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = f"{before}\nfrom hart_runtime.runtime.cli import main\nmain()"
    command: Sequence[str] = [sys.executable, "-c", script, "--engine", str(bundle), PROMPT, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)


def test_two_onnx_runtimes_are_told_of(demo_bundle: Path, tmp_path: Path) -> None:
    """By their metadata, as pip leaves it; both write the same folder."""
    found = tmp_path / "site" / "onnxruntime_gpu-9.9.9.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.9.9\n")
    done = run(demo_bundle, tmp_path, f"import sys; sys.path.append({str(found.parent)!r})")
    assert done.returncode == 0, done.stderr
    version = importlib.metadata.version("onnxruntime")
    (line,) = (line for line in done.stderr.splitlines() if "both installed" in line)
    assert line.startswith("warning: onnxruntime and onnxruntime-gpu are both installed, in one folder; ")
    assert f"what runs is {version}, without CUDA" in line
    assert "uninstall -y onnxruntime onnxruntime-gpu, then " in line
    assert line.endswith(install.install("cuda"))
    assert install.install("cpu") in line
    assert "both installed" not in run(demo_bundle, tmp_path, "").stderr


@pytest.mark.parametrize(
    "words", [("--device", "cuda"), ("--device", "cuda:1"), ("--device", "cuda", "--backend", "onnxruntime")]
)
def test_an_onnx_runtime_without_cuda_is_refused(
    demo_bundle: Path, tmp_path: Path, words: Sequence[str]
) -> None:
    """With the commands that replace it, before anything is drawn."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one has CUDA")
    output = tmp_path / "out.png"
    command = ["--engine", str(demo_bundle), *words, "a red circle", "--output", str(output)]
    done = CliRunner().invoke(run_main, command)
    assert done.exit_code == 2
    assert "--device cuda" in done.output
    assert "no CUDA provider; replace it: " in done.output
    assert "pip uninstall -y onnxruntime, then" in done.output
    assert not output.exists()


def test_what_pip_leaves_of_two_builds_is_mended(demo_bundle: Path, tmp_path: Path) -> None:
    """Removing one takes files of the other: a folder that Python imports and that holds nothing."""
    (tmp_path / "onnxruntime").mkdir()
    done = run(demo_bundle, tmp_path, MISSING % ("onnxruntime",) + PART_OF % str(tmp_path / "onnxruntime"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ONNX Runtime is installed in part; ")
    assert "uninstall -y onnxruntime, then " in done.stderr


PART_OF = """
import types
sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')
sys.modules['onnxruntime'].__path__ = [%r]
sys.modules['onnxruntime'].__spec__ = importlib.machinery.ModuleSpec('onnxruntime', None, is_package=True)
"""
MISSING = """
import sys, importlib.abc
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in %r:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize(
    ("missing", "options", "words"),
    [
        ("onnxruntime", (), ("no inference library is installed", "[cpu]", "[cuda]")),
        ("onnxruntime", ("--backend", "onnxruntime"), ("no inference library is installed",)),
        ("onnxruntime", ("--device", "cuda"), ("no inference library is installed", "[cuda]")),
        ("openvino", ("--backend", "openvino"), ("--backend openvino", "[openvino]")),
        ("tensorrt", ("--backend", "tensorrt"), ("--backend tensorrt", "[tensorrt]")),
        ("tensorrt_rtx", ("--backend", "tensorrt-rtx"), ("--backend tensorrt-rtx", "[tensorrt-rtx]")),
    ],
)
def test_a_missing_library_is_one_sentence(
    demo_bundle: Path, tmp_path: Path, missing: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = run(demo_bundle, tmp_path, MISSING % (missing,), *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for word in ("error: ", " install ", *words):
        assert word in done.stderr


NEEDED = {
    "hart.demo.class_report": [],
    "hart.demo.report": [],
    "hart.demo.train": ["--work", "x"],
    "hart.random_checkpoint": ["--shape", "mid-256px", "--output", "x"],
}
"""What README and the docs run with ``python -m`` and what needs torch, with options for a run."""


@pytest.mark.parametrize("module", [*NEEDED, "compare.rehearsal", "bench.host"])
def test_modules_that_are_run_tell_of_what_is_missing(tmp_path: Path, module: str) -> None:
    missing = ("torch", "onnx", "onnxscript", "safetensors", "matplotlib", "psutil", "onnxruntime")

    def run_module(*options: str) -> subprocess.CompletedProcess[str]:
        script = MISSING % (missing,) + (
            f"import runpy, sys\nsys.argv = ['x', *{options!r}]\n"
            f"runpy.run_module('hart_runtime.{module}', run_name='__main__')"
        )
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    helped = run_module("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("Usage: ")
    if module in NEEDED:
        done = run_module(*NEEDED[module])
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(
            f"error: hart_runtime.{module} needs torch, safetensors; install it with: "
        )
    assert list(tmp_path.iterdir()) == []
