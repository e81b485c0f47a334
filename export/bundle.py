"""Builds a bundle next to its place and renames it when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hart_runtime.common.config import config_to_dict, read_json
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import whole_folder
from hart_runtime.common.schedule import SamplingSettings
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.export.graphs import build_graphs, unconditional_graph
from hart_runtime.export.hub import name_of
from hart_runtime.export.specs import describe_model
from hart_runtime.export.system_prompt import read_system_prompt, sha256_of_text
from hart_runtime.export.vocabulary import read_vocabulary
from hart_runtime.export.writer import WeightFile, write_append, write_graph
from hart_runtime.hart.checkpoint import (
    SAMPLING_FILE,
    TEXT_ENCODER_FOLDER,
    find_folders,
    llm_weight_files,
    load_hart,
    load_text_encoder,
    read_text_config,
    weight_files,
)
from hart_runtime.hart.model import Hart
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.bundle import (
    APPEND,
    MANIFEST,
    TEXT_TOKENIZER,
    WEIGHTS,
    GraphSpec,
    Manifest,
    describe_files,
    sha256_of,
    write_manifest,
)

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float32}
"""What the graphs are traced in; int8 replaces products afterwards."""
DEFAULT_MAX_BATCH = 8
Progress = Callable[[str, int, int], None]
"""Called with what happens next, its number, and how many there are."""


def export_bundle(
    checkpoint: Path,
    output: Path,
    precision: str,
    text_encoder: Path | None = None,
    system_prompt: str | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    force: bool = False,
    patch_nums: tuple[int, ...] | None = None,
    ema: bool = True,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Export a checkpoint to a bundle at ``output``.

    Args:
        checkpoint: folder in the published layout.
        precision: "fp32", "fp16" or "int8", the type of the matrix products (int8: on the CPU, and
            only those of :data:`hart_runtime.runtime.bundle.INT8_GRAPHS`).
        text_encoder: Qwen2 folder; by default ``text_encoder/`` inside the checkpoint. Without
            one, the bundle draws from text features only.
        system_prompt: what stands before every prompt: a file, "none", or None for what the text
            encoder's ``config.json`` says, see :func:`hart_runtime.export.system_prompt.read_system_prompt`.
        patch_nums: another pyramid than the checkpoint's, for models whose weights do not
            depend on it (rotary attention with timestep level embeddings).
        ema: prefer the averaged weights, as the published sampler does.

    Raises:
        InputError: bad checkpoint, or an output that exists (without ``force``) or cannot be
            written. Nothing is left behind in either case.
    """
    _check_output(output, force)
    text_folder = text_encoder or own_text_encoder(checkpoint)
    words = _read_words(text_folder, system_prompt)  # may ask the network: before the weights
    model = load_hart(checkpoint, PRECISIONS[precision], ema)
    patch_nums = _pyramid(model, patch_nums)
    config = model.transformer.config
    vocabulary = read_vocabulary(text_folder) if text_folder else None
    tokens: list[int] = []
    if vocabulary is not None and words is not None:
        tokens = PromptTokenizer(vocabulary, config.context_token).system_prompt(words)
    text = load_text_encoder(text_folder, PRECISIONS[precision], tokens) if text_folder else None
    if text is not None and text.config.hidden_size != config.context_dim:
        raise InputError(
            f"{text_folder}: features are {text.config.hidden_size} wide, "
            f"the transformer expects {config.context_dim}"
        )

    # The graph holds its keys and values; the tokens are for whoever runs the reference beside it.
    described = {"sha256": sha256_of_text(words), "tokens": tokens} if words is not None else None
    with whole_folder(output, replace=True) as partial:
        builders = build_graphs(model, text, patch_nums)
        graphs: dict[str, GraphSpec] = {}
        with WeightFile(partial) as weights:
            for number, build in enumerate(builders):
                progress(build.__name__, number, len(builders) + 1)
                graph = build()
                graphs |= write_graph(graph, partial, weights, precision)
            graphs |= write_graph(unconditional_graph(model, tokens_first=True), partial, weights, precision)
        graphs[APPEND] = write_append(partial)
        progress("manifest", len(builders), len(builders) + 1)
        names = [WEIGHTS, *(graph.file for graph in graphs.values())]
        if vocabulary is not None:
            vocabulary.save(str(partial / TEXT_TOKENIZER))
            names.append(TEXT_TOKENIZER)
        manifest = Manifest(
            name=output.name,
            precision=precision,
            max_batch=max_batch,
            model=describe_model(model.transformer.config, model.tokenizer.config, patch_nums),
            sampling=sampling_defaults(checkpoint, model),
            graphs=graphs,
            files=describe_files(partial, names),
            checkpoint=_identity(checkpoint, text_folder, model, text, ema) | {"system_prompt": described},
            tools={p: version(p) for p in ("torch", "onnx", "onnxscript", "onnx-ir")},
        )
        write_manifest(manifest, partial)
        _check_output(output, force)  # again: it may have appeared meanwhile
    return manifest


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise InputError(f"{output}: exists already; give --force to replace it, or another --output")
    if output.exists() and not (output / MANIFEST).is_file():
        raise InputError(f"{output}: exists and is not a bundle (no {MANIFEST}), not replaced")


