"""The loop on a backend that answers with what the reference recorded.

So hart-compare knows every call of every graph without a second wiring of its own: the contract says where
outputs lie in a recording, and what the loop hands over is held against what was recorded there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError, shown
from hart_runtime.common.noise import RecordedNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.metrics import Array
from hart_runtime.runtime import stages
from hart_runtime.runtime.backends.backend import (
    Backend,
    Lease,
    Limits,
    Outputs,
    Values,
    Watched,
    first_half,
    joined,
)
from hart_runtime.runtime.contract import BRANCH, NEW, OUT, PAST, tensors_of
from hart_runtime.runtime.families.names import SMOOTH
from hart_runtime.runtime.families.scales import ENCODE_PICTURES
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Arrays, Program, Run, cache_of
from hart_runtime.runtime.shapes import Dims, shape_of, solve
from hart_runtime.runtime.spec import TensorSpec
from hart_runtime.runtime.text import ENCODE

Tensors = Arrays
"""One batch's trajectory, under the names :func:`hart_runtime.hart.generate.generate` records."""
CLOSE = 1e-6
"""How far numbers may be off that the host makes in float32 and the reference in float64."""
EPS_ROUNDING = 1e-5
"""Rounding of the predicted noise, over its largest magnitude, that a denoising step may amplify."""


@dataclass(frozen=True)
class Call:
    """One use of one graph by the reference: what it was fed and what must come out."""

    run: Run
    label: str
    """Where in the loop: "context", "scale3", "step5" or "image0"."""
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    slack: dict[str, Array] = field(default_factory=dict)
    """Per output, what each element may be off because its inputs amplify rounding."""

    @property
    def graph(self) -> str:
        return self.run.graph


def places(manifest: Manifest, run: Run, outputs: bool = True) -> dict[str, tuple[TensorSpec, str]]:
    """Tensors of a run that are recorded, and under which name."""
    contract = manifest.contracts[run.graph]
    rows = contract.outputs if outputs else contract.inputs
    return {
        spec.name: (spec, _place(place, run))
        for spec, place in tensors_of(rows, manifest.model, manifest.precision)
        if place is not None
    }


def _place(place: str, run: Run) -> str:
    """A name of a recording, in a run."""
    return place.format(index=run.index, before=run.index - 1, after=run.index + 1, last=run.last)


def recorded(tensors: Tensors, spec: TensorSpec, place: str, dims: Dims, image: int = 0) -> Array:
    """A recorded tensor as a graph has it: of its shape, both guidance halves or the first alone.

    Args:
        image: number of the picture, for what runs picture by picture.

    Raises:
        InputError: it is not in the recording, or is another one there.
    """
    if place not in tensors:
        raise InputError(f"the recording lacks {place}")
    array, shape = tensors[place], shape_of(spec, dims)
    found = array
    if spec.name.startswith((PAST, NEW)):  # recorded rows first, whole or a scale's tokens
        if array.ndim == len(shape):
            tokens = array.swapaxes(0, 1)
            start = dims.get("past", 0) if spec.name.startswith(NEW) and len(tokens) > shape[0] else 0
            found = _in_rows(tokens[start : start + shape[0]], 1, shape[1])
    elif spec.name.startswith(BRANCH):
        found = _in_rows(array, 0, shape[0])
    elif array.size % max(1, math.prod(shape[1:])) == 0:
        rows = array.reshape(-1, *shape[1:])
        found = rows[image : image + shape[0]] if shape else rows[:1].reshape(rows.shape[1:])
    if found.shape != shape or found.dtype.kind != np.dtype(spec.dtype).kind:
        raise InputError(
            f"{place}: expected {spec.name} {spec.dtype} {list(shape)} in it, found {array.dtype} "
            f"{list(array.shape)}"
        )
    return found


def _in_rows(array: Array, axis: int, rows: int) -> Array:
    """The first rows, or where only the conditional half was computed that half in both places."""
    if 2 * array.shape[axis] == rows:
        return np.concatenate([array, array], axis)
    return array[(slice(None),) * axis + (slice(rows),)]  # a view: caches of all calls are many times a cache


def in_order(name: str, array: Array) -> Array:
    """Keys and values without the order of their tokens, which says nothing: each number in its rank.

    Nothing is farther apart for it.
    """
    return np.sort(array, axis=0) if name.startswith((PAST, NEW)) else array


def recorded_names(manifest: Manifest, settings: SamplingSettings) -> set[str]:
    """Names that the calls of a drawing are made of."""
    program = manifest.program(replace(settings, smooth=True), 1)
    names = {"final.diff.init_noise"}
    for run in (ENCODE, *program.runs(), program.decode):
        if run.graph not in manifest.contracts:
            continue
        for outputs in (False, True):
            names |= {place for _, place in places(manifest, run, outputs).values()}
        contract = manifest.contracts[run.graph]
        names |= {_place(place, run) for place in (contract.predicted, *contract.drawn) if place}
    return names


