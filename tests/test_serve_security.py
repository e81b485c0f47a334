"""Who may ask, for what, and what he is not told; numbered with test_serve_faults.py."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image

from tests.serving import (
    KEY,
    PROMPT,
    Running,
    serving,
)

FAULTS = range(1, 41)


def test_every_fault_has_a_test() -> None:
    files = (Path(__file__), Path(__file__).with_name("test_serve_faults.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert {int(number) for number in re.findall(r"(?m)^def test_fault_D(\d\d)_", text)} == {*FAULTS}


HOSTS = [
    "evil.com",
    "127.0.0.1.evil.com",
    "localhost@evil.com",
    "",
    "0.0.0.0",
    "127.1",
    "localhost.",
    "[::2]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_fault_D25_a_name_that_was_made_to_point_here(server: Running, host: str) -> None:
    """DNS rebinding: the Host is the other page's, whatever the Origin says."""
    origin = {"Origin": f"http://{host}"} if host else {}
    refused = httpx.get(f"{server.url}/v1/models", headers={"Host": host, **origin})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "host_not_allowed"
    for good in ("localhost", "LOCALHOST:99", "[::1]:8000"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": good}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_fault_D26_a_page_elsewhere_cannot_ask(server: Running, headers: dict[str, str]) -> None:
    body = json.dumps({"prompt": PROMPT})
    headers = {"Content-Type": "application/json", **headers}
    refused = httpx.post(f"{server.url}/v1/images/generations", content=body, headers=headers)
    assert refused.status_code in (403, 415)
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.post({"prompt": PROMPT}, headers=own).status_code == 200


def test_fault_D27_no_origin_is_reflected(server: Running, demo_bundle: Path) -> None:
    for method in ("GET", "OPTIONS"):
        answer = httpx.request(method, f"{server.url}/v1/models", headers={"Origin": "http://evil.com"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AA"])
def test_fault_D28_no_address_of_a_client_is_fetched(server: Running, url: str) -> None:
    """There is no field that holds one."""
    for field in ("image", "image_url", "mask", "input_image", "prompt_url"):
        assert server.post({"prompt": PROMPT, field: url}).status_code == 400
    with server.busy():
        listening = _connections(server)
    assert all(c.laddr.ip == "127.0.0.1" for c in listening)


def _connections(server: Running) -> list[Any]:
    pids = (server.process.pid, *server.workers())
    return [c for pid in pids for c in psutil.Process(pid).net_connections("inet")]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page/../../pyproject.toml",
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2fetc%2fpasswd",
    ],
)
def test_fault_D29_no_path_leads_out(server: Running, path: str) -> None:
    address = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((address[0], int(address[1])), 60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] in (b"404", b"400")
    assert b"root:" not in answer


def test_fault_D30_no_answer_names_a_path_or_a_traceback(guarded: Running, demo_bundle: Path) -> None:
    fields: list[dict[str, Any]] = [{"model": "broken"}, {"model": "../x"}, {"n": 11}, {"steps": "/"}]
    answers = [guarded.post({"prompt": PROMPT, **more}, headers=guarded.headers).text for more in fields]
    answers += [guarded.get(path, headers=guarded.headers).text for path in ("/v1/models", "/metrics", "/x")]
    for answer in answers:
        assert str(demo_bundle.parent) not in answer
        assert "Traceback" not in answer
        assert socket.gethostname() not in answer


def test_fault_D31_only_what_the_server_made_is_handed_out(server: Running) -> None:
    assert server.get("/health").headers["x-content-type-options"] == "nosniff"
    for method in ("PUT", "PATCH", "DELETE"):
        answer = httpx.request(method, f"{server.url}/v1/images/generations", content=b"<svg/>")
        assert answer.status_code == 405
    assert server.get("/v1/models").headers["content-type"] == "application/json"


def test_fault_D32_every_address_needs_the_key(guarded: Running, demo_bundle: Path) -> None:
    """But for those that say how the server is, and the page."""
    paths = ["/v1/models", "/v1/models/x", "/metrics", "/openapi.json", "/x", "/v1/images/edits"]
    for headers in (
        {},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": "Bearer"},
    ):
        for path in paths:
            answer = guarded.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert guarded.post({"prompt": PROMPT}, headers=headers).status_code == 401
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/v1/models", headers=guarded.headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="x").models.list()
    with serving("--engine", demo_bundle, "--host", "0.0.0.0", ready=False) as open_:
        assert open_.ended() == 2
        assert "--api-key-file" in open_.log.read_text()


def test_behind_a_proxy_that_strips_a_prefix(guarded: Running, demo_bundle: Path, tmp_path: Path) -> None:
    """What is open stays open, what needs the key needs it; and the page names nothing from the root."""
    (key := tmp_path / "key").write_text(KEY)
    options = ("--threads", 1, "--root-path", "/draw", "--api-key-file", key)
    allowed = "https://pictures.example"
    with serving("--engine", demo_bundle, *options, "--allow-origin", allowed) as server:
        page = server.get("/").text
        for name in re.findall(r'(?:href|src)="([^"]+)"', page):
            assert name.startswith("data:") or server.get(f"/{name}").status_code == 200
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/models", headers=guarded.headers).status_code == 200
        asked: dict[str, Any] = {"headers": {**guarded.headers, "Origin": allowed}}
        answer = server.post({"prompt": PROMPT}, **asked)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, allowed)
        asked["headers"]["Origin"] = f"{allowed}.evil.com"
        assert server.post({"prompt": PROMPT}, **asked).status_code == 403
        before = httpx.options(f"{server.url}/v1/images/generations", headers={"Origin": allowed})
        assert before.status_code == 200
        assert "authorization" in before.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in before.headers


