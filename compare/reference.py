"""What the reference did, on disk and as graph calls. No torch here.

A reference is a folder::

    reference.json     where it came from, how it sampled, how far torch in fp16 is from it, and what
                       seals the other file
    trajectory.json    every recorded tensor, as Polygraphy RunResults; one iteration a batch
    calls/             one call of each graph as Polygraphy inputs and outputs, for its tools

It is made where torch is and compared anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from hart_runtime.common.errors import InputError, first_line, parameter, shown, told_of
from hart_runtime.common.files import refuse_strangers, whole_folder
from hart_runtime.common.json_files import read_json
from hart_runtime.common.records import FREE, read_record
from hart_runtime.common.settings import SamplingSettings, check_ranges
from hart_runtime.compare.recorded import Call, Tensors, check_recording, graph_calls
from hart_runtime.runtime.bundle import describe_files
from hart_runtime.runtime.manifest import FileSpec, Manifest, settings_in
from hart_runtime.runtime.origin import check_same_weights
from hart_runtime.runtime.seal import Seal

SCHEMA_VERSION = 4
DESCRIPTION = "reference.json"
TRAJECTORY = "trajectory.json"
CALLS, INPUTS, OUTPUTS = "calls", ".inputs.json", ".outputs.json"
RUNNER = "reference float32"


@dataclass(frozen=True)
class Description:
    """What is known of recorded runs of the reference model in float32."""

    prompts: tuple[str, ...] = field(metadata=FREE)
    """Empty when the runs started from given text features."""
    settings: SamplingSettings
    patch_nums: tuple[int, ...]
    weights: dict[str, dict[str, str]]
    """File name -> sha256 per network, as a bundle's manifest lists them."""
    made_with: dict[str, str] = field(metadata=FREE)
    """Checkpoint, device and versions of the machine that recorded it."""
    half_errors: dict[str, float] | None
    """Relative error of torch in fp16, by :func:`error_key`; None if it was not measured."""


@dataclass(frozen=True)
class Reference(Description):
    """The recorded runs themselves."""

    batches: list[Tensors]


@dataclass(frozen=True)
class _Saved(Description):
    """Contents of ``reference.json``."""

    trajectory: FileSpec
    schema: int


def error_key(batch: int, call: Call, output: str) -> str:
    return f"{batch}/{call.graph}/{call.label}/{output}"


