"""What every request passes first: one plain ASGI layer, so that no route can be without it.

It is no middleware of Starlette's, behind which nobody hears that a client has gone.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from hart_runtime.serve.errors import Refusal

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/editor.js": ("editor.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/png.js": ("png.js", "text/javascript"),
    "/server.js": ("server.js", "text/javascript"),
}
"""All files that there are, with what they are."""
OPEN = frozenset(["/health", "/ready", *PAGE])
"""Paths that need no key: how the server is, and the page, which asks for the key."""
MOST_BODY = 1 << 20
"""Bytes: a prompt of 32 000 characters, each as an escape, and everything else."""
EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
MOST_UPLOAD = 32 << 20
"""Bytes of a request to one of these, which bring pictures."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""On every answer."""


@dataclass(frozen=True)
class Rules:
    """Who may ask."""

    key: str | None = None
    """Without one everybody may who reaches the address."""
    hosts: Collection[str] | None = LOOPBACK
    """Names that the server may be called by; None for any. Others are how a web page elsewhere, whose name
    was made to point here, would be answered (DNS rebinding)."""
    origins: Collection[str] = ()
    """Of web pages elsewhere that may ask."""
    seconds: float = 660.0
    """Until a request is cut off, whatever its client is slow at: sending or reading."""


class Guard:
    """Refuses what may not be asked, bounds bodies, and names every request."""

    def __init__(self, app: App, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["name"] = name
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        added = [*HEADERS.items(), ("x-request-id", name), *self._shared(headers.get("origin"))]
        encoded = [(key.lower().encode(), value.encode()) for key, value in added]

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *encoded]
            await send(message)

        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))  # uvicorn puts it in front
            self._check_caller(scope["method"], path, headers)
            most = MOST_UPLOAD if path in (EDITS, VARIATIONS) else MOST_BODY
            bounded = _Bounded(receive, headers.get("content-length"), most)
        except Refusal as refusal:
            await answered(refusal)(scope, receive, told)
            return
        if scope["method"] == "OPTIONS" and headers.get("origin") in self.rules.origins:
            await JSONResponse({})(scope, receive, told)
            return
        try:
            await asyncio.wait_for(self.app(scope, bounded, told), self.rules.seconds)
        except asyncio.TimeoutError:  # uvicorn closes the connection
            log.warning("a client was too slow", extra={"request_id": name})

    def _check_caller(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raises Refusal."""
        rules = self.rules
        if rules.hosts is not None and _host(headers.get("host", "")) not in rules.hosts:
            raise Refusal(
                400, f"Host: this server is called {' or '.join(rules.hosts)}", "host", "host_not_allowed"
            )
        own = headers.get("host", "")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != own and origin not in rules.origins
        site = headers.get("sec-fetch-site", "same-origin")
        if method not in ("GET", "HEAD") and (
            foreign or (origin is None and site not in ("same-origin", "none"))
        ):
            raise Refusal(403, "Origin: pages elsewhere may not ask this server", None, "origin_not_allowed")
        if method == "OPTIONS" or rules.key is None or path in OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("latin-1"), rules.key.encode()
        ):
            raise Refusal(
                401,
                "Authorization: expected Bearer and this server's API key",
                None,
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )

    def _shared(self, origin: str | None) -> Iterator[tuple[str, str]]:
        """What lets a page elsewhere ask, if it is one of those named."""
        if origin in self.rules.origins and origin is not None:
            yield "Access-Control-Allow-Origin", origin
            yield "Access-Control-Allow-Headers", "authorization, content-type"
            yield "Vary", "Origin"


class _Bounded:
    """A body of no more than ``most`` bytes, whatever it says of itself."""

    def __init__(self, receive: Receive, length: str | None, most: int) -> None:
        self.receive, self.most, self.left = receive, most, most
        if length is not None and length.isdigit() and (len(length) > 15 or int(length) > most):
            raise _too_large(most)

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise _too_large(self.most)
        return message


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body: expected at most {most} bytes", code="body_too_large")


def _host(header: str) -> str:
    """Without its port, in small letters."""
    name = header.lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


def answered(refusal: Refusal) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(refusal.body(), refusal.status, dict(refusal.headers))
