"""The fields of a request as a table: of what kind each is, what is allowed, and why the rest is refused.

What cannot be honoured is refused with its reason, never silently dropped; null stands for a field that is
not there. The same table is the OpenAPI document's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hart_runtime.common.errors import LONGEST, shown
from hart_runtime.common.other_names import told_of_another
from hart_runtime.common.settings import GUIDANCE_SCHEDULES, SPEEDS
from hart_runtime.runtime.pictures import FITS
from hart_runtime.serve.errors import Refusal, bad_field

MOST_CHARACTERS, MOST_PICTURES, MOST_IDENTIFIER = 32_000, 10, 512
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", bytes: "a file"}
SCHEMAS = {str: "string", int: "integer", float: "number", bool: "boolean", bytes: "string"}


@dataclass(frozen=True)
class Field:
    """One field. Without ``kinds`` it is known, and refused whatever it holds."""

    kinds: tuple[type, ...] = ()
    low: float | None = None
    high: float | None = None
    """Limits of a number; of a text, how many characters it has."""
    words: tuple[str, ...] = ()
    """What a text may be."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Words of the contract that are not honoured, and why."""
    why: str = ""
    """Why the whole field is refused."""

    def check(self, name: str, value: Any) -> Any:
        """The value, of the first of its kinds; raises Refusal."""
        if not self.kinds:
            raise bad_field(name, f"{self.why}; found {shown(value)}", "unsupported_value")
        if type(value) not in self.kinds and not (type(value) is int and float in self.kinds):
            kinds = " or ".join(WORDS[kind] for kind in self.kinds)
            raise bad_field(name, f"expected {kinds}, found {_kind(value)}", "invalid_type")
        if isinstance(value, str):
            self._check_text(name, value)
        elif not isinstance(value, bool | bytes):
            self._check_number(name, value)
        return float(value) if self.kinds == (float,) else value

    def _check_text(self, name: str, value: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad_field(name, "expected text, found half of a surrogate pair") from None
        if self.words and value not in self.words:
            allowed = f"expected {' or '.join(self.words)}, found {shown(value)}"
            why = self.refused.get(value)
            code = "unsupported_value" if why else "invalid_value"
            raise bad_field(name, f"{allowed}{f': {why}' if why else ''}", code)
        if self.high is not None and len(value) > self.high:
            raise bad_field(name, f"expected at most {self.high:.0f} characters, found {len(value)}")

    def _check_number(self, name: str, value: float) -> None:
        if self.low is not None and self.high is not None and not self.low <= value <= self.high:
            raise bad_field(name, f"expected {self.low:g} to {self.high:g}, found {shown(value)}")

    @property
    def schema(self) -> dict[str, Any]:
        """As OpenAPI describes it."""
        kinds = [{"type": SCHEMAS[kind], **self._limits(kind)} for kind in self.kinds]
        return {"anyOf": [*kinds, {"type": "null"}], **({"description": self.why} if self.why else {})}

    def _limits(self, kind: type) -> dict[str, Any]:
        if kind is str:
            return {"enum": list(self.words)} if self.words else {"maxLength": self.high or LONGEST}
        if kind is bytes:
            return {"format": "binary"}
        return {} if self.low is None else {"minimum": self.low, "maximum": self.high}


NO_EFFORT = "this model has one way to draw"
NO_GIF = "this server draws still pictures"
_SETTING = "see the options of hart-run"

FIELDS: dict[str, Field] = {
    "prompt": Field((str,), high=MOST_CHARACTERS),
    "model": Field((str,), high=MOST_IDENTIFIER),
    "n": Field((int,), 1, MOST_PICTURES),
    "size": Field((str,), high=MOST_IDENTIFIER),
    "quality": Field((str,), high=MOST_IDENTIFIER),  # the model's presets
    "background": Field(
        (str,), words=("auto", "opaque"), refused={"transparent": "this model draws every pixel"}
    ),
    "output_format": Field(
        (str,), words=("png", "jpeg", "webp"), refused=dict.fromkeys(("gif", "svg"), NO_GIF)
    ),
    "output_compression": Field((int,), 0, 100),
    "response_format": Field(
        (str,),
        words=("b64_json",),
        refused={"url": "this server keeps no pictures that an address could name"},
    ),
    "stream": Field((bool,)),
    "partial_images": Field((int,)),  # up to the model's scales
    "moderation": Field(
        (str,), words=("auto",), refused={"low": "how prompts are screened is up to who runs this server"}
    ),
    "style": Field(why="this model has one style, which the prompt decides"),
    "user": Field((str,), high=MOST_IDENTIFIER),
    "safety_identifier": Field((str,), high=MOST_IDENTIFIER),
    "complexity": Field(why=NO_EFFORT),
    "frame_count": Field(why=NO_GIF),
    "frame_duration_ms": Field(why=NO_GIF),
    "svg": Field(why=NO_GIF),
    # Ours.
    "seed": Field((int,)),
    "guidance": Field((float,), why=_SETTING),
    "top_k": Field((int,), why=_SETTING),
    "top_p": Field((float,), why=_SETTING),
    "smooth": Field((bool,), why=_SETTING),
    "residual": Field((bool,), why=_SETTING),
    "steps": Field((str, int), why=_SETTING),
    "prune": Field((bool,), why=_SETTING),
    "keep": Field((str,), high=MOST_IDENTIFIER, why=_SETTING),
    "unguided_scales": Field((int,), why=_SETTING),
    "iterations": Field((int,), why=_SETTING),
    "guidance_schedule": Field((str,), words=GUIDANCE_SCHEDULES, why=_SETTING),
    "temperature": Field((float,), why=_SETTING),
    "speed": Field((str,), words=tuple(SPEEDS), why=_SETTING),
    "label": Field((str, int), high=MOST_IDENTIFIER),
    "negative": Field(why="guidance is away from the empty prompt, and this model was trained with no other"),
}
"""OpenAI's, and the project's own extras, which clients send as ``extra_body``."""
EDIT_FIELDS: dict[str, Field] = {
    "image": Field((bytes,)),
    "mask": Field((bytes,)),
    **FIELDS,
    "input_fidelity": Field(
        (str,), words=("low",), refused={"high": "what is kept is kept as it is, and the rest is drawn anew"}
    ),
    "markup": Field(why="this model reads nothing that is written over a picture; give a mask"),
    # Ours.
    "outpaint": Field((str,), high=MOST_IDENTIFIER, why=_SETTING),
    "vary": Field((int,), why=_SETTING),
    "anew": Field((int,), why=_SETTING),
    "fit": Field((str,), words=FITS, why=_SETTING),
    "paste": Field((bool,), why=_SETTING),
}
"""The same of requests that give a picture."""


def checked(body: object, fields: Mapping[str, Field] = FIELDS) -> dict[str, Any]:
    """The fields of a request by name, each of its kind; those that are null are left out.

    Raises:
        Refusal: with the field, what was found and what is allowed.
    """
    if not isinstance(body, dict):
        raise Refusal(400, f"the body: expected a JSON object, found {_kind(body)}", code="invalid_type")
    if unknown := [name for name in body if name not in fields]:
        listed = ", ".join(map(shown, unknown[:10]))
        raise Refusal(
            400,
            f"unknown {listed}; there are {', '.join(fields)}{told_of_another(unknown[0], fields)}",
            unknown[0] if unknown[0].isidentifier() and len(unknown[0]) <= LONGEST else None,
            "unknown_parameter",
        )
    return {name: fields[name].check(name, value) for name, value in body.items() if value is not None}


def _kind(value: object) -> str:
    """What a value is, without its contents where they may be somebody's words."""
    kinds = {dict: "an object", list: "a list", type(None): "null", bytes: "a file"}
    return f"text ({shown(value)})" if isinstance(value, str) else kinds.get(type(value)) or shown(value)