def _pyramid(model: Hart, patch_nums: tuple[int, ...] | None) -> tuple[int, ...]:
    config = model.transformer.config
    if patch_nums is None or patch_nums == config.patch_nums:
        return config.patch_nums
    if not config.use_timestep_embed:
        raise InputError("this checkpoint stores a level table, its pyramid cannot be changed")
    replace(config, patch_nums=patch_nums)  # checks the values
    return patch_nums


def own_text_encoder(checkpoint: Path) -> Path | None:
    """The text encoder that lies beside a checkpoint's other folders."""
    llm, _ = find_folders(checkpoint)
    folder = llm.absolute().parent / TEXT_ENCODER_FOLDER
    return folder if folder.is_dir() else None


def _read_words(text_folder: Path | None, given: str | None) -> str | None:
    """The system prompt; only a text encoder can have one."""
    if text_folder is None:
        if given is not None:
            raise InputError(f"--system-prompt {given}: there is no text encoder; give --text-encoder too")
        return None
    return read_system_prompt(given, read_text_config(text_folder).use_llm_system_prompt)


def sampling_defaults(checkpoint: Path, model: Hart) -> SamplingSettings:
    """The published defaults, overridden by the checkpoint's own ``sampling.json``."""
    llm, _ = find_folders(checkpoint)
    steps = model.transformer.config.num_sampling_steps
    file = llm.absolute().parent / SAMPLING_FILE
    if not file.is_file():
        return SamplingSettings(steps=steps)
    try:
        return SamplingSettings(**{"steps": steps, **read_json(file)})
    except TypeError as error:
        raise InputError(f"{file}: {error}") from None


def _identity(
    checkpoint: Path, text_folder: Path | None, model: Hart, text: TextEncoder | None, ema: bool
) -> dict[str, Any]:
    llm, tokenizer = find_folders(checkpoint)
    return {
        "source": name_of(llm.absolute().parent),
        **describe_configuration(model, text),
        "weights": {
            "llm": _hashes(llm_weight_files(llm, ema)),
            "tokenizer": _hashes(weight_files(tokenizer)),
            "text_encoder": _hashes(weight_files(text_folder)) if text_folder else {},
        },
    }


def describe_configuration(model: Hart, text: TextEncoder | None) -> dict[str, Any]:
    """The configurations of all networks, as a manifest keeps them."""
    return {
        "llm": config_to_dict(model.transformer.config),
        "tokenizer": config_to_dict(model.tokenizer.config),
        "text_encoder": config_to_dict(text.config) if text else None,
    }


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in files}
