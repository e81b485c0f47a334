"""Builds a bundle next to its place and renames it when it is whole."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hart_runtime.common.checkpoint import CLASS_NAMES, LLM
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import resolved, whole_folder
from hart_runtime.common.precisions import FP8, PRECISIONS
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.export import float8
from hart_runtime.export.calibration import calibrate
from hart_runtime.export.graphs import Graph, build_graphs
from hart_runtime.export.request import Request, as_file, check_place
from hart_runtime.export.system_prompt import read_system_prompt, sha256_of_text
from hart_runtime.export.writer import WeightFile, write_graph
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.hart.model import Model
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, describe_files
from hart_runtime.runtime.contract import DEQUANTIZED, specs_at, specs_of
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import DECODER
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.manifest import Manifest, check_contract, write_manifest
from hart_runtime.runtime.owned import owned_by_bundle
from hart_runtime.runtime.shapes import same_tensor
from hart_runtime.runtime.spec import GraphSpec, OtherSize

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
        jobs = _jobs(request, model, text)
        contracts = FAMILIES[request.family].graphs
        traced: list[GraphSpec] = []
        with WeightFile(partial) as weights:
            for number, job in enumerate(jobs):
                progress(job.name, number, len(jobs) + 1)
                forms, exact = tuple(job.planned.forms), contracts[job.name].exact_tokens
                seen = None
                if job.name == DECODER and DEQUANTIZED in forms:
                    seen = calibrate(model, checkpoint.sampling, request.pyramid)
                scales = rounding.scales if contracts[job.name].fp8 else None
                traced.append(
                    write_graph(job.build(), partial, weights, forms, exact, seen, scales, job.size)
                )
        progress("manifest", len(jobs), len(jobs) + 1)
        names = [WEIGHTS, *(file for graph in traced for file in graph.files)]
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
            graphs={},
            files=describe_files(partial, names),
            checkpoint=_identity(request, checkpoints.stored_sets(checkpoint), described),
            tools={p: version(p) for p in ("torch", "onnx", "onnxscript", "onnx-ir")},
            in_half=rounding.in_half,
        )
        found = _with_graphs(manifest, request, jobs, traced)
        check_contract(found, str(output / MANIFEST), same_tensor)
        manifest = _with_graphs(manifest, request, jobs, [job.planned for job in jobs])
        write_manifest(manifest, partial)
    return manifest


@dataclass(frozen=True)
class _Job:
    """A graph to trace and write."""

    name: str
    size: int | None
    """Of pictures, where they are not the bundle's own."""
    build: Callable[[], Graph]
    planned: GraphSpec


def _jobs(request: Request, model: Model, text: TextEncoder | None) -> list[_Job]:
    """Graphs of the bundle's own size, and those that the others do not share with it."""
    own, *others = request.models
    contracts, precision = FAMILIES[request.family].graphs, request.precision
    planned: dict[int | None, dict[str, GraphSpec]] = {None: specs_of(contracts, own, precision)}
    planned |= {other.image_size: specs_at(contracts, own, other, precision) for other in others}
    found = []
    for (size, specs), each in zip(planned.items(), request.models, strict=True):
        builders = build_graphs(model, text, each.patch_nums, precision=precision, encoder=request.encoder)
        found += [_Job(name, size, build, specs[name]) for name, build in builders.items() if name in specs]
    return found


def _with_graphs(
    manifest: Manifest, request: Request, jobs: Sequence[_Job], specs: Sequence[GraphSpec]
) -> Manifest:
    """A manifest with what its jobs made, or were to make."""
    made: dict[int | None, dict[str, GraphSpec]] = defaultdict(dict)
    for job, spec in zip(jobs, specs, strict=True):
        made[job.size][job.name] = spec
    others = [OtherSize(model.patch_nums, made[model.image_size]) for model in request.models[1:]]
    return replace(manifest, graphs=made[None], other_sizes=tuple(others))


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
    request: Request, sets: tuple[str, ...], system_prompt: dict[str, Any] | None
) -> dict[str, Any]:
    """Where the weights came from, and the pyramid that they are taken for."""
    found = request.checkpoint.describe()
    if "patch_nums" in found[LLM]:
        found[LLM]["patch_nums"] = list(request.pyramid)
    below = {"sets": list(sets)} if any(sets) else {}
    return found | {"weights": request.checkpoint.weights, "system_prompt": system_prompt} | below
