"""VAR's two files to a bundle: found, compared with what their names say, and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from hart_runtime.common.checkpoint import CLASS_NAMES
from hart_runtime.common.errors import InputError
from hart_runtime.common.json_files import read_json
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import VAR_DEMO, SamplingSettings
from hart_runtime.compare.recorded import recording
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.cli import main as export
from hart_runtime.export.request import IMAGENET, Request, differences
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.find import find, find_var
from hart_runtime.hart.generate import generate_classes
from hart_runtime.hart.random_checkpoint import main as random_checkpoint
from hart_runtime.hart.random_weights import SHAPES
from hart_runtime.hart.var_checkpoint import load_var
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.runtime.manifest import read_manifest
from tests.var_models import NAMES, SMALL, VARIANTS, varied, write_names, write_random_var

TRANSFORMER, TOKENIZER = SMALL.files


@pytest.fixture
def var(var_model: Path) -> Path:
    return var_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        export, [str(argument) for argument in (*arguments, "--backend", "onnxruntime")]
    )


def test_a_file_or_its_folder_or_a_name_in_it(var: Path, tmp_path: Path) -> None:
    for place, options in ((var, {}), (var / TRANSFORMER, {}), (var, {"file": TRANSFORMER})):
        given = [f"--{name}={value}" for name, value in options.items()]
        done = run(place, *given, "--dry-run", "--output", tmp_path / "bundle")
        assert done.exit_code == 0, done.output
        assert "context" in done.output
        assert "text_encoder" not in done.output
        assert "residual" not in done.output
    shutil.copy(var / TRANSFORMER, tmp_path / TRANSFORMER)
    found = find_var(tmp_path / TRANSFORMER, var / TOKENIZER)
    assert found.name == "var-d2"
    assert found.source == TRANSFORMER
    assert found.llm_config == SMALL.transformer
    assert found.tokenizer_config == SMALL.tokenizer
    assert found.sampling == SamplingSettings(
        guidance=4.0, top_k=96, top_p=0.95, smooth=False, residual=False, steps="0"
    )


def test_it_is_exported_once_and_kept(var: Path, tmp_path: Path) -> None:
    target, names = tmp_path / "bundle", write_names(tmp_path)
    arguments = (var / TRANSFORMER, "--precision", "fp32", "--output", target, "--class-names", names)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert f"weights: {TRANSFORMER}, {TOKENIZER}" in done.output
    assert f"classes: {len(NAMES)}, with names" in done.output
    assert (target / CLASS_NAMES).read_text().splitlines() == NAMES
    manifest, identity = read_manifest(target)
    assert [*manifest.graphs] == [
        "context",
        "transformer",
        "fast_transformer",
        "sample",
        "smooth",
        "next_scale",
        "latent",
        "decoder",
        "encoder",
    ]
    assert manifest.model.num_classes == len(NAMES)
    assert (manifest.model.context_token, manifest.model.context_dim, manifest.model.diff_width) == (0, 0, 0)
    assert "is there already" in run(*arguments).output
    assert read_manifest(target)[1] == identity
    refused = run(*arguments[:-2])
    assert refused.exit_code == 2
    assert "other names of classes" in refused.output
    other = tmp_path / "other"
    write_random_var(SMALL, other, seed=1)
    assert differences(Request(find_var(other), "fp32", class_names=names), manifest) == ["other weights"]


@pytest.mark.parametrize("stored", ["safetensors", "half"])
def test_other_files_of_the_same_tensors(var: Path, tmp_path: Path, stored: str) -> None:
    """Safetensors, and what training tools leave: below a key, and in half."""
    for name in (TRANSFORMER, TOKENIZER):
        state = torch.load(var / name, weights_only=True)
        if stored == "half":
            low = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            torch.save(
                {"trainer": {"var_wo_ddp" if name == TRANSFORMER else "vae_local": low}}, tmp_path / name
            )
        else:
            file = (tmp_path / name).with_suffix(".safetensors")
            save_file({k: v.contiguous().clone() for k, v in state.items()}, file)
    found = find(tmp_path)
    assert found.llm_config == SMALL.transformer
    Request(found, "fp16").check()


def no_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).unlink()


def two_transformers(folder: Path) -> None:
    shutil.copy(folder / TRANSFORMER, folder / "var_d16.pth")


def two_tokenizers(folder: Path) -> None:
    (folder / TOKENIZER).rename(folder / "vae_one.pth")
    shutil.copy(folder / "vae_one.pth", folder / "vae_two.pth")


def renamed(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "var_d30.pth")


def renamed_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).rename(folder / "vae_ch160v4096z32.pth")


def swapped(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "x")
    (folder / TOKENIZER).rename(folder / TRANSFORMER)
    (folder / "x").rename(folder / TOKENIZER)


def no_transformer(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()


def more_keys(folder: Path) -> None:
    state = torch.load(folder / TRANSFORMER, weights_only=True)
    torch.save(state | {"blocks.0.ffn.fc3.weight": torch.zeros(2, 2)}, folder / TRANSFORMER)


def truncated(folder: Path) -> None:
    data = (folder / TRANSFORMER).read_bytes()
    (folder / TRANSFORMER).write_bytes(data[: len(data) // 2])


BROKEN = {
    no_tokenizer: "expected the image tokenizer vae_ch160v4096z32.pth beside it, found none; give its",
    two_transformers: "2 transformers and no rule says which: var_d16.pth, var_d2.pth; give one as --file",
    two_tokenizers: "2 image tokenizers and no rule says which: vae_one.pth, vae_two.pth; give one as",
    renamed: "var_d30.pth: its name says a depth of 30, its tensors say 2",
    renamed_tokenizer: "latent channels 160, 4096, 32, its tensors say 32, 96, 8",
    swapped: "expected a VAR transformer, which has one pos_1LC, found none",
    no_transformer: "expected a transformer such as var_d16.pth beside the image tokenizer, found none",
    more_keys: "unexpected: blocks.0.ffn.fc3.weight",
    truncated: TRANSFORMER,
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_what_is_no_checkpoint_is_told_in_a_sentence(var: Path, tmp_path: Path, change: object) -> None:
    folder = Path(shutil.copytree(var, tmp_path / "var"))
    change(folder)  # type: ignore[operator]
    for more in (["--dry-run"], []):
        done = run(folder, "--output", tmp_path / "bundle", *more)
        assert done.exit_code == 2, done.output
        assert BROKEN[change] in done.stderr  # type: ignore[index]
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text-encoder", DEMO_CHECKPOINT], "VAR draws classes and has no text encoder"),
        (["--system-prompt", "none"], "--system-prompt none: this checkpoint draws classes"),
        (["--ema"], "--ema: VAR's files hold one set of weights"),
        (["--file", "var_d16.pth"], "--file var_d16.pth: there is no such file in"),
        (["--tokenizer", "nowhere.pth"], "nowhere.pth: no such image tokenizer file"),
        (["--class-names", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_options_that_do_not_fit(var: Path, tmp_path: Path, options: list[object], words: str) -> None:
    done = run(var, "--output", tmp_path / "bundle", *options)
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokenizer", "vae.pth"], "--tokenizer vae.pth: HART's lies in tokenizer/, beside llm/"),
        (["--class-names", IMAGENET], "this checkpoint draws texts and has no classes"),
        (["--file", "var_d16.pth"], "there is no such file in"),
    ],
)
def test_options_that_are_not_for_hart(tmp_path: Path, options: list[object], words: str) -> None:
    done = run(DEMO_CHECKPOINT, "--output", tmp_path / "bundle", *options)
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (NAMES[:-1], f"expected a line for each of {len(NAMES)} classes, found {len(NAMES) - 1}"),
        ([*NAMES[:-1], ""], "found 6"),
        (["", *NAMES[1:]], "line 1: expected a name, found ''"),
        (["none", *NAMES[1:]], "line 1: expected a name, found 'none'"),
        (["3", *NAMES[1:]], "line 1: 3 is the number of another class"),
        ([*NAMES[:2], "a\tcat", *NAMES[3:]], "line 3: expected a name"),
    ],
)
def test_names_that_cannot_stand_for_classes(var: Path, tmp_path: Path, lines: list[str], words: str) -> None:
    file = tmp_path / "names.txt"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=words):
        Request(find(var), "fp32", class_names=file).check()


def test_imagenet_has_a_name_for_each_class() -> None:
    names = IMAGENET.read_text(encoding="utf-8").splitlines()
    assert (len(names), names[207], names[999]) == (1000, "golden retriever", "toilet tissue")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("smooth", [False, True])
def test_graphs_follow_the_reference(
    variant: str, smooth: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Forms of checkpoints that no recording covers."""
    shape, root = VARIANTS[variant], tmp_path_factory.getbasetemp() / variant.replace(" ", "-")
    heads = shape.transformer.num_heads
    if not root.exists():
        write_random_var(shape, root / "model")
        export_bundle(Request(find_var(root / "model", num_heads=heads), "fp32"), root / "bundle")
    bundle, checkpoint = open_bundle(root / "bundle"), find_var(root / "model", num_heads=heads)
    model = load_var(checkpoint.transformer_file, checkpoint.tokenizer_file, num_heads=heads)
    labels = np.array([1, shape.transformer.num_classes], np.int64)  # the second is none
    settings = SamplingSettings(guidance=2.0, top_k=25, top_p=0.9, smooth=smooth, residual=False)
    expected: dict[str, np.ndarray] = {}
    image = generate_classes(
        model,
        torch.from_numpy(labels),
        SeededNoise([1, 2]),
        settings,
        record=lambda name, value: expected.__setitem__(name, value.numpy().copy()),
    )
    recorder, found = recording(on_the_cpu(bundle), bundle.manifest)
    program = bundle.manifest.program(settings, 2)
    drawing = drawn(draw(recorder, program, {"label": labels}, SeededNoise([1, 2])))
    for k in range(len(shape.transformer.patch_nums)):
        name = f"scale{k}.idx"
        assert np.array_equal(found[name].reshape(expected[name].shape), expected[name]), name
    # Smooth sampling divides by a small temperature, as in the recorded runs.
    assert np.abs(drawing.images - image.numpy()).max() < (1e-2 if smooth else 2e-3)


@pytest.mark.parametrize("shape", ["var-d16-256px", "var-d36-512px"])
def test_published_sizes(shape: str) -> None:
    values = read_json(SHAPES / f"{shape}.json")["transformer"]
    depth = values["depth"]
    sizes = (values["embed_dim"], values["num_heads"], values["mlp_hidden"], values["num_classes"])
    assert sizes == (64 * depth, depth, 256 * depth, 1000)


def test_a_random_checkpoint_by_command(tmp_path: Path) -> None:
    file = tmp_path / "shape.json"
    shape = varied(depth=1)
    values = {
        "transformer": vars(shape.transformer),
        "tokenizer": {"vocab_size": 96, "ch": 32, "ch_mult": [1]},
    }
    file.write_text(__import__("json").dumps(values))
    done = CliRunner().invoke(random_checkpoint, ["--shape", str(file), "--output", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["vae_ch32v96z32.pth", "var_d1.pth"]
    assert find(tmp_path / "made").llm_config == shape.transformer
    assert VAR_DEMO.top_k == 900
    assert not (tmp_path / "made" / MANIFEST).exists()
