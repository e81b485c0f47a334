"""The ``config.json`` of a Qwen2 text encoder: what is computed here, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hart_runtime.common.config import TextEncoderConfig, config_from_dict
from hart_runtime.common.errors import InputError, shown
from hart_runtime.common.json_files import object_in

MODELS = ("qwen2", "qwen2_vl")
ROPE_KEYS = ("rope_parameters", "rope_scaling")
"""Newer files, older files."""
BESIDE = {"rope_type", "partial_rotary_factor", "rotary_pct", "mrope_interleaved"}
"""Keys that say the same outside of these."""
SECTIONS = "mrope_section"
"""How positions are split between text, rows and columns; for text they are all equal."""
PLAIN = ("default", "mrope")
"""Rotary types without any scaling."""
NEUTRAL = {"factor": 1, "partial_rotary_factor": 1, "rotary_pct": 1, "attention_factor": 1}
"""Options that scale nothing at this value."""


def text_config_from_dict(values: Mapping[str, Any], source: str) -> TextEncoderConfig:
    """The parsed ``config.json`` of a text encoder, also where Qwen2-VL nests the text model's part.

    Raises:
        InputError: a key is missing or given twice with two values, or it asks for what the text encoder
            here does not compute.
    """
    outer, inner = dict(values), object_in(dict(values), "text_config", source)
    object_in(outer, "vision_config", source)
    whole = outer | {key: value for key, value in inner.items() if value is not None}
    ropes = []
    for prefix, part in (("", outer), ("text_config.", inner)):
        for key in ROPE_KEYS:
            ropes.append(object_in(part, key, f"{source}: {prefix}".rstrip(" .:")))
            _refuse_scaling(ropes[-1], f"{source}: {prefix}{key}: ")
        _refuse_scaling({key: part[key] for key in BESIDE & part.keys()}, f"{source}: {prefix}")
    _refuse_other_computations(whole, source)
    for part in (outer, inner):
        _one_of(
            "model_type", str(part.get("model_type") or "qwen2").removesuffix("_text"), MODELS, f"{source}: "
        )
    thetas = [part.get("rope_theta") for part in (outer, inner, *ropes)]
    theta = _agreed("rope_theta", thetas, source)
    if theta is None:
        raise InputError(f"{source}: missing rope_theta")
    for name in TextEncoderConfig.RANGES.keys() & inner.keys():
        _agreed(name, [outer.get(name), inner[name]], source)
    config = config_from_dict(TextEncoderConfig, {**whole, "rope_theta": theta}, source)
    _one_of("head_dim", whole.get("head_dim") or config.head_dim, (config.head_dim,), f"{source}: ")
    return config


def _refuse_other_computations(values: Mapping[str, Any], source: str) -> None:
    """Options of later models, each at the only value that is computed here."""
    for name, value in {"hidden_act": "silu", "use_sliding_window": False}.items():
        if values.get(name) is not None:
            _one_of(name, values[name], (value,), f"{source}: ")
    layers = values.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or {*map(str, layers)} - {"full_attention"}):
        raise InputError(f"{source}: layer_types: expected full_attention alone, found {shown(layers)}")


def _refuse_scaling(rope: Mapping[str, Any], place: str) -> None:
    """Rotary positions of any other kind make other features, which nothing else would tell of."""
    for key in ("rope_type", "type"):
        if rope.get(key) is not None:
            _one_of(key, rope[key], PLAIN, place)
    for key, value in rope.items():
        if key in {"rope_type", "type", "rope_theta", SECTIONS} or value is None:
            continue
        if key not in NEUTRAL or isinstance(value, bool) or value != NEUTRAL[key]:
            raise InputError(f"{place}{key}: expected rotary positions without scaling, found {shown(value)}")


def _agreed(name: str, found: list[Any], source: str) -> Any:
    """The one value of a key that may stand in several places."""
    given = [value for value in found if value is not None]
    if any(value != given[0] for value in given):
        raise InputError(f"{source}: {name}: given as {shown(given[0])} and otherwise elsewhere in the file")
    return given[0] if given else None


def _one_of(name: str, value: object, known: tuple[object, ...], place: str) -> None:
    if not any(value == one and type(value) is type(one) for one in known):
        raise InputError(f"{place}{name}: expected {' or '.join(map(repr, known))}, found {shown(value)}")
