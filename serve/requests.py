"""A request for pictures: the contract's fields to what is to be drawn."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hart_runtime.common.errors import InputError, shown
from hart_runtime.common.settings import LIMITS, SamplingSettings
from hart_runtime.runtime.call import checked_settings
from hart_runtime.runtime.pictures import Source
from hart_runtime.serve.errors import Refusal, bad_field, of_input
from hart_runtime.serve.fields import Field
from hart_runtime.serve.messages import Encoding
from hart_runtime.serve.models import Model, spread

SPELLED = {"num_images": "n"}
"""Fields that the library calls otherwise."""
AS_EXPORTED = ("auto", "standard")
"""Words of the contract for the settings that a bundle has of itself."""
MOST_SEED = 2**32
"""Of seeds that the server chooses; JavaScript reads them as they are."""


@dataclass(frozen=True)
class Asked:
    """What a client wants, and the server can do."""

    model: Model
    prompt: str
    """Or the full name of a class."""
    n: int
    seed: int
    """Of the first picture; the next has ``seed + 1``."""
    settings: SamplingSettings
    final: Encoding
    partial: Encoding
    stream: bool
    scales: tuple[int, ...]
    """After which the pictures are shown, in order."""
    quality: str
    """The name of the settings that are the model's here."""
    identifier: str | None
    """The client's word for its user, which is handed back and not kept."""
    source: Source | None = None
    """The given picture that they go on from."""

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.n)


def parsed(raw: bytes) -> object:
    """The JSON of a body.

    Raises:
        Refusal: it is none: NaN and names that stand twice included.
    """
    try:
        return json.loads(raw.decode(), parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError:
        raise Refusal(400, "the body: is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Refusal(400, f"the body: expected JSON, found none ({why})", code="invalid_json") from None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def asked_for(given: Mapping[str, Any], models: Mapping[str, Model], label: str | None = None) -> Asked:
    """What the fields of a request stand for.

    Args:
        given: as :func:`hart_runtime.serve.fields.checked` returns them.
        models: by name; the first is drawn with where none is named.
        label: the class that is drawn where none is named; None where one has to be.

    Raises:
        Refusal: one of them cannot be honoured; with the field, what was found and what is allowed.
    """
    model = _model(given.get("model"), models)
    prompt = _drawn(given, model, label)
    sizes = {"auto": model, **model.sizes}
    if (size := given.get("size", "auto")) not in sizes:
        known = " or ".join(model.sizes)
        raise bad_field("size", f"{model.name} draws {known} (or auto), found {shown(size)}")
    model = sizes[size]
    n, seed = given.get("n", 1), given.get("seed")
    if seed is None:
        seed = secrets.randbelow(MOST_SEED)
    quality, preset = _quality(given, model)
    overrides = {name: given[name] for name in LIMITS if name in given}
    try:
        settings = checked_settings(
            model.manifest,
            [prompt],
            seed=seed,
            num_images=n,
            preset=preset,
            speed=given.get("speed"),
            **overrides,
        )
    except InputError as error:
        raise of_input(error, SPELLED) from None
    final, partial = _encodings(given)
    return Asked(
        model=model,
        prompt=prompt,
        n=n,
        seed=seed,
        settings=settings,
        final=final,
        partial=partial,
        stream=given.get("stream", False),
        scales=_scales(given, model, settings),
        quality=quality,
        identifier=given.get("safety_identifier", given.get("user")),
    )


def _drawn(given: Mapping[str, Any], model: Model, default: str | None) -> str:
    """The prompt, or the full name of a class, which clients that know no label give as one."""
    if model.classes is None:
        if "label" in given:
            raise bad_field(
                "label", f"{model.name} draws from a prompt, and has no classes", "unsupported_value"
            )
        if "prompt" not in given:
            raise Refusal(400, "prompt: is required", "prompt", "missing_required_parameter")
        return str(given["prompt"])
    named = {name: given[name] for name in ("label", "prompt") if given.get(name, "") != ""}
    if not named and default is not None:
        return model.classes.words(default)
    if not named:
        raise Refusal(400, "label: is required", "label", "missing_required_parameter")
    found = {}
    for name, label in named.items():
        try:
            found[name] = model.classes.words(label)
        except InputError as error:
            raise bad_field(name, str(error).replace("`", "")) from None
    first, *others = found.values()
    if any(other != first for other in others):
        raise bad_field("prompt", f"label is {first}, found {others[0]}; give one of them")
    return first


def _model(name: str | None, models: Mapping[str, Model]) -> Model:
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise Refusal(
            404,
            f"model: there is no {shown(name)}, there are {', '.join(models)}",
            "model",
            "model_not_found",
        )
    return models[name]


def _quality(given: Mapping[str, Any], model: Model) -> tuple[str, str | None]:
    """What the answer calls it, and the preset of the model behind it: none for its own settings."""
    asked = given.get("quality", AS_EXPORTED[0])
    if asked in AS_EXPORTED:
        return AS_EXPORTED[0], None
    presets = model.manifest.presets
    if asked not in presets:
        known = " or ".join((*AS_EXPORTED, *presets))
        raise bad_field("quality", f"{model.name} draws {known}, found {shown(asked)}", "unsupported_value")
    return str(asked), str(asked)


def _scales(given: Mapping[str, Any], model: Model, settings: SamplingSettings) -> tuple[int, ...]:
    """Which scales are shown; any number as an extra, where the contract has up to three."""
    count, drawn = given.get("partial_images", 0), model.manifest.drawn(settings)
    if not 0 <= count <= len(drawn):
        allowed = f"expected 0 to {len(drawn)} (the {model.manifest.draws}s of {model.name})"
        raise bad_field("partial_images", f"{allowed}, found {shown(count)}")
    if count and not given.get("stream", False):
        raise bad_field("partial_images", f"needs stream: true, found {count} without it")
    return spread(drawn, count)


def _encodings(given: Mapping[str, Any]) -> tuple[Encoding, Encoding]:
    """Of the picture, and of what is shown before it: JPEG, which takes no time, unless asked otherwise."""
    name, compression = given.get("output_format"), given.get("output_compression", 100)
    if name in (None, "png") and compression != 100:
        raise bad_field("output_compression", f"is for jpeg and webp, found {compression} for png")
    final = Encoding(name or "png", compression)
    return final, final if name else Encoding("jpeg")


def schema(fields: Mapping[str, Field], required: Sequence[str]) -> dict[str, Any]:
    """Of a request's body, for the OpenAPI document."""
    described = {name: field.schema for name, field in fields.items()}
    for name in required:
        described[name] = described[name]["anyOf"][0]
    return {
        "type": "object",
        "properties": described,
        "required": [*required],
        "additionalProperties": False,
    }
