"""The contract's answers: one JSON object, or events as the pictures appear."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.order import Complete, News, Order, Partial
from hart_runtime.serve.requests import Asked

PING, QUIET = b": still drawing\n\n", 10.0
"""What keeps proxies from giving up, and the seconds of silence before it. No ``id`` or ``retry`` is ever
sent: after one, OpenAI's client takes a comment for an event."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(kind: str | None, values: dict[str, Any]) -> bytes:
    """A server-sent event, with the blank line without which clients drop it."""
    named = f"event: {kind}\n" if kind else ""
    return f"{named}data: {json.dumps(values)}\n\n".encode()


async def answer(order: Order) -> dict[str, Any]:
    """All pictures of an order.

    Raises:
        Refusal: there are none.
    """
    found: dict[int, Complete] = {}
    while len(found) < order.asked.n:
        news = await order.news()
        if isinstance(news, Refusal):
            raise news
        if isinstance(news, Complete):
            found[news.index] = news
    asked = order.asked
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": found[index].data, "seed": seed, **_revised(found[index])}
            for index, seed in enumerate(asked.seeds)
        ],
        **_what_it_is(asked, asked.final.format),
        "usage": usage(asked, found[0].tokens, asked.n),
        **_identifier(asked),
    }


async def events(order: Order) -> AsyncIterator[bytes]:
    """The pictures of an order as they appear; ends with its last picture.

    Raises:
        Refusal: no more will come.
    """
    left = order.asked.n
    waiting = asyncio.ensure_future(order.news())
    try:
        while left:
            done, _ = await asyncio.wait({waiting}, timeout=QUIET)
            if not done:
                yield PING
                continue
            news = waiting.result()
            if isinstance(news, Refusal):
                raise news
            left -= isinstance(news, Complete)
            yield _told(order.asked, news)
            waiting = asyncio.ensure_future(order.news())
    finally:
        waiting.cancel()


def _told(asked: Asked, news: News) -> bytes:
    assert isinstance(news, Partial | Complete)
    encoding = asked.partial if isinstance(news, Partial) else asked.final
    values = {
        "b64_json": news.data,
        "created_at": int(time.time()),
        **_what_it_is(asked, encoding.format),
        "image_index": news.index,
        "seed": asked.seeds[news.index],
    }
    if isinstance(news, Partial):
        kind, scales = "partial_image", len(asked.model.manifest.drawn(asked.settings))
        values |= {"partial_image_index": news.number, "scale": news.scale, "scales": scales}
    else:
        kind = "completed"
        values |= {"usage": usage(asked, news.tokens, 1), **_revised(news), **_identifier(asked)}
    kind = f"{'image_generation' if asked.source is None else 'image_edit'}.{kind}"
    return event(kind, {"type": kind, **values})


def _what_it_is(asked: Asked, form: str) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": form,
        "quality": asked.quality,
        "size": asked.model.size,
    }


def _revised(picture: Complete) -> dict[str, str]:
    """The contract's word for a prompt that is not drawn as it was given."""
    return {} if picture.read is None else {"revised_prompt": picture.read}


def _identifier(asked: Asked) -> dict[str, str]:
    return {} if asked.identifier is None else {"safety_identifier": asked.identifier}


def usage(asked: Asked, tokens: int, pictures: int) -> dict[str, Any]:
    """Tokens of the prompt as the text encoder read them, and of all scales of the pictures."""
    drawn = asked.model.tokens * pictures
    given = asked.model.tokens if asked.source is not None else 0
    return {
        "input_tokens": tokens + given,
        "input_tokens_details": {"image_tokens": given, "text_tokens": tokens},
        "output_tokens": drawn,
        "output_tokens_details": {"image_tokens": drawn, "text_tokens": 0},
        "total_tokens": tokens + given + drawn,
    }
