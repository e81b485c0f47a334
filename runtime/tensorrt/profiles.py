"""Optimization profiles: which shapes an engine is built for. Plain data, no TensorRT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.contract import Scales
from hart_runtime.runtime.families.names import FAST, TRANSFORMER
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.shapes import Dims, Shape, evaluate, shape_of

LARGEST_TOP_K = 3840
"""TensorRT's TopK goes no further."""


@dataclass(frozen=True)
class Range:
    """Smallest, most important and largest shape of one input (or value, of a shape input)."""

    min: Shape
    opt: Shape
    max: Shape

    @property
    def rises(self) -> bool:
        """Whether it is a range: of one rank, and from the smallest to the largest."""
        return len(self.min) == len(self.opt) == len(self.max) and all(
            0 <= low <= most <= high for low, most, high in zip(self.min, self.opt, self.max, strict=True)
        )

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies inside."""
        return len(shape) == len(self.min) and all(
            low <= n <= high for low, n, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class Profile:
    """One optimization profile of an engine."""

    name: str
    shapes: dict[str, Range]
    """By input; every input has one."""
    values: dict[str, Range] = field(default_factory=dict)
    """Of the inputs that shapes depend on."""


def scale_rows(
    manifest: Manifest, name: str, batch: int, settings: SamplingSettings | None = None
) -> list[tuple[str, Dims]]:
    """When a graph runs, with the dimensions it has then; one nameless row if it is always alike."""
    once = manifest.contract(name).scales is Scales.ONCE
    rows = manifest.dims_of(name, batch, settings)
    return [("any" if once else f"scale{k}", dims) for k, dims in enumerate(rows)]


def settings_run(manifest: Manifest, name: str, keep: str | None) -> list[SamplingSettings]:
    """Settings that a graph is run with, as far as its dimensions depend on them, the usual ones first.

    Args:
        keep: shares of tokens that take part where tokens are left out; None where none are. Then guidance
            may be left out of any number of scales, too.
    """
    exact = replace(manifest.sampling, prune=False, unguided_scales=0)
    if keep is None or name == TRANSFORMER:
        return [exact]
    pruned = replace(exact, prune=True, keep=keep)
    unguided = replace(pruned, unguided_scales=len(manifest.model.patch_nums))
    return [pruned, unguided] if name == FAST else [exact, unguided]


def make_profiles(
    manifest: Manifest,
    name: str,
    batches: tuple[int, int],
    per_scale: bool,
    top_k: tuple[int, int] | None = None,
    keep: str | None = None,
) -> list[Profile]:
    """Profiles of a graph that cover every scale and every batch from ``batches[0]`` to ``batches[1]``.

    Where the builder finds one row at the first scale and more at others, it orders some products
    differently for it and keeps a second copy of their weights: a quarter of a transformer's, most of the
    sampler's. So a dimension that is one there and more later gets room for two.

    Args:
        batches: smallest and largest; from 1 on for graphs that run one by one.
        per_scale: one profile per scale with its exact shapes, tuned for the smallest batch;
            otherwise a single one, tuned for the last scale.
        top_k: smallest and largest number of codes kept, beside those that the bundle's settings ask for.
        keep: as :func:`settings_run` takes it.
    """
    if manifest.contract(name).one_by_one:
        batches = (1, batches[1])
    every = [
        scale_rows(manifest, name, batch, settings)
        for settings in settings_run(manifest, name, keep)
        for batch in batches
    ]
    rows = [(found[0][0], [dims for _, dims in found]) for found in zip(*every, strict=True)]
    values = _values(manifest, name, len(rows), top_k)
    if not per_scale:
        shapes = _shapes(manifest, name, [dims for _, alike in rows for dims in alike], rows[-1][1][0])
        return [Profile("all", shapes, {key: _spanned(ranges) for key, ranges in values.items()})]
    last = rows[-1][1][1]
    profiles = []
    for number, (label, alike) in enumerate(rows):
        smallest, largest, *_ = alike
        room = {key: 2 if n == 1 < last.get(key, 1) else n for key, n in largest.items()}
        fixed = {key: ranges[number] for key, ranges in values.items()}
        profiles.append(Profile(label, _shapes(manifest, name, [*alike, room], smallest), fixed))
    return profiles


def choose(
    profiles: Iterable[Profile], shapes: Mapping[str, Shape], values: Mapping[str, Shape] | None = None
) -> int:
    """Number of the profile that holds all these input shapes, and values of inputs on the host.

    Of several the one that is tuned for most of their dimensions.

    Raises:
        ValueError: none does; the message names what does not fit.
    """
    reasons, fitting = [], []
    for number, profile in enumerate(profiles):
        found = [(key, profile.shapes[key], shape) for key, shape in shapes.items()]
        found += [(key, profile.values[key], v) for key, v in (values or {}).items() if key in profile.values]
        outside = [
            f"{key} {held.min} to {held.max}, found {it}" for key, held, it in found if not held.holds(it)
        ]
        if outside:
            reasons.append(f"{profile.name}: {outside[0]}")
            continue
        off = sum(n != best for _, held, it in found for n, best in zip(it, held.opt, strict=True))
        fitting.append((off, number))
    if fitting:
        return min(fitting)[1]
    raise ValueError("; ".join(reasons) or "the engine has no profile")


def _values(
    manifest: Manifest, name: str, scales: int, top_k: tuple[int, int] | None
) -> dict[str, list[Range]]:
    """By input that shapes depend on, the range of its values at each scale: numbers of codes kept.

    What the bundle's settings fix is built for as it is; a range is only for who asks for it.
    """
    found: dict[str, list[Range]] = {key: [] for key in sorted(manifest.contract(name).deciding())}
    program = manifest.program(manifest.sampling, 1) if found else None
    runs = [run for run in program.runs() if run.graph == name] if program else []
    for key, ranges in found.items():
        for run in runs[:scales]:
            fixed = tuple(min(int(n), LARGEST_TOP_K) for n in run.constants[key])
            asked = [Range((n,), fixed, (n,)) for n in top_k or ()]
            ranges.append(_spanned([Range(fixed, fixed, fixed), *asked]))
    return found


def _spanned(ranges: Sequence[Range]) -> Range:
    """From the smallest to the largest of several, tuned for the last scale's or what is fixed."""
    low = tuple(min(sizes) for sizes in zip(*(r.min for r in ranges), strict=True))
    high = tuple(max(sizes) for sizes in zip(*(r.max for r in ranges), strict=True))
    return Range(low, ranges[-1].opt, high)


def _shapes(manifest: Manifest, name: str, rows: list[Dims], best: Dims) -> dict[str, Range]:
    """Of every input, covering all of these dimensions, those of recordings too, and tuned for the best."""
    sizes, replayed = manifest.model.sizes, manifest.contract(name).replayed
    recorded = [dims | {d: evaluate(size, sizes | dims) for d, size in replayed.items()} for dims in rows]
    shapes = {}
    for spec in manifest.graphs[name].inputs:
        found = [shape_of(spec, dims) for dims in (*rows, *recorded)]
        low = tuple(min(sizes) for sizes in zip(*found, strict=True))
        high = tuple(max(sizes) for sizes in zip(*found, strict=True))
        shapes[spec.name] = Range(low, shape_of(spec, best), high)
    return shapes