def given_of(tensors: Tensors, manifest: Manifest) -> dict[str, Array]:
    """What a recorded batch began with: the text's features and mask, or labels."""
    first = next(manifest.program(manifest.sampling, 1).runs())
    dims = {"batch": batch_of(tensors)}
    found = places(manifest, first, outputs=False)
    return {name: recorded(tensors, spec, place, dims) for name, (spec, place) in found.items()}


def batch_of(tensors: Tensors) -> int:
    """Pictures of a recorded batch."""
    return len(tensors["image"])


def graph_calls(tensors: Tensors, settings: SamplingSettings, manifest: Manifest) -> list[Call]:
    """Every graph call of one recorded batch, in the order of the loop.

    The smooth graph is called whether or not the run sampled smoothly.

    Raises:
        RunError: the loop hands over something else than the reference did.
    """
    calls = _follow(tensors, settings, manifest)
    if not settings.smooth:
        mixed = _follow(tensors, replace(settings, smooth=True), manifest)
        smooth = {call.label: call for call in mixed if call.graph == SMOOTH}
        calls = [
            each
            for call in calls
            for each in ((call, smooth[call.label]) if "logits" in call.outputs else (call,))
        ]
    return [*_encoding(tensors, manifest), *calls]


def check_recording(tensors: Tensors, settings: SamplingSettings, manifest: Manifest) -> int:
    """Refuse a recording that is not one of a bundle's graphs.

    Returns:
        Number of its pictures.

    Raises:
        InputError: something is missing, no tensor, or one of another type or shape.
        RunError: as :func:`graph_calls`.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray) or tensor.dtype.kind not in "biuf":
            raise InputError(f"{shown(name)}: expected numbers, found {shown(type(tensor).__name__)}")
    program = manifest.program(settings, 1)
    ((picture, image),) = places(manifest, program.decode).values()
    whole = {place: len(spec.shape) for spec, place in places(manifest, next(program.runs()), False).values()}
    pictures = len(tensors[image]) if image in tensors and tensors[image].ndim else 0
    for name, axes in {**whole, image: len(picture.shape)}.items():
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) != axes or shape[0] != pictures:
            raise InputError(f"{name}: expected {axes} axes, the first of {pictures}, found {shown(shape)}")
    for call in graph_calls(tensors, settings, manifest):
        for name in call.inputs.keys() & manifest.tables.keys():
            rows, found = manifest.tables[name], call.inputs[name]
            if found.size and not 0 <= found.min() <= found.max() < rows:
                raise InputError(f"{name}: expected rows of a table of {rows}, found up to {found.max()}")
    return pictures


def _follow(tensors: Tensors, settings: SamplingSettings, manifest: Manifest) -> list[Call]:
    program = manifest.program(settings, batch_of(tensors))
    recording = Recording(tensors, manifest, program)
    try:
        drawn(draw(recording, program, given_of(tensors, manifest), RecordedNoise(tensors)))
    except RunError:
        if not recording.done:  # else the reference's own picture is a broken one
            raise
    return recording.calls


def _encoding(tensors: Tensors, manifest: Manifest) -> Iterator[Call]:
    """Those of the encoders, of texts and of pictures, which are not part of a drawing."""
    for run in (ENCODE, ENCODE_PICTURES):
        fed = places(manifest, run, outputs=False) if run.graph in manifest.graphs else {}
        if not fed or any(place not in tensors for _, place in fed.values()):
            continue
        inputs = {name: tensors[place] for name, (_, place) in fed.items()}
        outputs = {name: tensors[place] for name, (_, place) in places(manifest, run).items()}
        yield Call(run, run.stage, inputs, outputs)


def recording(backend: Backend, manifest: Manifest) -> tuple[Backend, dict[str, Array]]:
    """A backend that fills a dictionary with what its graphs return, caches apart, by recorded name."""
    found: dict[str, Array] = {}

    def around(run: Run, inputs: Values, proceed: Callable[[Values], Outputs]) -> Outputs:
        outputs = proceed(inputs)
        for name, (_, place) in places(manifest, run).items():
            if not name.startswith((PAST, NEW, BRANCH)) and name in outputs:
                found[place] = backend.to_host(outputs[name]).copy()  # planned memory is used again
        return outputs

    return Watched(backend, around), found


class Recording:
    """A backend that looks every output up, and notes the calls."""

    name = device = "recording"
    limits: Limits | None = None

    def __init__(self, tensors: Tensors, manifest: Manifest, program: Program) -> None:
        self.tensors, self.manifest, self.program = tensors, manifest, program
        self.calls: list[Call] = []
        self._decoded: list[Run] = []

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        return contextlib.nullcontext(self)

    def run(self, run: Run, inputs: Values, wanted: frozenset[str] = frozenset()) -> Outputs:
        specs = self.manifest.graphs[run.graph].inputs
        dims = solve(specs, {spec.name: inputs[spec.name].shape for spec in specs})
        image = len(self._decoded) if run is self.program.decode else 0
        for name, (spec, place) in places(self.manifest, run, outputs=False).items():
            if not name.startswith(PAST) and place in self.tensors:  # caches are only ever made here
                self._compare(run, name, inputs[name], recorded(self.tensors, spec, place, dims, image))
        outputs = {
            name: recorded(self.tensors, spec, place, dims, image)
            for name, (spec, place) in places(self.manifest, run).items()
            if not name.startswith(BRANCH) or name in run.also.values() or place in self.tensors
        }
        self.calls.append(Call(run, self._label(run), dict(inputs), outputs, self._slack(run, inputs)))
        if run is self.program.decode:
            self._decoded.append(run)
        return self._kept(run, inputs, outputs, dims, wanted)

    @property
    def done(self) -> bool:
        """Whether every picture was decoded."""
        return len(self._decoded) == self.program.batch

    def append(self, past: Any, new: Any) -> Any:
        return joined(past, new)

    def split(self, value: Any) -> list[Any]:
        return list(value[:, None])

    def half(self, value: Any) -> Any:
        return first_half(value)

    def to_host(self, value: Any) -> NDArray[Any]:
        return np.asarray(value)

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        pass

    def _kept(
        self, run: Run, inputs: Values, outputs: dict[str, Array], dims: Dims, wanted: frozenset[str]
    ) -> Outputs:
        """What later graphs take, caches as views of the one at the end where that was recorded."""
        kept: Outputs = {}
        for name, value in outputs.items():
            cache = cache_of(name)
            if cache in wanted and (whole := places(self.manifest, run, outputs=False).get(cache)):
                then = {**dims, "past": dims["past"] + dims["length"]}
                kept[cache] = recorded(self.tensors, *whole, then)
            elif cache in wanted:
                kept[cache] = joined(inputs[cache], value)
            elif cache is None or name in wanted:
                kept[name] = value
        return kept

    def _compare(self, run: Run, name: str, fed: Array, recorded: Array) -> None:
        same = fed.shape == recorded.shape and np.allclose(fed, recorded, CLOSE, CLOSE, equal_nan=True)
        if not same:
            raise RunError(
                f"graph {run.graph}, {self._label(run)}: "
                f"the loop feeds another {name} than the reference recorded"
            )

    def _label(self, run: Run) -> str:
        if run is self.program.decode:
            return f"image{len(self._decoded)}"
        if "{index}" not in self.manifest.contracts[run.graph].stage:
            return run.stage
        what = "scale" if run.stage.startswith(stages.SCALE) else "step"
        return f"{what}{run.index}"

    def _slack(self, run: Run, inputs: Values) -> dict[str, Array]:
        predicted = self.manifest.contracts[run.graph].predicted
        if predicted is None:
            return {}
        (output,) = (name for name in places(self.manifest, run) if name.endswith(OUT))
        x = inputs[output.removesuffix(OUT)]
        place = _place(predicted, run)
        halves = self.tensors.get(place, np.zeros(()))
        if halves.size != 2 * x.size or halves.shape[-1] != 2 * x.shape[-1]:
            raise InputError(f"{place}: expected {2 * x.size} numbers, found {list(halves.shape)}")
        eps = np.split(halves, 2, axis=-1)[0].reshape(x.shape)
        return {output: step_slack(x, eps, inputs["coefficients"])}


def step_slack(x: Array, eps: Array, coefficients: Array) -> Array:
    """How far one denoising step moves if the predicted noise is off by ``EPS_ROUNDING``.

    The noisiest step multiplies x - eps by 2e4 before it clamps to [-1, 1]: next to zero,
    float32 rounding alone decides what comes out. Steps of tokens (a row of coefficients each) do not clamp.
    """
    bound = math.inf if coefficients.ndim > 1 else 1.0
    recip, recipm1, coef1 = (float(c) for c in coefficients.ravel()[:3])
    off = EPS_ROUNDING * float(np.abs(eps).max())
    x0, above, below = (np.clip(recip * x - recipm1 * (eps + d), -bound, bound) for d in (0.0, off, -off))
    return abs(coef1) * np.maximum(np.abs(above - x0), np.abs(below - x0))
