"""Requests that bring a picture: forms in parts, as OpenAI's client sends edits.

Nothing of them is written to a disk, and no address in them is looked at: a picture comes in the form or not
at all. What is held at a time is bounded, and pictures are unpacked one after the other, in a thread: the
event loop goes on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from hart_runtime.common.errors import InputError, first_line, shown
from hart_runtime.runtime.class_names import NONE
from hart_runtime.runtime.pictures import Source, margins_of, read_picture, source_of
from hart_runtime.serve.errors import NO_RETRY, Refusal, bad_field, busy, of_input
from hart_runtime.serve.fields import EDIT_FIELDS, MOST_CHARACTERS, Field, checked
from hart_runtime.serve.models import Model
from hart_runtime.serve.requests import Asked, asked_for
from hart_runtime.serve.scheduler import Scheduler
from hart_runtime.serve.security import MOST_UPLOAD

MOST_UPLOADS = 8
"""Requests that are read at a time; with what they hold in memory, 256 MB."""
MOST_SECONDS = 60
"""For one to come."""
MOST_PIXELS = 1 << 24
"""Of a picture or a mask, as large as 4096 x 4096."""
MOST_PARTS = 64
"""Files, and other fields; all those of the contract, each once, and its 16 pictures are fewer."""
LONGEST_NUMBER = 32
HOW = ("vary", "anew", "fit", "paste")
"""Fields that :func:`source_of` takes as they are."""


class Uploads:
    """Reads requests for edits."""

    def __init__(self, scheduler: Scheduler, models: Mapping[str, Model]) -> None:
        self.scheduler, self.models = scheduler, models
        self._reading = 0
        self._unpacking = asyncio.Lock()

    async def __call__(self, request: Request) -> Asked:
        """What a request asks for.

        Raises:
            Refusal: it cannot be read, or not be honoured.
        """
        if self._reading >= MOST_UPLOADS:
            raise busy(f"{self._reading} uploads", self.scheduler.wait())
        self._reading += 1
        try:
            given = checked(await _form(request), EDIT_FIELDS)
            asked = asked_for(given, self.models, NONE)
            if not asked.model.takes_pictures:
                raise bad_field(
                    "model",
                    f"{asked.model.name} takes no pictures, it has no encoder; who runs this server "
                    f"exports its checkpoint again, with one",
                    "unsupported_value",
                )
            if "image" not in given:
                raise Refusal(400, "image: is required", "image", "missing_required_parameter")
            async with self._unpacking:
                return replace(asked, source=await asyncio.to_thread(_source, asked.model, given))
        finally:
            self._reading -= 1


def _source(model: Model, given: Mapping[str, Any]) -> Source:
    """The given picture with what is to be drawn of it; raises Refusal."""
    try:
        how = {name: given[name] for name in HOW if name in given}
        if "outpaint" in given:
            how["outpaint"] = margins_of(given["outpaint"])
        image = read_picture(given["image"], "image", MOST_PIXELS)
        mask = read_picture(given["mask"], "mask", MOST_PIXELS) if "mask" in given else None
        if mask is not None and mask.mode != "RGBA":  # which side of it is meant is not guessed
            raise bad_field(
                "mask", "expected a PNG with transparency, which is what is drawn; found none in it"
            )
        return source_of(model.manifest.model, image, mask, **how)
    except InputError as error:
        raise of_input(error, {}) from None


class _InMemory(MultiPartParser):
    """Starlette's own writes files beyond a size."""

    spool_max_size = MOST_UPLOAD


async def _form(request: Request) -> dict[str, Any]:
    """Values by name: bytes of files, and what texts stand for.

    Raises:
        Refusal: it is no form, or something stands in it twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal(
            415,
            f"Content-Type: expected multipart/form-data, found {shown(kind)}",
            code="unsupported_media_type",
        )
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=MOST_PARTS,
        max_fields=MOST_PARTS,
        max_part_size=4 * MOST_CHARACTERS,
    )
    try:
        form = await asyncio.wait_for(parser.parse(), MOST_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal(
            408, f"the body: did not come within {MOST_SECONDS} s", code="body_timeout", headers=NO_RETRY
        ) from None
    except (MultiPartException, ValueError) as error:
        why = error.message if isinstance(error, MultiPartException) else first_line(error)
        raise Refusal(400, f"the body: expected a form in parts ({why})", code="invalid_form") from None
    found: dict[str, list[Any]] = {}
    for name, value in form.multi_items():
        found.setdefault(_field_of(name), []).append(value)
    return {name: await _value(name, values) for name, values in found.items()}


def _field_of(name: str) -> str:
    """Lists and objects come as parts of their own, ``image[]`` and ``svg[model]``."""
    field = name.partition("[")[0]
    return field if field in EDIT_FIELDS else name


async def _value(name: str, values: list[Any]) -> Any:
    """What the parts of a field stand for."""
    field = EDIT_FIELDS.get(name, Field())
    if name == "outpaint" and all(isinstance(value, str) for value in values):
        return ",".join(values)  # a list of numbers
    if bytes in field.kinds and len(values) > 1:
        raise bad_field(
            name, f"this model goes on from one picture, found {len(values)}", "unsupported_value"
        )
    if field.kinds and len(values) > 1:
        raise bad_field(name, "stands in the form twice")
    value = values[0]
    if isinstance(value, UploadFile):
        return await value.read()
    return _typed(field, value)


def _typed(field: Field, text: str) -> Any:
    """A text as the number or the truth that its field wants; what is none stays, and is refused as such."""
    if bool in field.kinds:
        return {"true": True, "false": False}.get(text, text)
    if str in field.kinds or len(text) > LONGEST_NUMBER:
        return text
    if int in field.kinds and re.fullmatch(r"-?\d+", text, re.ASCII):
        return int(text)
    if float in field.kinds:
        try:
            return float(text)
        except ValueError:
            pass
    return text
