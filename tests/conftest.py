"""Fixtures that are expensive to make and shared by many tests."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from filelock import FileLock

from hart_runtime import Pipeline
from hart_runtime.common.checkpoint import SAMPLING_FILE, find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.json_files import read_json
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart.demo import CLASS_DEMO, DEMO_CHECKPOINT
from hart_runtime.hart.find import VarCheckpoint, find, find_var
from hart_runtime.hart.random_weights import SHAPES
from hart_runtime.runtime.tensorrt.package import Package, import_package
from tests.checkpoint_copies import recorded
from tests.golden_runs import heads_of
from tests.imports import PACKAGE, ROOMS, ROOT
from tests.mar_models import HEADS as MAR_HEADS
from tests.mar_models import SAMPLING as MAR_SAMPLING
from tests.mar_models import SMALL as SMALL_MAR
from tests.mar_models import write_random_mar
from tests.serving import Running, guarded_serving, serving
from tests.var_models import SMALL, write_names, write_random_var

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="session", autouse=True)
def _every_module_has_one_name() -> Iterator[None]:
    """After all tests of a process: no file of ours was loaded twice, under ``hart_runtime.x`` and ``x``."""
    yield
    names: dict[str, set[str]] = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/").resolve()
        if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in (*ROOMS, "src", "tests"):
            names.setdefault(str(file), set()).add(name)
    assert {PACKAGE} in names.values()
    assert {file: found for file, found in names.items() if len(found) > 1} == {}


class ExportOnce(Protocol):
    def __call__(
        self,
        checkpoint: Path,
        precision: str,
        patch_nums: tuple[int, ...] | None = ...,
        ema: bool | None = ...,
    ) -> Path: ...


SIZES = {(DEMO_CHECKPOINT, "fp32"): (64, 48)}
"""Bundles that draw more than one size, the first of them their checkpoint's."""


def class_checkpoint(variant: Path) -> VarCheckpoint | None:
    """That of a recorded variant of VAR, whose configuration tells how many heads there are."""
    if not (variant / "var.pth").is_file():
        return None
    return find_var(variant, num_heads=heads_of(variant))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of this session see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "bundles"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def export_once(shared: Path) -> ExportOnce:
    """Export a checkpoint, or return the bundle if any worker of this session made it already."""

    def export(
        checkpoint: Path, precision: str, patch_nums: tuple[int, ...] | None = None, ema: bool | None = None
    ) -> Path:
        variant = "" if patch_nums is None else "-" + ".".join(map(str, patch_nums))
        weights = "-not-averaged" if ema is False else ""
        place = hashlib.sha256(bytes(checkpoint.resolve())).hexdigest()[:8]  # its name may be another's
        output = shared / f"{checkpoint.resolve().name}-{place}-{precision}{variant}{weights}"
        with FileLock(shared / f"{output.name}.lock"):
            if not output.exists():
                found = class_checkpoint(checkpoint) or find_checkpoint(checkpoint, ema=ema)
                sizes = SIZES.get((checkpoint, precision), ())
                export_bundle(Request(found, precision, patch_nums=patch_nums, sizes=sizes), output)
        return output

    return export


@pytest.fixture(scope="session")
def var_model(shared: Path) -> Path:
    """A small random checkpoint of VAR, in a folder with a file of its classes' names."""
    root = shared / "classes"
    with FileLock(shared / "classes.lock"):
        if not root.exists():
            root.mkdir()
            write_names(root)
            write_random_var(SMALL, root / "var")
    return root / "var"


@pytest.fixture(scope="session")
def var_bundle(shared: Path, var_model: Path) -> Path:
    """Exported in float32, with names of its classes."""
    root = var_model.parent
    with FileLock(shared / "small.lock"):
        if not (root / "small").exists():
            request = Request(find(var_model), "fp32", max_batch=4, class_names=root / "names.txt")
            export_bundle(request, root / "small")
    return root / "small"


@pytest.fixture(scope="session")
def mar_model(shared: Path) -> Path:
    """A small random checkpoint of MAR, with settings without the noisiest denoising step."""
    root = shared / "masked"
    with FileLock(shared / "masked.lock"):
        if not root.exists():
            write_random_mar(SMALL_MAR, root / "mar_small")
            (root / "mar_small" / SAMPLING_FILE).write_text(json.dumps(MAR_SAMPLING))
    return root / "mar_small"


@pytest.fixture(scope="session")
def mar_in(shared: Path, mar_model: Path) -> Callable[[str], Path]:
    """Its bundle in a precision."""

    def export(precision: str) -> Path:
        output = shared / f"masked-{precision}"
        with FileLock(shared / f"{output.name}.lock"):
            if not output.exists():
                heads = ",".join(map(str, MAR_HEADS))
                export_bundle(Request(find(mar_model, heads=heads), precision, max_batch=4), output)
        return output

    return export


@pytest.fixture(scope="session")
def mar_bundle(mar_in: Callable[[str], Path]) -> Path:
    """Exported in float32."""
    return mar_in("fp32")


@pytest.fixture(scope="session")
def class_bundle(export_once: ExportOnce) -> Path:
    """The demo of classes: HART's residual behind VAR's blocks."""
    return export_once(CLASS_DEMO, "fp32")


@pytest.fixture(scope="session")
def demo_bundle(export_once: ExportOnce) -> Path:
    return export_once(DEMO_CHECKPOINT, "fp16")


@pytest.fixture(scope="session")
def sized_bundle(export_once: ExportOnce) -> Path:
    """The demo in two sizes."""
    return export_once(DEMO_CHECKPOINT, "fp32")


@pytest.fixture(scope="session")
def demo(demo_bundle: Path) -> Pipeline:
    return Pipeline.load(demo_bundle, device="cpu")


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[Running]:
    """hart-serve with the demo, for the tests of one file."""
    with serving("--engine", demo_bundle, "--threads", 1, "--queue", 20) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    """OpenAI's, of that server."""
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def guarded(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """:func:`tests.serving.guarded_serving` with the demo, for the tests of one file."""
    with guarded_serving(demo_bundle, tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(scope="session")
def shield(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safety model, see :func:`tests.shield.write_shield`."""
    pytest.importorskip("transformers", reason="part of the safety extra")
    from tests.shield import write_shield

    folder = tmp_path_factory.mktemp("shield")
    write_shield(folder)
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The configuration files of the full-size model."""
    shape = read_json(SHAPES / "hart-0.7b-1024px.json")
    for part in ("llm", "tokenizer"):
        (tmp_path / "full" / part).mkdir(parents=True)
        (tmp_path / "full" / part / "config.json").write_text(json.dumps(shape[part]))
    return tmp_path / "full"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint to change: :func:`tests.checkpoint_copies.recorded`."""
    return recorded(tmp_path)


@pytest.fixture(scope="session")
def rtx() -> Package:
    try:
        return import_package("tensorrt-rtx")
    except InputError as error:
        if sys.platform == "linux" and os.uname().machine == "x86_64":
            raise  # the development extra installs it there
        pytest.skip(str(error))
