"""Builds a bundle next to its place and renames it when it is whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from export.graphs import build_graphs
from export.writer import WeightFile, write_graph
from hart.checkpoint import (
    SAMPLING_FILE,
    TEXT_ENCODER_FOLDER,
    find_folders,
    load_hart,
    load_text_encoder,
    weight_files,
)
from hart.config import config_to_dict, read_json
from hart.errors import InputError
from hart.model import Hart
from hart.schedule import SamplingSettings
from runtime.bundle import (
    TEXT_TOKENIZER,
    WEIGHTS,
    Manifest,
    ModelSpec,
    describe_files,
    sha256_of,
    write_manifest,
)

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
DEFAULT_MAX_BATCH = 8
Progress = Callable[[str, int, int], None]
"""Called with what happens next, its number, and how many there are."""


def export_bundle(
    checkpoint: Path,
    output: Path,
    precision: str,
    text_encoder: Path | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    force: bool = False,
    patch_nums: tuple[int, ...] | None = None,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Export a checkpoint to a bundle at ``output``.

    Args:
        checkpoint: folder in the published layout.
        precision: "fp32" or "fp16", the type of the matrix products.
        text_encoder: Qwen2 folder; by default ``text_encoder/`` inside the checkpoint. Without
            one, the bundle draws from text features only.
        patch_nums: another pyramid than the checkpoint's, for models whose weights do not
            depend on it (rotary attention with timestep level embeddings).

    Raises:
        InputError: bad checkpoint, or an output that exists (without ``force``) or cannot be
            written. Nothing is left behind in either case.
    """
    _check_output(output, force)
    model = load_hart(checkpoint, PRECISIONS[precision])
    patch_nums = _pyramid(model, patch_nums)
    text_folder = text_encoder or _own_text_encoder(checkpoint)
    text = load_text_encoder(text_folder, PRECISIONS[precision]) if text_folder else None
    config = model.transformer.config
    if text is not None and text.config.hidden_size != config.context_dim:
        raise InputError(
            f"{text_folder}: features are {text.config.hidden_size} wide, "
            f"the transformer expects {config.context_dim}"
        )
    if text_folder and not (text_folder / "tokenizer.json").is_file():
        raise InputError(f"{text_folder}: expected tokenizer.json beside the text encoder's weights")

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        builders = build_graphs(model, text, patch_nums)
        graphs = {}
        with WeightFile(partial) as weights:
            for number, build in enumerate(builders):
                progress(build.__name__, number, len(builders) + 1)
                graph = build()
                graphs[graph.name] = write_graph(graph, partial, weights)
        progress("manifest", len(builders), len(builders) + 1)
        names = [WEIGHTS, *(graph.file for graph in graphs.values())]
        if text_folder:
            shutil.copyfile(text_folder / "tokenizer.json", partial / TEXT_TOKENIZER)
            names.append(TEXT_TOKENIZER)
        manifest = Manifest(
            name=output.name,
            precision=precision,
            max_batch=max_batch,
            model=_describe_model(model, patch_nums),
            sampling=_sampling_defaults(checkpoint, model),
            graphs=graphs,
            files=describe_files(partial, names),
            checkpoint=_identity(checkpoint, text_folder, model),
            tools={p: version(p) for p in ("torch", "onnx", "onnxscript", "onnx-ir")},
        )
        write_manifest(manifest, partial)
        partial.chmod(0o755)
        _move_into_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise InputError(f"{output}: exists already; give --force to replace it, or another --output")
    if output.exists() and not (output / "manifest.json").is_file():
        raise InputError(f"{output}: exists and is not a bundle (no manifest.json), not replaced")


def _move_into_place(partial: Path, output: Path) -> None:
    """Rename, so that at no moment a half-written bundle has the final name."""
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    output.rename(old / output.name)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _pyramid(model: Hart, patch_nums: tuple[int, ...] | None) -> tuple[int, ...]:
    config = model.transformer.config
    if patch_nums is None or patch_nums == config.patch_nums:
        return config.patch_nums
    if not config.use_timestep_embed:
        raise InputError("this checkpoint stores a level table, its pyramid cannot be changed")
    if patch_nums[-1] != config.patch_nums[-1]:
        raise InputError(f"the last scale must stay {config.patch_nums[-1]}, found {patch_nums[-1]}")
    replace(config, patch_nums=patch_nums)  # checks the values
    return patch_nums


def _own_text_encoder(checkpoint: Path) -> Path | None:
    llm, _ = find_folders(checkpoint)
    folder = llm.resolve().parent / TEXT_ENCODER_FOLDER
    return folder if folder.is_dir() else None


def _describe_model(model: Hart, patch_nums: tuple[int, ...]) -> ModelSpec:
    config, tokenizer = model.transformer.config, model.tokenizer.config
    return ModelSpec(
        patch_nums=patch_nums,
        depth=config.depth,
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.z_channels,
        num_phi=tokenizer.num_phi,
        image_size=patch_nums[-1] * tokenizer.downsample,
        context_token=config.context_token,
        context_dim=config.context_dim,
    )


def _sampling_defaults(checkpoint: Path, model: Hart) -> SamplingSettings:
    """The published defaults, overridden by the checkpoint's own ``sampling.json``."""
    llm, _ = find_folders(checkpoint)
    steps = model.transformer.config.num_sampling_steps
    file = llm.resolve().parent / SAMPLING_FILE
    if not file.is_file():
        return SamplingSettings(steps=steps)
    try:
        return SamplingSettings(**{"steps": steps, **read_json(file)})
    except TypeError as error:
        raise InputError(f"{file}: {error}") from None


def _identity(checkpoint: Path, text_folder: Path | None, model: Hart) -> dict[str, Any]:
    llm, tokenizer = find_folders(checkpoint)
    return {
        "source": checkpoint.resolve().name,
        "llm": config_to_dict(model.transformer.config),
        "tokenizer": config_to_dict(model.tokenizer.config),
        "weights": {
            "llm": _hashes(weight_files(llm, "ema_model.bin")),
            "tokenizer": _hashes(weight_files(tokenizer)),
            "text_encoder": _hashes(weight_files(text_folder)) if text_folder else {},
        },
    }


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in files}
