"""What a client is told when it gets no picture: OpenAI's error object and status codes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hart_runtime.common.errors import InputError

LEAST_WAIT, MOST_WAIT = 1, 120
"""Seconds that a client is told to wait; told of more, OpenAI's client gives up."""
NO_RETRY = {"x-should-retry": "false"}
INVALID, SERVER, BUSY = "invalid_request_error", "server_error", "rate_limit_error"


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818
    """A request that is not answered with a picture.

    The message is one sentence: the field, what was found, what is allowed. It holds no path, no name of this
    machine and no other client's words.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def kind(self) -> str:
        """OpenAI's type of error, which follows from the status."""
        return BUSY if self.status == 429 else SERVER if self.status >= 500 else INVALID

    def body(self) -> dict[str, object]:
        """The error object, which clients turn into an exception by the status, or in a stream by its key."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


def bad_field(name: str, said: str, code: str = "invalid_value") -> Refusal:
    """A field that cannot be honoured; ``said`` is what is allowed, and what was found."""
    return Refusal(400, f"{name}: {said}", name, code)


def of_input(error: InputError, spelled: Mapping[str, str]) -> Refusal:
    """What the library refused, in the words of the request.

    Args:
        spelled: fields for parameters of the library that are called otherwise there.
    """
    message = re.sub(r"`(\w+)([^`]*)`", lambda found: spelled.get(found[1], found[1]) + found[2], str(error))
    named = re.match(r"(\w+)[:=]", message)
    return Refusal(400, message, named[1] if named else "prompt", "invalid_value")


def failed(again: bool = True) -> Refusal:
    """Why is in the log of the server, and nobody else's business.

    Args:
        again: whether another try may end otherwise; OpenAI's client makes two of its own.
    """
    headers = {} if again else NO_RETRY
    return Refusal(500, "the drawing failed; the server's log says why", code="server_error", headers=headers)


def blocked() -> Refusal:
    """The safety model's word."""
    return Refusal(
        400,
        "prompt: this server's safety model says that it breaks the guideline; change what is asked for",
        "prompt",
        "moderation_blocked",
    )


def busy(waiting: str, wait: float) -> Refusal:
    """No room in the queue for so many seconds, as far as can be told."""
    seconds = min(max(math.ceil(wait), LEAST_WAIT), MOST_WAIT)
    return Refusal(
        429,
        f"{waiting} are waiting and there is no room for more; try again in {seconds} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def stopping() -> Refusal:
    """The server ends."""
    return Refusal(
        503,
        "the server is shutting down and takes no new requests",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )


def too_late(seconds: float) -> Refusal:
    """A deadline of the server, which is not worth another try at once."""
    return Refusal(
        503,
        f"the picture was not drawn within the {seconds:g} s that this server gives a request",
        code="deadline_exceeded",
        headers=NO_RETRY,
    )
