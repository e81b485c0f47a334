"""What the reference did, on disk and as graph calls. No torch here.

A reference is a folder::

    reference.json     where it came from, how it sampled, how far torch in fp16 is from it
    trajectory.json    every recorded tensor, as Polygraphy RunResults; one iteration a batch
    calls/             one call of each graph as Polygraphy inputs and outputs, for its tools

It is made where torch is and compared anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.config import read_json
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.files import whole_folder
from hart_runtime.common.schedule import downsample_matrix, residual_guidance, scale_steps, upsample_matrix
from hart_runtime.common.settings import SamplingSettings, settings_of
from hart_runtime.runtime import contract
from hart_runtime.runtime.bundle import Manifest
from hart_runtime.runtime.origin import check_same_weights

SCHEMA_VERSION = 1
DESCRIPTION = "reference.json"
TRAJECTORY = "trajectory.json"
RUNNER = "reference float32"
EPS_ROUNDING = 1e-5
"""Rounding of the predicted noise, over its largest magnitude, that a denoising step may amplify."""

Array = NDArray[Any]
Tensors = Mapping[str, Array]
"""One batch's trajectory, under the names :func:`hart_runtime.hart.generate.generate` records."""


@dataclass(frozen=True)
class Call:
    """One use of one graph by the reference: what it was fed and what must come out."""

    graph: str
    label: str
    """Where in the loop: "prompt", "scale3", "step5" or "image0"."""
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    slack: dict[str, Array] = field(default_factory=dict)
    """Per output, what each element may be off because its inputs amplify rounding."""


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

    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise InputError(f"{parameter('folder', folder)}: exists and is not a reference, not replaced")
    with whole_folder(folder, replace=True) as partial:
        results = RunResults()
        results.add([dict(tensors) for tensors in reference.batches], runner_name=RUNNER)
        results.save(str(partial / TRAJECTORY))
        (partial / "calls").mkdir()
        samples = _samples(graph_calls(reference.batches[0], reference.settings, manifest))
        appends = [_append_form(call) for call in samples if call.graph in contract.APPEND_FORMS]
        for call in [*samples, *appends]:
            dtypes = {spec.name: spec.dtype for spec in manifest.graphs[call.graph].inputs}
            inputs = {name: np.asarray(value, dtypes[name]) for name, value in call.inputs.items()}
            save_json([inputs], str(partial / "calls" / f"{call.graph}.inputs.json"))
            example = RunResults()
            example.add([call.outputs], runner_name=RUNNER)
            example.save(str(partial / "calls" / f"{call.graph}.outputs.json"))
        described = {"schema": SCHEMA_VERSION, **asdict(replace(reference, batches=[]))}
        del described["batches"]
        text = json.dumps(described, indent=1, allow_nan=False) + "\n"
        (partial / DESCRIPTION).write_text(text, encoding="utf-8")


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