def test_fault_D33_a_key_is_in_no_log_and_no_picture(guarded: Running) -> None:
    answer = guarded.post({"prompt": PROMPT}, headers=guarded.headers)
    guarded.get(f"/v1/models?api_key={KEY}")
    assert KEY.encode() not in base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert KEY not in guarded.log.read_text()
    assert KEY not in answer.text


@pytest.mark.parametrize("name", ["image", "mask"])
def test_fault_D34_a_picture_that_unpacks_to_gigabytes(server: Running, name: str) -> None:
    """Its size is looked at, and it is not unpacked."""
    bomb, small = io.BytesIO(), io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    Image.new("RGB", (64, 64)).save(small, "PNG")
    rss = psutil.Process(server.process.pid).memory_info().rss
    answer = server.edit({"image": small.getvalue(), name: bomb.getvalue()}, anew=1)
    assert answer.status_code == 400
    assert f"{name}: expected 1 to 16777216 pixels, found 12000 x 12000" in answer.text
    assert psutil.Process(server.process.pid).memory_info().rss < rss + (32 << 20)


@pytest.mark.parametrize("path", ["edits", "variations", "generations"])
def test_fault_D35_forms_without_end(server: Running, path: str) -> None:
    """Of one nothing is read beyond what there can be, and where none is looked for, nothing at all."""
    form = {f"field{number}": "x" for number in range(5000)}
    answer = httpx.post(f"{server.url}/v1/images/{path}", files={"image": b"x"}, data=form)
    assert answer.status_code == {"edits": 400, "variations": 404, "generations": 415}[path]
    assert path != "edits" or "Too many fields" in answer.text
    ranges = {"Range": "bytes=" + ",".join(f"{i}-" for i in range(1000))}
    assert server.get("/health", headers=ranges).status_code == 200


def test_fault_D36_huge_bodies(server: Running) -> None:
    """By what they say of themselves, by what comes, and by their prompt."""
    url = f"{server.url}/v1/images/generations"
    body = json.dumps({"prompt": "a" * (2 << 20)}).encode()
    headers = {"Content-Type": "application/json"}
    assert httpx.post(url, content=body, headers=headers).status_code == 413
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    assert httpx.post(url, content=pieces, headers=headers).status_code == 413
    assert server.post({"prompt": "a" * 32_001}).status_code == 400
    assert server.post({"prompt": "circle " * 4500}).status_code == 200


def test_fault_D39_no_mask_is_taken_for_another(client: openai.OpenAI) -> None:
    """Which side of one is drawn is not guessed: one without transparency is refused."""
    given, white, other = (_png(mode, side) for mode, side in (("RGB", 64), ("L", 64), ("RGBA", 32)))
    for mask, said in ((white, "expected a PNG with transparency"), (other, "found 32 x 32")):
        with pytest.raises(openai.BadRequestError, match=said) as refused:
            client.images.edit(prompt=PROMPT, image=given, mask=mask)
        assert refused.value.param == "mask"


def test_fault_D40_no_field_of_an_edit_is_dropped(client: openai.OpenAI) -> None:
    """There are those of other requests; of a picture that is transparent itself, that is what is drawn."""
    clear = _png("RGBA", 64)
    with pytest.raises(openai.BadRequestError, match="every pixel"):
        client.images.edit(prompt=PROMPT, image=clear, background="transparent")
    with pytest.raises(openai.BadRequestError, match="goes on from one picture, found 2"):
        client.images.edit(prompt=PROMPT, image=[clear, clear])
    assert len(client.images.edit(prompt=PROMPT, image=[clear], background="opaque").data or []) == 1


def _png(mode: str, side: int) -> bytes:
    """All of it black, or transparent."""
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "PNG")
    return file.getvalue()