def save_reference(reference: Reference, manifest: Manifest, folder: Path) -> None:
    """Write a reference folder beside its place and rename it.

    Raises:
        InputError: the folder exists and is no reference, or cannot be written.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    check_reference_place(folder)
    with whole_folder(folder, _owned) as partial:
        results = RunResults()
        results.add([dict(tensors) for tensors in reference.batches], runner_name=RUNNER)
        results.save(str(partial / TRAJECTORY))
        (partial / CALLS).mkdir()
        for call in _samples(graph_calls(reference.batches[0], reference.settings, manifest)):
            dtypes = {spec.name: spec.dtype for spec in manifest.graphs[call.graph].inputs}
            inputs = {name: np.asarray(value, dtypes[name]) for name, value in call.inputs.items()}
            save_json([inputs], str(partial / CALLS / f"{call.graph}{INPUTS}"))
            example = RunResults()
            example.add([call.outputs], runner_name=RUNNER)
            example.save(str(partial / CALLS / f"{call.graph}{OUTPUTS}"))
        described = asdict(replace(reference, batches=[]))
        del described["batches"]
        sealed = asdict(describe_files(partial, [TRAJECTORY])[TRAJECTORY])
        described |= {"trajectory": sealed, "schema": SCHEMA_VERSION}
        text = json.dumps(described, indent=1, allow_nan=False) + "\n"
        (partial / DESCRIPTION).write_text(text, encoding="utf-8")


def check_reference_place(folder: Path) -> None:
    """Refuse a place where something else is than a reference, before anything is computed for it."""
    if not os.path.lexists(folder):
        return
    values = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    if not {"schema", "patch_nums", "made_with"} <= values.keys():
        raise InputError(f"{parameter('folder', folder)}: exists and is not a reference, not replaced")
    refuse_strangers(folder, _owned)


def _owned(path: Path) -> bool:
    names = (DESCRIPTION, TRAJECTORY, f"{CALLS}/*{INPUTS}", f"{CALLS}/*{OUTPUTS}")
    return any(len(path.parts) == len(Path(name).parts) and path.match(name) for name in names)


def load_reference(folder: Path, manifest: Manifest) -> Reference:
    """Read a reference folder that was recorded of what a bundle was exported from.

    Raises:
        InputError: no reference there, another schema, a damaged file, or other weights, scales or another
            system prompt than the bundle's.
    """
    file, source = folder / DESCRIPTION, parameter("reference", folder)
    values = read_json(file)
    if (schema := values.get("schema")) != SCHEMA_VERSION:
        raise InputError(f"{file}: expected schema {SCHEMA_VERSION}, found {shown(schema)}; make it again")
    try:
        saved = read_record(_Saved, values, str(file), {SamplingSettings: settings_in})
        with told_of(f"{file}: settings"):
            check_ranges(saved.settings, manifest.model)
    except InputError as error:
        raise InputError(f"{error}; make it again") from None
    check_fits(saved, manifest, source)
    described = {field.name: getattr(saved, field.name) for field in fields(Description)}
    reference = Reference(**described, batches=_read_trajectory(folder / TRAJECTORY, saved.trajectory))
    try:
        _check_recordings(reference, manifest)
    except InputError as error:
        raise InputError(f"{folder / TRAJECTORY}: {error}; make it again") from None
    return reference


def _read_trajectory(file: Path, expected: FileSpec) -> list[Tensors]:
    from polygraphy.comparator import RunResults

    try:
        if not Seal().matches(file, expected):
            raise InputError(f"{file}: is truncated or was changed; make the reference again")
        iterations = RunResults.load(str(file))[RUNNER]
        return [dict(iteration.items()) for iteration in iterations]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except Exception as error:  # Polygraphy's errors have no useful base class
        raise InputError(
            f"{file}: holds no recording ({first_line(error)}); make the reference again"
        ) from None


def _check_recordings(reference: Reference, manifest: Manifest) -> None:
    """Raises InputError for recordings that are not of a bundle's graphs."""
    pictures = sum(check_recording(tensors, reference.settings, manifest) for tensors in reference.batches)
    if not pictures:
        raise InputError("expected recorded pictures, found none")
    if reference.prompts and len(reference.prompts) != pictures:
        raise InputError(f"expected a picture for each of {len(reference.prompts)} prompts, found {pictures}")


def system_prompt_identity(manifest: Manifest) -> dict[str, str]:
    """The bundle's system prompt as if it were a weight file: features depend on it as much."""
    prompt = manifest.checkpoint.get("system_prompt")  # not in bundles of before there were any
    return {"text": prompt["sha256"]} if prompt else {}


def check_fits(reference: Description, manifest: Manifest, source: str) -> None:
    """Refuse a reference of other weights or scales than a bundle's, or of another system prompt."""
    check_same_weights(reference.weights, manifest, source, mend="save it again from the checkpoint")
    prompt = system_prompt_identity(manifest)
    if reference.weights.get("system_prompt", {}) != prompt:
        raise InputError(
            f"{source}: was recorded with another system prompt than bundle {manifest.name} was exported "
            f"with; make it again"
        )
    if reference.patch_nums != manifest.model.patch_nums:
        raise InputError(
            f"{source}: was recorded with scales {list(reference.patch_nums)}, bundle {manifest.name} has "
            f"{list(manifest.model.patch_nums)}"
        )


def _samples(calls: Iterable[Call]) -> list[Call]:
    """The second call of each graph, or its only one: small, and with a past."""
    chosen: dict[str, list[Call]] = {}
    for call in calls:
        if len(chosen.setdefault(call.graph, [])) < 2:
            chosen[call.graph].append(call)
    return [calls[-1] for calls in chosen.values()]