def graph_calls(tensors: Tensors, settings: SamplingSettings, manifest: Manifest) -> Iterator[Call]:
    """Every graph call of one recorded batch, in the order of the loop.

    The KV cache only grows at its end, so a scale's past is a view of the final cache. The
    smooth graph is called whether or not the run sampled smoothly.
    """
    model = manifest.model
    steps = scale_steps(model.patch_nums, settings, model.vocab_size)
    batch, size, channels = len(tensors["ctx.mask"]), model.patch_nums[-1], model.latent_channels
    if "input_ids" in tensors:
        inputs = {"input_ids": tensors["input_ids"], "mask": tensors["ctx.mask"]}
        yield Call(contract.TEXT_ENCODER, "prompt", inputs, {"features": tensors["ctx.features"]})

    pooled = {"head_condition": tensors["head_condition"]}
    modulated = manifest.graphs[contract.TRANSFORMER].reads("block_condition")
    condition = {"block_condition": tensors["block_condition"]} if modulated else {}
    yield Call(
        contract.CONTEXT,
        "prompt",
        {"features": tensors["ctx.features"], "mask": tensors["ctx.mask"]},
        {
            "x": tensors["scale0.x_in"][:batch],
            "angles": tensors["scale0.angles"][:batch],
            "offset": tensors["offset"],
            **pooled,
            **condition,
            **({"text_condition": tensors["block_condition"][:batch]} if modulated else {}),
        },
    )
    f_hat: Array = np.zeros((batch, channels, size, size), np.float32)
    past = 0
    for step in steps:
        name, side = f"scale{step.index}", step.patch_num
        rows = slice(2 * batch if step.index else batch)  # the text runs in the conditional half alone
        hidden = tensors[f"{name}.hidden"]
        present = past + hidden.shape[1]
        grown = {"hidden": hidden} | {k: v[:, :present] for k, v in _cache(tensors, model.depth)}
        new = {k: v[rows] for k, v in grown.items()}
        yield Call(
            contract.TRANSFORMER,
            name,
            {
                "x": tensors[f"{name}.x_in"][rows],
                "angles": tensors[f"{name}.angles"][rows],
                **{k: v[rows] for k, v in condition.items()},
                **{f"{contract.PAST}{k}": v[rows, :past] for k, v in _cache(tensors, model.depth)},
            },
            new,
        )
        if not step.index:
            yield Call(
                contract.UNCONDITIONAL, name, {f"{contract.TEXT}{k}": v for k, v in new.items()}, grown
            )
        past = present
        logits = tensors[f"{name}.logits_kept"].reshape(batch, side, side, -1)
        codes = tensors[f"{name}.codes"].reshape(batch, side, side, channels)
        yield Call(
            contract.SAMPLE,
            name,
            {
                "hidden": hidden,
                **pooled,
                "guidance": np.array(step.guidance, np.float32),
                "top_k": np.array([step.top_k], np.int64),
                "top_p": np.array(step.top_p or 1.0, np.float32),
                "uniform": tensors[f"{name}.u"].reshape(batch, side, side),
            },
            {"index": tensors[f"{name}.idx"].reshape(batch, side, side), "codes": codes, "logits": logits},
        )
        smooth = tensors[f"{name}.h_smooth"].reshape(batch, side, side, channels)
        yield Call(
            contract.SMOOTH,
            name,
            {
                "logits": logits,
                "exponential": tensors[f"{name}.gumbel_exp"].reshape(logits.shape),
                "logit_gain": np.array(step.logit_gain, np.float32),
                "temperature": np.array(step.temperature, np.float32),
            },
            {"h": smooth},
        )
        h = smooth if settings.smooth else codes
        if step is not steps[-1]:
            following = f"scale{step.index + 1}"
            yield Call(
                contract.NEXT_SCALE,
                name,
                {
                    "h": h,
                    "f_hat": f_hat,
                    "scale": np.array([step.index], np.int64),
                    "up": upsample_matrix(side, size),
                    "down": downsample_matrix(size, steps[step.index + 1].patch_num),
                    "offset": tensors["offset"],
                },
                {
                    "f_hat_out": tensors[f"{name}.f_hat"],
                    "x": tensors[f"{following}.x_in"],
                    "angles": tensors[f"{following}.angles"],
                },
            )
            f_hat = tensors[f"{name}.f_hat"]

    residual: Array = np.zeros((batch, size * size, channels), np.float32)
    if settings.residual:
        embedded = tensors["final.diff.embedded"].reshape(2 * batch, size * size, -1)
        yield Call(
            contract.RESIDUAL_CONDITION, "last", {"hidden": hidden, "codes": codes}, {"embedded": embedded}
        )
        schedule = diffusion_schedule(settings.steps)
        for run, index in enumerate(reversed(range(len(schedule)))):
            name = f"final.diff.step{run}"
            x, after = (tensors[f"{name}.{key}"].reshape(residual.shape) for key in ("x_t", "sample"))
            eps = np.split(tensors[f"{name}.model_out"], 2, axis=-1)[0].reshape(residual.shape)
            coefficients = schedule.coefficients(index)
            yield Call(
                contract.RESIDUAL_STEP,
                f"step{run}",
                {
                    "x": x,
                    "embedded": embedded,
                    "timestep": schedule.timesteps[index : index + 1],
                    "coefficients": coefficients,
                    "guidance": np.array(residual_guidance(steps[-1]), np.float32),
                    "noise": tensors[f"{name}.noise"].reshape(residual.shape),
                },
                {"x_out": after},
                {"x_out": step_slack(x, eps, coefficients)},
            )
        residual = after
    latent = tensors["final.f_hat"]
    yield Call(contract.LATENT, "last", {"f_hat": f_hat, "h": h, "residual": residual}, {"f_hat_out": latent})
    for i in range(batch):
        image = tensors["image"][i : i + 1]
        yield Call(contract.DECODER, f"image{i}", {"f_hat": latent[i : i + 1]}, {"image": image})


def step_slack(x: Array, eps: Array, coefficients: Array) -> Array:
    """How far one denoising step moves if the predicted noise is off by ``EPS_ROUNDING``.

    The noisiest step multiplies x - eps by 2e4 before it clamps to [-1, 1]: next to zero,
    float32 rounding alone decides what comes out.
    """
    recip, recipm1, coef1 = (float(c) for c in coefficients[:3])
    off = EPS_ROUNDING * float(np.abs(eps).max())
    x0, above, below = (np.clip(recip * x - recipm1 * (eps + d), -1, 1) for d in (0.0, off, -off))
    return abs(coef1) * np.maximum(np.abs(above - x0), np.abs(below - x0))


def _cache(tensors: Tensors, depth: int) -> Iterator[tuple[str, Array]]:
    for i in range(depth):
        yield f"key_{i}", tensors[f"kv.block{i}.k"]
        yield f"value_{i}", tensors[f"kv.block{i}.v"]


def _samples(calls: Iterator[Call]) -> list[Call]:
    """The second call of each graph, or its only one: small, and with a past."""
    chosen: dict[str, list[Call]] = {}
    for call in calls:
        if len(chosen.setdefault(call.graph, [])) < 2:
            chosen[call.graph].append(call)
    return [calls[-1] for calls in chosen.values()]


def _append_form(call: Call) -> Call:
    """The same for a graph's append-only form: tokens first, and only the new ones come out."""
    kept = [name for name in call.outputs if name != "hidden"]
    caches = {prefix + name for name in kept for prefix in (contract.PAST, contract.TEXT)}
    inputs = {k: v.swapaxes(0, 1) if k in caches else v for k, v in call.inputs.items()}
    past = len(inputs.get(contract.PAST + kept[0], ()))
    outputs = {k: v for k, v in call.outputs.items() if k not in kept}
    new = {contract.NEW + k: call.outputs[k][:, past:].swapaxes(0, 1) for k in kept}
    return replace(call, graph=contract.APPEND_FORMS[call.graph], inputs=inputs, outputs=outputs | new)
