"""OpenAI's client in the versions that people have, each in an environment of its own."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tests.serving import PROMPT, Running, guarded_serving, later, serving, until
from tests.test_serve_edits import BOTH

pytestmark = pytest.mark.serve
CLIENTS = Path(__file__).parent / "clients"
NEWEST = ""


class Servers(NamedTuple):
    plain: Running
    guarded: Running
    full: Running


@pytest.fixture(scope="module")
def servers(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One that draws, one with a key and a broken model, and one whose queue is full."""
    folder, options = tmp_path_factory.mktemp("models"), ("--engine", demo_bundle, "--threads", 1)
    with (
        serving(*options) as plain,
        guarded_serving(demo_bundle, folder) as guarded,
        serving(*options, "--queue", 10) as full,
    ):
        yield Servers(plain, guarded, full)


def python(version: str, folder: Path) -> Path | str:
    """An environment with a version of the client and nothing else; "" is that of the tests."""
    if not version:
        return sys.executable
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    made = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(made), "install", "--quiet"]
    subprocess.run([*pip, f"openai=={version}"], check=True)
    return made


def told(servers: Servers, version: str, script: str, folder: Path, *more: str) -> dict[str, Any]:
    """What a script printed."""
    interpreter = python(version, folder)
    with servers.full.busy(), servers.full.stream(n=10):
        until(lambda: servers.full.metrics()["hart_queue_pictures"] == 10)
        urls = [server.url for server in servers]
        (pictures := folder.with_name("pictures")).mkdir()
        for name, data in BOTH.items():
            (pictures / f"{name}.png").write_bytes(data)
        command = [interpreter, "-I", CLIENTS / script, *urls, pictures, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"] == (version or openai.__version__)
    return found


def drawn(servers: Servers, n: int) -> list[str]:
    pictures = servers.plain.drawn(prompt="a blue star", n=n, seed=7)
    return [base64.b64encode(data).decode() for data in pictures]


def edited(servers: Servers) -> list[str]:
    answer = servers.plain.edit(BOTH, prompt="a blue star", n=2, seed=7)
    return [image["b64_json"] for image in answer.json()["data"]]


def test_before_one(servers: Servers, tmp_path: Path) -> None:
    found = told(servers, "0.28.1", "module.py", tmp_path / "env")
    assert found["pictures"] == drawn(servers, 3)
    assert found["edits"] == edited(servers)
    words: dict[str, list[Any]] = {
        "bad": ["InvalidRequestError", 400, "n", "invalid_value", "n: expected 1 to 10, found 11"],
        "unknown": ["InvalidRequestError", 400, "cfg", "unknown_parameter"],
        "missing": ["InvalidRequestError", 404, "model", "model_not_found"],
        "key": ["AuthenticationError", 401, None, "invalid_api_key"],
        "failed": ["APIError", 500, None, "server_error"],
        "busy": ["RateLimitError", 429, None, "rate_limit_exceeded"],
        "large": ["APIError", 413],
        "nobody": ["APIConnectionError", None],
    }
    for name, expected in words.items():
        assert found[name][0] == expected[0], found[name]
        assert found[name][1] == expected[1]
    assert words["bad"][4] in found["bad"][4]


ERRORS = {
    "bad": ["BadRequestError", 400, "n", "invalid_value"],
    "unknown": ["BadRequestError", 400, "cfg", "unknown_parameter"],
    "missing": ["NotFoundError", 404, "model", "model_not_found"],
    "key": ["AuthenticationError", 401, None, "invalid_api_key"],
    "failed": ["InternalServerError", 500, None, "server_error"],
    "busy": ["RateLimitError", 429, None, "rate_limit_exceeded"],
    "elsewhere": ["PermissionDeniedError", 403, None, "origin_not_allowed"],
    "large": ["APIStatusError", 413, None, "body_too_large"],
}
UNANSWERED = {"slow": "APITimeoutError", "nobody": "APIConnectionError"}


@pytest.mark.parametrize("version", ["1.55.3", "1.97.0", NEWEST])
def test_from_one_on(servers: Servers, version: str, tmp_path: Path) -> None:
    streamed = version != "1.55.3"
    found = told(servers, version, "client.py", tmp_path / "env", "streamed" if streamed else "plain")
    assert found["pictures"] == drawn(servers, 3)
    pictures = edited(servers)
    assert found["edits"] == pictures
    assert found["counts"] == [1, 3, 10]
    for name, expected in ERRORS.items():
        assert found[name][:4] == expected
        assert found[name][5].startswith("req_")
    assert {name: found[name][0] for name in UNANSWERED} == UNANSWERED
    if not streamed:
        return
    for index, picture in enumerate(pictures):
        mine = [(kind, data) for kind, which, data in found["edited"] if which == index]
        assert [kind for kind, _ in mine] == [*["image_edit.partial_image"] * 2, "image_edit.completed"]
        assert mine[-1][1] == picture
    pictures = drawn(servers, 10)
    for n, partials, events in found["streams"]:
        for index in range(n):
            mine = [(number, data) for which, number, data in events if which == index]
            assert [number for number, _ in mine] == [*range(partials), None]
            assert mine[-1][1] == pictures[index]
    assert found["bad stream"][:4] == ERRORS["bad"]
    assert found["failed stream"][:4] == ["APIError", None, None, "server_error"]


def test_a_client_that_was_refused_comes_again(servers: Servers) -> None:
    """The client waits as it was told to, and then it is drawn."""
    full = servers.full
    with full.busy():
        with full.stream(n=10):
            until(lambda: full.metrics()["hart_queue_pictures"] == 10)
            client = openai.OpenAI(base_url=f"{full.url}/v1", api_key="any", max_retries=5)
            refused = full.outcomes()["busy"]
            answer = later(client.images.generate, prompt=PROMPT)
            until(lambda: full.outcomes()["busy"] > refused)
        assert full.process.poll() is None
    assert len(answer.result().data) == 1
