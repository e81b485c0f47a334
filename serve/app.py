"""The routes: OpenAI's images API, how the server is, and the page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hart_runtime.common.errors import shown
from hart_runtime.common.version import __version__
from hart_runtime.serve.answers import STREAM_HEADERS, answer, event, events
from hart_runtime.serve.errors import NO_RETRY, Refusal, failed
from hart_runtime.serve.fields import EDIT_FIELDS, FIELDS, Field, checked
from hart_runtime.serve.metrics import GONE_STATUS, Metrics
from hart_runtime.serve.models import Model
from hart_runtime.serve.order import Order
from hart_runtime.serve.requests import Asked, asked_for, parsed, schema
from hart_runtime.serve.scheduler import Scheduler
from hart_runtime.serve.security import EDITS, PAGE, VARIATIONS, Receive, Scope, Send, answered
from hart_runtime.serve.uploads import Uploads

log = logging.getLogger(__name__)

MOST_SECONDS = 20
"""For a body to come."""


def create_app(scheduler: Scheduler, models: Mapping[str, Model], tell_prompts: bool = False) -> FastAPI:
    """The application of a server.

    Args:
        models: by name, as requests call them.
        tell_prompts: write prompts into the log.
    """
    app = FastAPI(
        title="hart-serve",
        version=__version__,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        telemetry={"auto_configure": False},
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(RequestValidationError, _not_routed)
    app.add_exception_handler(Exception, _broken)
    pictures, uploads = Pictures(scheduler, tell_prompts), Uploads(scheduler, models)

    async def words(request: Request) -> Asked:
        return asked_for(checked(parsed(await _body(request))), models)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        if scheduler.ready:
            return JSONResponse({"status": "ready"})
        status = "stopping" if scheduler.stopping else "loading"
        return JSONResponse({"status": status}, 503, {"Retry-After": "1"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(scheduler.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(model) for model in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in models:
            there = ", ".join(models)
            raise Refusal(
                404, f"model: there is no {shown(name)}, there are {there}", "model", "model_not_found"
            )
        classes = models[name].classes
        names = [classes.words(number) for number in range(classes.count)] if classes else None
        return {**described(models[name]), "class_names": names}

    @app.post("/v1/images/generations", openapi_extra=_described_body("application/json", FIELDS, "prompt"))
    async def generations(request: Request) -> Response:
        return await pictures(request, words)

    @app.post(EDITS, openapi_extra=_described_body("multipart/form-data", EDIT_FIELDS, "image", "prompt"))
    async def edits(request: Request) -> Response:
        return await pictures(request, uploads)

    @app.post(VARIATIONS, include_in_schema=False)
    async def variations() -> Response:
        raise Refusal(
            404,
            f"variations are not asked for here, but at {EDITS}, with vary and a prompt",
            code="not_found",
        )

    for path, (file, kind) in PAGE.items():
        app.add_api_route(path, _static(file, kind), methods=["GET"], include_in_schema=False)
    return app


def _described_body(kind: str, fields: Mapping[str, Field], *required: str) -> dict[str, Any]:
    """Of a request, as the OpenAPI document has it."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema(fields, required)}}}}


def _static(file: str, kind: str) -> Callable[[], Awaitable[Response]]:
    """A file of the page, read once."""
    data = (files(__package__) / "page" / file).read_bytes()

    async def answer_file() -> Response:
        return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

    return answer_file


def described(model: Model) -> dict[str, Any]:
    """A model as the contract lists it, and what the page wants to know of it."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "hart-runtime",
        "size": model.size,
        "sizes": [*model.sizes],
        "scales": len(model.manifest.drawn(model.manifest.sampling)),
        "settings": {
            k: v for k, v in asdict(model.manifest.sampling).items() if k not in model.manifest.lacks
        },
        "classes": model.classes.count if model.classes else None,
        "edits": model.takes_pictures,
    }


class Pictures:
    """Answers requests for pictures, and counts how each of them ends."""

    def __init__(self, scheduler: Scheduler, tell_prompts: bool) -> None:
        self.scheduler, self.tell_prompts = scheduler, tell_prompts

    async def __call__(self, request: Request, read: Callable[[Request], Awaitable[Asked]]) -> Response:
        """``read``: what a request asks for; raises Refusal."""
        record = _Record(self.scheduler.metrics, request.state.name)
        try:
            asked = await read(request)
            record.told |= {"model": asked.model.name, "pictures": asked.n, "seed": asked.seed}
            if self.tell_prompts:
                record.told["prompt"] = asked.prompt
            order = await self.scheduler.submit(asked, record.name)
            if asked.stream:
                return _Stream(order, self.scheduler, record)
            response = JSONResponse(await self._waited(order, request))
        except Refusal as refusal:
            record.end(refusal.status, refusal.code)
            raise
        except ClientDisconnect:
            record.end(GONE_STATUS)
            return Response(status_code=GONE_STATUS)
        except asyncio.CancelledError:  # so Ray Serve tells that a client has left, if it was first
            record.end(GONE_STATUS)
            raise
        except Exception:
            record.end(500)
            raise
        record.end(200)
        return response

    async def _waited(self, order: Order, request: Request) -> dict[str, Any]:
        """All pictures, unless the client leaves."""
        told, gone = asyncio.ensure_future(answer(order)), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                return told.result()
            raise ClientDisconnect
        finally:
            told.cancel()
            gone.cancel()
            self.scheduler.leave(order)


class _Stream(StreamingResponse):
    """Events as the pictures appear. Whatever ends it, even before it began, nobody waits any more."""

    def __init__(self, order: Order, scheduler: Scheduler, record: _Record) -> None:
        self.order, self.scheduler, self.record = order, scheduler, record
        self.status = GONE_STATUS
        super().__init__(self._chunks(), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.scheduler.leave(self.order)
            self.record.end(self.status)

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in events(self.order):
                yield chunk
            self.status = 200
        except Refusal as refusal:
            self.status = refusal.status
            yield event(None, refusal.body())


class _Record:
    """What is counted and logged of a request, once."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.metrics, self.name = metrics, name
        self.told: dict[str, Any] = {"request_id": name}
        self.began = time.monotonic()
        metrics.received.inc()

    def end(self, status: int, code: str | None = None) -> None:
        self.metrics.ended(status)
        seconds = round(time.monotonic() - self.began, 3)
        log.info("request", extra={**self.told, "status": status, "code": code, "seconds": seconds})


async def _body(request: Request) -> bytes:
    """Of a request in JSON; web pages elsewhere cannot send that without being asked for leave."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            415,
            f"Content-Type: expected application/json, found {shown(kind)}",
            code="unsupported_media_type",
        )
    try:
        return await asyncio.wait_for(request.body(), MOST_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal(
            408, f"the body: did not come within {MOST_SECONDS} s", code="body_timeout", headers=NO_RETRY
        ) from None


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return answered(error)


async def _not_routed(request: Request, error: Exception) -> Response:
    """No such address, or not with this method."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    words = {404: "there is no such address here", 405: f"{request.method} is not answered here"}
    said = words.get(status, "the request cannot be read")
    return answered(Refusal(status, said, code="not_found" if status == 404 else "bad_request"))


async def _broken(request: Request, error: Exception) -> Response:
    return answered(failed())
