"""The manifest: what a bundle says of itself, and what of that is checked before any other file is opened."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hart_runtime.common.checkpoint import LLM, TOKENIZER
from hart_runtime.common.checkpoint import TEXT_ENCODER as TEXT_NETWORK
from hart_runtime.common.errors import (
    InputError,
    either,
    known_names,
    listed,
    one_of,
    parameter,
    plain,
    shown,
    told_of,
)
from hart_runtime.common.files import read_regular
from hart_runtime.common.hashing import pieces_of
from hart_runtime.common.noise import NOISE_VERSION
from hart_runtime.common.precisions import FP32, PRECISIONS, Precision
from hart_runtime.common.pyramids import shrunk
from hart_runtime.common.records import read_record, read_value
from hart_runtime.common.settings import (
    DEFAULT_MAX_BATCH,
    EXACT,
    LESS,
    MOST_MAX_BATCH,
    SPEEDS,
    SamplingSettings,
    check_ranges,
    whole_settings_of,
)
from hart_runtime.common.text_files import decoded
from hart_runtime.common.weight_files import is_averaged
from hart_runtime.runtime.contract import Contract, Contracts, Scales, specs_at, specs_of
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import TEXT_ENCODER, TOKEN_IDS
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.program import Program, make_program
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import LARGEST_OWN, GraphSpec, ModelSpec, OtherSize, TensorSpec, check_model

SCHEMA_VERSION = 3
NOT_PRUNED = "this model's blocks are modulated, and the published pruning is for plain ones"
"""Why some models have no pruning."""
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileSpec:
    """A file that the manifest seals."""

    size: int
    sha256: tuple[str, ...]
    """Of each piece of :data:`hart_runtime.common.hashing.PIECE` bytes; one for most files."""

    @property
    def identity(self) -> str:
        """One hash for all pieces."""
        first, *more = self.sha256
        return hashlib.sha256("".join(self.sha256).encode()).hexdigest() if more else first


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``."""

    family: str
    """One of :data:`hart_runtime.runtime.families.FAMILIES`."""
    name: str
    precision: str
    """Name of the type of the matrix products, see :mod:`hart_runtime.common.precisions`."""
    max_batch: int
    model: ModelSpec
    sampling: SamplingSettings
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    checkpoint: dict[str, Any]
    """Where the weights came from: source, configuration, sha256 of each weight file."""
    tools: dict[str, str]
    """Versions of what wrote the bundle."""
    speeds: dict[str, SamplingSettings] = field(default_factory=dict)
    """What the checkpoint means by names of speeds, where it is not what they mean for most."""
    in_half: dict[str, float] = field(default_factory=dict)
    """Products of fp8 bundles that stay in half, and the error that was measured of each in 8 bits, see
    :mod:`hart_runtime.export.float8`."""
    other_sizes: tuple[OtherSize, ...] = ()
    """Of pictures that the same weights draw, see :meth:`at_size`."""
    noise: int = NOISE_VERSION
    """Version of the random numbers that seeds stand for."""
    schema: int = SCHEMA_VERSION

    @property
    def every_size(self) -> dict[int, Manifest]:
        """By pixels of a side, its own first: what the manifest of a bundle of that size alone would say."""
        found = {self.model.image_size: replace(self, other_sizes=())}
        for other in self.other_sizes:
            model = self.model.resized(other.patch_nums)
            graphs = {**self.graphs, **other.graphs}
            found[model.image_size] = replace(self, model=model, graphs=graphs, other_sizes=())
        return found

    def at_size(self, size: int | None) -> Manifest:
        """The manifest of one size of pictures; without one of the bundle's own.

        Raises:
            InputError: the bundle draws none of that size.
        """
        known = self.every_size
        chosen = self.model.image_size if size is None else plain(size)
        if type(chosen) is not int or chosen not in known:
            raise InputError(
                f"{parameter('size', size)}: bundle {self.name} draws {either([*map(str, known)])} pixels; "
                f"hart-export {parameter('size', 'N')} makes one that draws others"
            )
        return known[chosen]

    @property
    def required(self) -> dict[str, GraphSpec]:
        """Graphs that are not opened on demand: a pipeline holds these from the start."""
        return {name: spec for name, spec in self.graphs.items() if not self.contract(name).on_demand}

    @property
    def engined(self) -> dict[str, GraphSpec]:
        """Graphs that engines are built of."""
        return {name: spec for name, spec in self.graphs.items() if self.contract(name).engine}

    @property
    def kind(self) -> Precision:
        """What follows from the precision."""
        return PRECISIONS[self.precision]

    @property
    def contracts(self) -> Contracts:
        """What is true of the graphs of this family."""
        return FAMILIES[self.family].graphs

    def contract(self, graph: str) -> Contract:
        """What is true of a graph; of one that no family has, such as a benchmark's own, nothing special."""
        return self.contracts.get(graph) or Contract(graph, graph, (), ())

    @property
    def lacks(self) -> Mapping[str, str]:
        """Settings that have no effect on pictures of this family, and why."""
        own = {} if self.model.prunable else {"prune": NOT_PRUNED, "keep": NOT_PRUNED}
        return {**own, **FAMILIES[self.family].lacks}

    @property
    def presets(self) -> tuple[str, ...]:
        """Names of settings that this model's family has, see :meth:`preset`."""
        return tuple(FAMILIES[self.family].presets)

    def at_speed(self, name: str) -> dict[str, Any]:
        """What one of :data:`hart_runtime.common.settings.SPEEDS` stands for, as far as the model has it."""
        own = self.speeds.get(name)
        meant = {key: getattr(own, key) for key in LESS} if own else SPEEDS[name]
        return {key: value for key, value in meant.items() if key not in self.lacks}

    def preset(self, name: str | None) -> SamplingSettings:
        """Settings that have a name; without one the bundle's own. Raises InputError."""
        if name is None:
            return self.sampling
        known = FAMILIES[self.family].presets
        if not known:
            raise InputError(f"{parameter('preset', name)}: this model has none")
        one_of("preset", name, known)
        found = known[name]
        return replace(
            found,
            top_k=found.top_k and min(found.top_k, self.model.vocab_size),
            iterations=found.iterations and min(found.iterations, self.model.num_tokens),
        )

    @property
    def averaged(self) -> bool:
        """Whether it was exported from averaged weights (EMA)."""
        return any(map(is_averaged, [*self.checkpoint["weights"][LLM], self.sets[0]]))

    @property
    def sets(self) -> list[str]:
        """Keys of the transformer's file that whole sets of weights lie below, first of those exported."""
        return self.checkpoint.get("sets") or [""]

    @property
    def text_rows(self) -> int | None:
        """Rows of the text encoder's embedding; None in bundles without one."""
        described = self.checkpoint[TEXT_NETWORK] if TEXT_ENCODER in self.graphs else {}
        return described.get("vocab_size")

    @property
    def tables(self) -> dict[str, int]:
        """Rows of the tables that numbers are looked up in, by the input that brings them."""
        text = {TOKEN_IDS: rows} if (rows := self.text_rows) else {}
        return text | FAMILIES[self.family].tables(self.model)

    @property
    def draws(self) -> str:
        """What a step is called after which there is more of a picture to show."""
        return FAMILIES[self.family].draws

    def drawn(self, settings: SamplingSettings) -> list[int]:
        """Tokens of a picture that each scale, or each iteration, draws."""
        return [d["side"] ** 2 if "side" in d else d["chosen"] for d in self.scale_dims(1, settings)]

    def scale_dims(self, batch: int, settings: SamplingSettings | None = None) -> list[Dims]:
        """The free dimensions of graphs at each scale, with the bundle's settings or others."""
        return FAMILIES[self.family].dims(self.model, settings or self.sampling, batch)

    def dims_of(self, graph: str, batch: int, settings: SamplingSettings | None = None) -> list[Dims]:
        """The free dimensions of a graph in each of its runs, with the bundle's settings or others; a single
        one if nothing changes from scale to scale.
        """
        when, scales = self.contract(graph).scales, self.scale_dims(batch, settings)
        if when is Scales.ONCE:
            return [{"batch": batch, "guided": scales[-1]["guided"]}]
        return scales if when is Scales.ALL else scales[:-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Everything that formulas of the contract are made of, but the free dimensions."""
        return {
            **self.model.sizes,
            **FAMILIES[self.family].sizes(self.model, self.checkpoint),
            "weight": self.kind.weight_bytes,
            "block_weight": self.kind.block_bytes,
            "kept": self.kind.kept_bytes,
            "unchanged": self.kind.traced_bytes,  # graphs without products in int8
        }

    def program(self, settings: SamplingSettings, batch: int, edited: bool = False) -> Program:
        """What a drawing of ``batch`` pictures does.

        Args:
            edited: whether parts of given pictures are kept.
        """
        family = FAMILIES[self.family]
        steps = family.steps(self.model, settings, batch, edited)
        return make_program(batch, self.graphs, steps, family.decode)


def manifest_of(
    family: str,
    model: ModelSpec,
    precision: str = FP32,
    max_batch: int = DEFAULT_MAX_BATCH,
    sampling: SamplingSettings | None = None,
) -> Manifest:
    """The manifest that a model's export will have, from its sizes alone: without files and origin.

    Args:
        sampling: default settings; those of the published sampler if left out.
    """
    one_of("precision", precision, PRECISIONS)
    graphs = specs_of(FAMILIES[family].graphs, model, precision)
    settings = sampling or FAMILIES[family].sampling
    return Manifest(family, "planned", precision, max_batch, model, settings, graphs, {}, {}, {})


Same = Callable[[TensorSpec, TensorSpec], bool]


def check_contract(manifest: Manifest, source: str, same: Same = operator.eq) -> None:
    """Compare the graphs of a manifest with the contract: what the loop feeds and reads.

    Args:
        same: whether a tensor is as it should be; the exporter has spellings of its own.

    Raises:
        InputError: one is missing or unknown, or has other inputs or outputs; begins with ``source``.
    """
    contracts = {k: v for k, v in manifest.contracts.items() if not v.optional or k in manifest.graphs}
    own, precision = manifest.model, manifest.precision
    _check_graphs(specs_of(contracts, own, precision), manifest.graphs, source, same)
    for other in manifest.other_sizes:
        expected = specs_at(contracts, own, own.resized(other.patch_nums), precision)
        _check_graphs(expected, other.graphs, source, same)


def _check_graphs(
    expected: Mapping[str, GraphSpec], found: Mapping[str, GraphSpec], source: str, same: Same
) -> None:
    mend = "it was made by another version, export the bundle again"
    for what, names in (
        ("missing", expected.keys() - found.keys()),
        ("unknown", found.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{source}: graphs {listed(sorted(names))} {what}; {mend}")
    for name, spec in expected.items():
        if (spec.file, spec.forms) != (found[name].file, found[name].forms):
            raise InputError(
                f"{source}: graph {name}: files expected {spec.files}, "
                f"found {shown(found[name].files)}; {mend}"
            )
        for kind, wanted, there in (
            ("inputs", spec.inputs, found[name].inputs),
            ("outputs", spec.outputs, found[name].outputs),
        ):
            if difference := _first_difference(wanted, there, same):
                raise InputError(f"{source}: graph {name}: {kind} {difference}; {mend}")


def _first_difference(
    wanted: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...], same: Same
) -> str | None:
    for one, other in itertools.zip_longest(wanted, found):
        if one is None or other is None or not same(one, other):
            return f"expected {_said(one)}, found {_said(other)}"
    return None


def _said(tensor: TensorSpec | None) -> str:
    return f"{tensor.name} {tensor.dtype} {shown(list(tensor.shape))}" if tensor else "no more"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``; the last file of a bundle to be written."""
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle and its sha256; no other file is looked at.

    Raises:
        InputError: it has another schema, or cannot be used.
    """
    file = folder / MANIFEST
    try:
        raw = read_regular(file)
        values = json.loads(decoded(raw, str(file)))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a readable manifest ({error})") from None
    found = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{file}: not a bundle manifest, expected a schema number, found {shown(found)}")
    if found != SCHEMA_VERSION:
        newer = found > SCHEMA_VERSION
        raise InputError(
            f"{file}: schema {shown(found)} is {'newer' if newer else 'older'} than the {SCHEMA_VERSION} "
            f"this version reads; {'upgrade hart-runtime or ' if newer else ''}export the bundle again"
        )
    try:
        manifest = _parse(values, file)
    except InputError as error:
        raise InputError(f"{error}; export the bundle again") from None
    return manifest, hashlib.sha256(raw).hexdigest()


def _parse(values: dict[str, Any], file: Path) -> Manifest:
    manifest = read_record(Manifest, values, str(file), {SamplingSettings: settings_in})
    for name, value, known in (
        ("precision", manifest.precision, PRECISIONS),
        ("family", manifest.family, FAMILIES),
    ):
        if value not in known:
            raise InputError(f"{file}: {name}: expected {either([*known])}, found {shown(value)}")
    if manifest.noise != NOISE_VERSION:
        raise InputError(
            f"{file}: noise: expected {NOISE_VERSION}, found {manifest.noise}, "
            f"random numbers of another version, with which a seed stands for another picture"
        )
    if not 1 <= manifest.max_batch <= MOST_MAX_BATCH:
        raise InputError(f"{file}: max_batch: expected 1 to {MOST_MAX_BATCH}, found {manifest.max_batch}")
    _check_models(manifest, file)
    with told_of(f"{file}: sampling"):
        for settings in (manifest.sampling, *manifest.speeds.values()):
            for each in manifest.every_size.values():
                check_ranges(settings, each.model)
        known_names("speeds", manifest.speeds, SPEEDS.keys() - {EXACT})
    _check_origin(manifest.checkpoint, f"{file}: checkpoint")
    _check_pyramids(manifest, file)
    if TEXT_ENCODER in manifest.graphs:
        _check_text_rows(manifest.checkpoint, f"{file}: checkpoint")
    try:
        _ = manifest.sizes  # what is counted is made of the configurations
    except InputError as error:
        raise InputError(f"{file}: checkpoint: {str(error).removeprefix('manifest: ')}") from None
    for name, spec in manifest.files.items():
        check_file_spec(spec, f"{file}: files: {shown(name)}")
    return manifest


def _check_models(manifest: Manifest, file: Path) -> None:
    """That of the bundle's own size, and those of the others."""
    own = FAMILIES[manifest.family].own
    check_model(manifest.model, own, f"{file}: model")
    sizes = {manifest.model.image_size}
    for number, other in enumerate(manifest.other_sizes):
        place = f"{file}: other_sizes[{number}]"
        if not other.patch_nums:
            raise InputError(f"{place}: patch_nums: expected sides that do not shrink, found []")
        model = manifest.model.resized(other.patch_nums)
        check_model(model, own, place)
        if model.image_size in sizes:
            raise InputError(
                f"{place}: patch_nums: expected another size than {model.image_size} pixels again"
            )
        sizes.add(model.image_size)


def _check_origin(checkpoint: dict[str, Any], place: str) -> None:
    """Of what a checkpoint's description holds, that which is read."""
    read_value(str, checkpoint.get("source"), f"{place}.source")
    for network in (LLM, TOKENIZER):
        read_value(dict[str, Any], checkpoint.get(network), f"{place}.{network}")
    weights = read_value(dict[str, dict[str, str]], checkpoint.get("weights"), f"{place}.weights")
    if LLM not in weights:
        raise InputError(f"{place}.weights: {LLM} is missing")
    read_value(tuple[str, ...], checkpoint.get("sets", []), f"{place}.sets")
    prompt = read_value(dict[str, Any] | None, checkpoint.get("system_prompt"), f"{place}.system_prompt")
    if prompt is not None:
        read_value(str, prompt.get("sha256"), f"{place}.system_prompt.sha256")
        read_value(tuple[int, ...], prompt.get("tokens"), f"{place}.system_prompt.tokens")


def _check_pyramids(manifest: Manifest, file: Path) -> None:
    """Refuse scales, or an extent, that are not those of the weights: graphs would run with them, and draw
    other pictures.
    """
    described = manifest.checkpoint[LLM].get("patch_nums")
    if described is None:  # of masked tokens, whose sizes are those of the graphs
        return
    known = read_value(tuple[int, ...], described, f"{file}: checkpoint.{LLM}.patch_nums")
    if not known or known[-1] < 1:
        raise InputError(f"{file}: checkpoint.{LLM}.patch_nums: expected sides, found {shown([*known])}")
    for each in manifest.every_size.values():
        model, expected = each.model, shrunk(known, each.model.patch_nums[-1])
        if (model.patch_nums, model.reach) != (expected, known[-1]):
            raise InputError(
                f"{file}: patch_nums {shown([*model.patch_nums])} over an extent of {model.reach}: expected "
                f"{shown([*expected])} over {known[-1]}, as the weights know {shown([*known])}"
            )


def _check_text_rows(checkpoint: dict[str, Any], place: str) -> None:
    described = read_value(dict[str, Any], checkpoint.get(TEXT_NETWORK), f"{place}.{TEXT_NETWORK}")
    rows = read_value(int, described.get("vocab_size"), f"{place}.{TEXT_NETWORK}.vocab_size")
    most = LARGEST_OWN["vocab_size"]
    if not 1 <= rows <= most:
        raise InputError(f"{place}.{TEXT_NETWORK}.vocab_size: expected 1 to {most}, found {shown(rows)}")


def settings_in(value: Any, place: str) -> SamplingSettings:
    """Sampling settings as a record holds them; raises InputError, which begins with ``place``."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected an object, found {shown(value)}")
    return whole_settings_of(value, place)


def check_file_spec(spec: FileSpec, place: str) -> None:
    """Refuse a file without a hash for every piece of it."""
    if spec.size < 0 or len(spec.sha256) != pieces_of(spec.size):
        raise InputError(
            f"{place}: expected a hash for each piece, found {len(spec.sha256)} for {spec.size} bytes"
        )
    if other := [digest for digest in spec.sha256 if not SHA256.fullmatch(digest)]:
        raise InputError(f"{place}: expected 64 digits of a sha256, found {shown(other[0])}")
