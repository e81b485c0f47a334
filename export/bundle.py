"""Builds a bundle next to its place and renames it when it is whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hart_runtime.common.checkpoint import CLASS_NAMES, Checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import resolved, whole_folder
from hart_runtime.common.precisions import FP8, PRECISIONS
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.export import float8
from hart_runtime.export.calibration import calibrate
from hart_runtime.export.graphs import build_graphs
from hart_runtime.export.request import Request, as_file, check_place
from hart_runtime.export.system_prompt import read_system_prompt, sha256_of_text
from hart_runtime.export.writer import WeightFile, write_graph
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, describe_files
from hart_runtime.runtime.contract import DEQUANTIZED, specs_of
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import DECODER
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.manifest import Manifest, check_contract, write_manifest
from hart_runtime.runtime.owned import owned_by_bundle
from hart_runtime.runtime.shapes import same_tensor
from hart_runtime.runtime.spec import GraphSpec

Progress = Callable[[str, int, int], None]
"""Called with what happens next, its number, and how many there are."""


def export_bundle(
    request: Request, output: Path, force: bool = False, progress: Progress = lambda *_: None
) -> Manifest:
    """Export a checkpoint to a bundle at ``output``. Without a text encoder, it draws from features only.

    Raises:
        InputError: what cannot be exported, bad weights, or an output that exists (without
            ``force``) or cannot be written. Nothing is left behind in either case.
    """
    request.check()
    _refuse_existing(request, output, force)
    words = _system_prompt(request)  # may ask the network: before the weights
    checkpoint, dtype = request.checkpoint, torch_dtype(request.precision)
    rounding = float8.Rounding({}, {})
    if request.precision == FP8:
        rounding = float8.calibrate(checkpoints.load(checkpoint), checkpoint.sampling, request.pyramid)
    model = checkpoints.load(checkpoint, dtype)
    vocabulary = request.vocabulary
    tokens: list[int] = []
    if vocabulary is not None and words is not None:
        own = copy.deepcopy(vocabulary)  # the exported one keeps its padding
        tokens = PromptTokenizer(own, request.model.context_token).system_prompt(words)
    text = load_text_encoder(checkpoint.text_encoder, dtype, tokens) if checkpoint.text_encoder else None

    # The graph holds its keys and values; the tokens are for whoever runs the reference beside it.
    described = {"sha256": sha256_of_text(words), "tokens": tokens} if words is not None else None
    with whole_folder(output, owned_by_bundle(output) if force else None) as partial:
        builders = build_graphs(
            model, text, request.pyramid, precision=request.precision, encoder=request.encoder
        )
        contracts = FAMILIES[request.family].graphs
        planned = specs_of(contracts, request.model, request.precision)
        graphs: dict[str, GraphSpec] = {}
        with WeightFile(partial) as weights:
            for number, (name, build) in enumerate(builders.items()):
                progress(name, number, len(builders) + 1)
                forms, exact = tuple(planned[name].forms), contracts[name].exact_tokens
                seen = None
                if name == DECODER and DEQUANTIZED in forms:
                    seen = calibrate(model, checkpoint.sampling, request.pyramid)
                scales = rounding.scales if contracts[name].fp8 else None
                graphs[name] = write_graph(build(), partial, weights, forms, exact, seen, scales)
        progress("manifest", len(builders), len(builders) + 1)
        names = [WEIGHTS, *(file for graph in graphs.values() for file in graph.files)]
        if vocabulary is not None:
            vocabulary.save(str(partial / TEXT_TOKENIZER))
            names.append(TEXT_TOKENIZER)
        if request.names:
            (partial / CLASS_NAMES).write_bytes(as_file(request.names))
            names.append(CLASS_NAMES)
        manifest = Manifest(
            family=request.family,
            name=resolved(output).name,
            precision=request.precision,
            max_batch=request.max_batch,
            model=request.model,
            sampling=checkpoint.sampling,
            speeds=checkpoint.speeds,
            graphs=graphs,
            files=describe_files(partial, names),
            checkpoint=_identity(checkpoint, checkpoints.stored_sets(checkpoint), described),
            tools={p: version(p) for p in ("torch", "onnx", "onnxscript", "onnx-ir")},
            in_half=rounding.in_half,
        )
        check_contract(manifest, str(output / MANIFEST), same_tensor)  # what was traced
        manifest = replace(manifest, graphs={name: planned[name] for name in graphs})
        write_manifest(manifest, partial)
    return manifest


def torch_dtype(precision: str) -> torch.dtype:
    """What the graphs of a precision are traced in."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision].traced)
    return dtype


def _refuse_existing(request: Request, output: Path, force: bool) -> None:
    if check_place(request, output, force):
        raise InputError(f"{output}: exists already, just as asked for; give `force=True` to make it anew")


def _system_prompt(request: Request) -> str | None:
    """Its text; only a text encoder can have one."""
    if request.checkpoint.text_encoder is None:
        return None
    return read_system_prompt(request.system_prompt, request.trained_with_system_prompt)


def _identity(
    checkpoint: Checkpoint, sets: tuple[str, ...], system_prompt: dict[str, Any] | None
) -> dict[str, Any]:
    """Where the weights came from."""
    below = {"sets": list(sets)} if any(sets) else {}
    return checkpoint.describe() | {"weights": checkpoint.weights, "system_prompt": system_prompt} | below
