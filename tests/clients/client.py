"""Versions from 1 on: a client object. Prints what came as JSON."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import openai


def error(url: str, key: str = "any", retries: int = 0, **fields: Any) -> list[Any]:
    """Class, status, field and code of what a request raises."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)
    try:
        answer = client.images.generate(**fields)
        for _ in answer if fields.get("stream") else ():
            pass
    except openai.APIStatusError as raised:
        said = [type(raised).__name__, raised.status_code, raised.param, raised.code]
        return [*said, str(raised), raised.request_id]
    except openai.APIError as raised:
        return [type(raised).__name__, None, raised.param, raised.code, str(raised)]
    return []


def streams(client: openai.OpenAI) -> list[Any]:
    """Index, number and picture of every event, for several numbers of pictures and of views."""
    found = []
    for n, partials in itertools.product((1, 3, 10), (0, 1, 3)):
        options: dict[str, Any] = {"n": n, "stream": True, "partial_images": partials}
        events = client.images.generate(prompt="a blue star", extra_body={"seed": 7}, **options)
        told = [
            (event.image_index, getattr(event, "partial_image_index", None), event.b64_json)
            for event in events
        ]
        found.append([n, partials, told])
    return found


def edits(client: openai.OpenAI, pictures: Path, **options: Any) -> Any:
    """The answer to a picture and a mask."""
    image, mask = pictures / "image.png", pictures / "mask.png"
    return client.images.edit(
        image=image, mask=mask, prompt="a blue star", n=2, extra_body={"seed": 7}, **options
    )


def main(url: str, guarded: str, full: str, pictures: str, streamed: str) -> None:
    """Requests to a server, to one that wants a key, and to one that is busy."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    star: dict[str, Any] = {"prompt": "a blue star", "extra_body": {"seed": 7}}
    broken: dict[str, Any] = {"prompt": "x", "model": "broken"}
    answers = {n: client.images.generate(n=n, **star) for n in (1, 3, 10)}
    found: dict[str, Any] = {
        "pictures": [image.b64_json for image in answers[3].data or []],
        "edits": [image.b64_json for image in edits(client, Path(pictures)).data or []],
        "counts": [len(answer.data or []) for answer in answers.values()],
        "bad": error(url, prompt="x", n=11),
        "unknown": error(url, prompt="x", extra_body={"cfg": 7}),
        "missing": error(url, prompt="x", model="dall-e-3"),
        "key": error(guarded, prompt="x"),
        "failed": error(guarded, "a-key-of-this-test", **broken),
        "busy": error(full, prompt="x"),
        "elsewhere": error(url, prompt="x", extra_headers={"Origin": "http://elsewhere.example"}),
        "large": error(url, prompt="x" * (2 << 20)),
        "slow": error(url, prompt="x", timeout=0.5, extra_body={"steps": "1000"}),
        "nobody": error("http://127.0.0.1:9", prompt="x"),
    }
    if streamed == "streamed":
        found["streams"] = streams(client)
        events = edits(client, Path(pictures), stream=True, partial_images=2)
        found["edited"] = [[event.type, event.image_index, event.b64_json] for event in events]
        found["bad stream"] = error(url, prompt="x", n=11, stream=True)
        found["failed stream"] = error(guarded, "a-key-of-this-test", stream=True, **broken)
    print(json.dumps({"version": openai.__version__, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
