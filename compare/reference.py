"""What the reference did, on disk and as graph calls. No torch here.

A reference is a folder::

    reference.json     where it came from, how it sampled, how far torch in fp16 is from it
    trajectory.json    every recorded tensor, as Polygraphy RunResults; one iteration a batch
    calls/             one call of each graph as Polygraphy inputs and outputs, for its tools

It is made where torch is and compared anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.files import refuse_strangers, whole_folder
from hart_runtime.common.json_files import read_json
from hart_runtime.common.settings import SamplingSettings, settings_of
from hart_runtime.compare.recorded import Call, Tensors, graph_calls
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.origin import check_same_weights

SCHEMA_VERSION = 2
DESCRIPTION = "reference.json"
TRAJECTORY = "trajectory.json"
CALLS, INPUTS, OUTPUTS = "calls", ".inputs.json", ".outputs.json"
RUNNER = "reference float32"


@dataclass(frozen=True)
class Reference:
    """Recorded runs of the reference model in float32."""

    prompts: list[str]
    """Empty when the runs started from given text features."""
    settings: SamplingSettings
    patch_nums: tuple[int, ...]
    weights: dict[str, dict[str, str]]
    """File name -> sha256 per network, as a bundle's manifest lists them."""
    made_with: dict[str, str]
    """Checkpoint, device and versions of the machine that recorded it."""
    batches: list[Tensors]
    half_errors: dict[str, float] | None = field(default=None)
    """Relative error of torch in fp16, by :func:`error_key`; None if it was not measured."""


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
        described = {"schema": SCHEMA_VERSION, **asdict(replace(reference, batches=[]))}
        del described["batches"]
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


def load_reference(folder: Path) -> Reference:
    """Read a reference folder.

    Raises:
        InputError: no reference there, a newer schema, or a damaged file.
    """
    from polygraphy.comparator import RunResults

    values = read_json(folder / DESCRIPTION)
    schema = values.pop("schema", None)
    if schema != SCHEMA_VERSION:
        raise InputError(
            f"{folder / DESCRIPTION}: expected schema {SCHEMA_VERSION}, found {schema!r}; make it again"
        )
    try:
        iterations = RunResults.load(str(folder / TRAJECTORY))[RUNNER]
        values["settings"] = settings_of(values["settings"], "settings")
        values["patch_nums"] = tuple(values["patch_nums"])
        return Reference(batches=[dict(iteration.items()) for iteration in iterations], **values)
    except Exception as error:  # Polygraphy's errors have no useful base class
        raise InputError(
            f"{folder}: the reference is damaged ({str(error).strip().splitlines()[0]}); make it again"
        ) from None


def system_prompt_identity(manifest: Manifest) -> dict[str, str]:
    """The bundle's system prompt as if it were a weight file: features depend on it as much."""
    prompt = manifest.checkpoint.get("system_prompt")  # not in bundles of before there were any
    return {"text": prompt["sha256"]} if prompt else {}


def check_fits(reference: Reference, manifest: Manifest, source: str) -> None:
    """Refuse a reference that was recorded with other weights than a bundle's, or another system prompt."""
    check_same_weights(reference.weights, manifest, source, mend="save it again from the checkpoint")
    prompt = system_prompt_identity(manifest)
    if reference.weights.get("system_prompt", {}) != prompt:
        raise InputError(
            f"{source}: was recorded with another system prompt than bundle {manifest.name} was exported "
            f"with; make it again"
        )


def _samples(calls: Iterable[Call]) -> list[Call]:
    """The second call of each graph, or its only one: small, and with a past."""
    chosen: dict[str, list[Call]] = {}
    for call in calls:
        if len(chosen.setdefault(call.graph, [])) < 2:
            chosen[call.graph].append(call)
    return [calls[-1] for calls in chosen.values()]
