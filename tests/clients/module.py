"""Versions before 1: functions of the module. Prints what came as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openai


def error(url: str, key: str = "any", **fields: Any) -> list[Any]:
    """Class, status, field and code of what a request raises."""
    try:
        openai.Image.create(api_base=f"{url}/v1", api_key=key, **fields)  # type: ignore[attr-defined]
    except openai.error.OpenAIError as raised:  # type: ignore[attr-defined]
        said = [type(raised).__name__, raised.http_status, getattr(raised, "param", None), raised.code]
        return [*said, str(raised)]
    return []


def main(url: str, guarded: str, full: str, pictures: str) -> None:
    """Requests to a server, to one that wants a key, and to one that is busy."""
    drawn = openai.Image.create(  # type: ignore[attr-defined]
        api_base=f"{url}/v1", api_key="any", prompt="a blue star", n=3, seed=7, size="64x64"
    )
    with Path(pictures, "image.png").open("rb") as image, Path(pictures, "mask.png").open("rb") as mask:
        edited = openai.Image.create_edit(  # type: ignore[attr-defined]
            image, mask, api_base=f"{url}/v1", api_key="any", prompt="a blue star", n="2", seed="7"
        )
    found = {
        "edits": [image["b64_json"] for image in edited["data"]],
        "pictures": [image["b64_json"] for image in drawn["data"]],
        "bad": error(url, prompt="x", n=11),
        "unknown": error(url, prompt="x", cfg=7),
        "missing": error(url, prompt="x", model="dall-e-3"),
        "key": error(guarded, prompt="x"),
        "failed": error(guarded, "a-key-of-this-test", prompt="x", model="broken"),
        "busy": error(full, prompt="x"),
        "large": error(url, prompt="x" * (2 << 20)),
        "nobody": error("http://127.0.0.1:9", prompt="x"),
    }
    print(json.dumps({"version": openai.__version__, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
