"""What broke other servers of pictures, tried on this one: a test for every entry of a list of their faults.

Those about who may ask are in test_serve_security.py.
"""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image, ImageChops, ImageStat

from hart_runtime.runtime.png import read_origin
from tests.serving import (
    KEY,
    LONG,
    PROMPT,
    Running,
    events_of,
    hart_run,
    later,
    serving,
    until,
)

pytestmark = pytest.mark.serve


def test_fault_D01_a_drawing_does_not_block_the_server(server: Running) -> None:
    with server.busy():
        for _ in range(20):
            assert server.get("/health").status_code == 200
        assert server.get("/v1/models").status_code == 200


def test_fault_D02_nobody_draws_for_a_client_that_has_gone(server: Running) -> None:
    stopped = server.metrics()["hart_batches_stopped_total"]
    with server.busy():
        pass
    until(lambda: server.metrics()["hart_batches_stopped_total"] == stopped + 1)
    until(server.idle)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_fault_D03_every_kind_of_request_can_be_left(server: Running, stream: bool, waiting: bool) -> None:
    """Streamed or not, while it waits or while it is drawn."""
    gone, stopped = server.outcomes()["gone"], server.metrics()["hart_batches_stopped_total"]

    def leave() -> None:
        body = {"prompt": PROMPT, "steps": LONG, "top_k": 3, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1)

    if waiting:
        with server.busy():
            leave()
            until(lambda: server.outcomes()["gone"] == gone + 1)
            assert server.metrics()["hart_batches_stopped_total"] == stopped
    else:
        leave()
        until(lambda: server.metrics()["hart_batches_stopped_total"] == stopped + 1)
    until(server.idle)


def test_fault_D04_one_that_leaves_takes_no_later_one_along(server: Running) -> None:
    for seed in range(3):
        with server.busy():
            pass
        assert len(server.drawn(seed=seed)) == 1


def test_fault_D05_leaving_in_every_moment_is_heard(server: Running) -> None:
    """Before the headers end, before the body does, with all of it sent, and after the first event."""
    body = json.dumps({"prompt": PROMPT, "stream": True, "partial_images": 5, "steps": LONG}).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    address = server.url.removeprefix("http://").rsplit(":", 1)
    for sent, answered in ((head[:20], 0), (head + body[:9], 0), (head + body, 0), (head + body, 3000)):
        with socket.create_connection((address[0], int(address[1])), 60) as connection:
            connection.sendall(sent)
            came = 0
            while came < answered:
                came += len(connection.recv(1000))
    until(server.idle)
    until(lambda: len(server.drawn(seed=1)) == 1)


def test_fault_D06_no_layer_hides_that_a_client_has_gone(server: Running) -> None:
    """Starlette's own kind of middleware does."""
    from starlette.middleware.base import BaseHTTPMiddleware

    from hart_runtime.serve.security import Guard

    assert not issubclass(Guard, BaseHTTPMiddleware)
    gone = server.outcomes()["gone"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json={"prompt": PROMPT, "steps": LONG}, timeout=1)
    until(lambda: server.outcomes()["gone"] == gone + 1)


def test_fault_D07_what_was_shown_before_the_end_is_the_clients(server: Running) -> None:
    """Pictures that are done are sent at once, and not with the last of them."""
    with server.stream(n=10, seed=1) as response:
        events = events_of(response)
        first = base64.b64decode(next(events)["b64_json"])
    assert first in server.drawn(n=10, seed=1)


def test_fault_D08_requests_given_up_and_sent_again_are_drawn_once(server: Running) -> None:
    """OpenAI's client times out and sends the same again, twice."""
    pictures = server.metrics()["hart_batch_pictures_sum"]
    with server.busy():
        again = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2, timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            again.images.generate(prompt=PROMPT, extra_body={"seed": 1})
        until(lambda: server.metrics()["hart_queue_pictures"] == 0)
    until(server.idle)
    assert server.metrics()["hart_batch_pictures_sum"] == pictures


def test_fault_D09_who_stays_in_a_batch_gets_the_same_bytes(server: Running) -> None:
    alone = server.drawn(seed=5, n=2, steps=40)
    with server.busy():
        staying = later(server.drawn, seed=5, n=2, steps=40)
        until(lambda: server.metrics()["hart_queue_pictures"] == 2)
        leaving = server.stream(seed=9, n=3, steps=40)
        leaving.__enter__()
        until(lambda: server.metrics()["hart_queue_pictures"] == 5)
    until(lambda: server.metrics()["hart_queue_pictures"] == 0)
    leaving.__exit__(None, None, None)
    assert staying.result() == alone


def test_fault_D10_a_drawing_that_fails_is_one_that_fails(guarded: Running) -> None:
    """Elsewhere all later ones did."""
    for seed in range(2):
        failed = guarded.post({"prompt": PROMPT, "model": "broken", "n": 2}, headers=guarded.headers)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert failed.headers["x-should-retry"] == "false", "the same seed fails again"
        drawn = guarded.post({"prompt": PROMPT, "seed": seed}, headers=guarded.headers)
        assert drawn.status_code == 200, drawn.text
    assert guarded.metrics()["hart_worker_restarts_total"] == 0


def test_fault_D11_a_worker_that_only_fails_is_replaced(guarded: Running) -> None:
    """And the server says that it is not ready meanwhile."""
    (before,) = guarded.workers()
    for _ in range(3):
        body = {"prompt": PROMPT, "model": "broken"}
        assert guarded.post(body, headers=guarded.headers).status_code == 500
    until(lambda: guarded.get("/ready").status_code == 503 or guarded.workers() != [before])
    until(lambda: guarded.get("/ready").status_code == 200)
    assert guarded.workers() != [before]
    assert guarded.post({"prompt": PROMPT}, headers=guarded.headers).status_code == 200


def test_fault_D12_memory_stays_flat(server: Running) -> None:
    """Over two hundred requests that are drawn, refused and left."""

    def round_of_requests() -> int:
        for seed in range(24):
            server.drawn(seed=seed, prompt=f"a red circle {seed}")
            server.post({"prompt": PROMPT, "n": 11})
        for _ in range(2):
            with server.busy():
                pass
        until(server.idle)
        return sum(psutil.Process(pid).memory_info().rss for pid in (server.process.pid, *server.workers()))

    for _ in range(2):
        before = round_of_requests()
    after = [round_of_requests() for _ in range(2)][-1]
    assert after < before * 1.05


def test_fault_D13_the_end_does_not_wait_for_everybody(demo_bundle: Path) -> None:
    """Elsewhere for ten minutes. Who is drawn within the grace gets his picture, others are told."""
    with serving("--engine", demo_bundle, "--threads", 1, "--grace", 4) as server:
        with server.busy():
            short = [later(server.post, {"prompt": PROMPT, "seed": 1}) for _ in range(2)]
            until(lambda: server.metrics()["hart_queue_pictures"] == 2)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.get("/ready").status_code == 503)
            late = server.post({"prompt": PROMPT})
            assert (late.status_code, late.headers["retry-after"]) == (503, "5")
            assert server.get("/health").status_code == 200
        assert [future.result().status_code for future in short] == [200, 200]
        assert server.ended() == 0


def test_fault_D14_an_open_stream_does_not_keep_the_server(demo_bundle: Path) -> None:
    with serving("--engine", demo_bundle, "--threads", 1, "--grace", 0.2) as server:
        waiting = []
        with server.stream(steps=LONG, partial_images=5) as response:
            events = events_of(response)
            next(events)
            waiting.append(later(server.post, {"prompt": PROMPT, "seed": 1}))
            until(lambda: server.metrics()["hart_queue_pictures"] == 1)
            server.process.send_signal(signal.SIGTERM)
            *_, last = events
        assert last["error"]["code"] == "shutting_down"
        assert waiting[0].result().json()["error"]["code"] == "shutting_down"
        assert server.ended() == 0
    with serving("--engine", demo_bundle, "--threads", 1) as server, server.busy():
        workers = server.workers()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 1
    until(lambda: not any(map(psutil.pid_exists, workers)))


def test_fault_D15_partial_images_that_were_asked_for_come(server: Running) -> None:
    with server.stream(partial_images=3) as response:
        found = [event["type"].rpartition(".")[2] for event in events_of(response)]
    assert found == ["partial_image"] * 3 + ["completed"]


def test_fault_D16_partial_images_are_there_before_the_picture_is(server: Running) -> None:
    """And show the picture as it was, each more of it."""
    with server.stream(seed=3, partial_images=5, output_format="png") as response:
        found = [base64.b64decode(event["b64_json"]) for event in events_of(response)]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in found]
    assert len(set(found)) == 6
    off = [_difference(image, images[-1]) for image in images]
    assert off[0] > off[3] > 0
    with server.busy():
        assert server.get("/ready").status_code == 200, "a view came while the drawing went on"


def _difference(one: Image.Image, other: Image.Image) -> float:
    return float(sum(ImageStat.Stat(ImageChops.difference(one, other)).mean))


def test_fault_D17_proxies_let_events_through(server: Running) -> None:
    with server.stream() as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in response.headers


def test_fault_D18_no_line_that_breaks_a_client(server: Running) -> None:
    """An id, a retry, a comment behind one, and a last event without its blank line do."""
    with server.stream(partial_images=2) as response:
        text = response.read().decode()
    blocks = text.split("\n\n")
    assert blocks[-1] == ""
    for block in blocks[:-1]:
        names = [line.partition(":")[0] for line in block.split("\n")]
        assert names == ["event", "data"]


def test_fault_D18_silence_is_filled_with_comments() -> None:
    """Which clients take for nothing, as long as there was no id."""
    from hart_runtime.serve import answers

    assert re.fullmatch(rb": [\w ]+\n\n", answers.PING)
    assert answers.QUIET < 15


def test_fault_D19_an_error_behind_the_first_event_is_an_event(guarded: Running) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    stream = client.images.generate(prompt=PROMPT, model="broken", stream=True, partial_images=1)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert (caught.value.code, caught.value.type) == ("server_error", "server_error")


@pytest.mark.parametrize("size", ["512x512", "1024x1024", "64x65", "64", "x", ""])
def test_fault_D20_a_size_that_is_not_drawn_is_refused(client: openai.OpenAI, size: str) -> None:
    with pytest.raises(openai.BadRequestError, match="draws 64x64") as caught:
        client.images.generate(prompt=PROMPT, size=size)  # type: ignore[call-overload]
    assert caught.value.param == "size"


def test_fault_D21_a_seed_is_used_and_told(server: Running, tmp_path: Path, demo_bundle: Path) -> None:
    """Zero is one; an empty word is none."""
    answer = server.post({"prompt": PROMPT, "seed": 0}).json()
    assert answer["data"][0]["seed"] == 0
    expected = hart_run(demo_bundle, tmp_path, "--seed", 0, "--threads", 1)
    assert base64.b64decode(answer["data"][0]["b64_json"]) == expected[0]
    assert server.post({"prompt": PROMPT, "seed": ""}).status_code == 400
    assert server.post({"prompt": PROMPT, "seed": 2**63 - 1, "n": 2}).status_code == 400


def test_fault_D22_a_picture_is_the_same_alone(server: Running, tmp_path: Path) -> None:
    """With its own seed in what it carries, whatever it was drawn beside."""
    several = server.drawn(seed=40, n=10)
    for index, data in enumerate(several):
        (file := tmp_path / f"{index}.png").write_bytes(data)
        assert read_origin(file).seed == 40 + index
        assert server.drawn(seed=40 + index) == [data]


def test_fault_D23_the_forms_of_an_answer(server: Running) -> None:
    assert len(server.drawn(response_format="b64_json")) == 1
    refused = server.post({"prompt": PROMPT, "response_format": "url"})
    assert refused.status_code == 400
    assert "data:" not in refused.text


@pytest.mark.parametrize("fields", [{"n": 11}, {"n": 10**9}, {"cfg_scale": 7}, {"size": "64x64", "nn": 1}])
def test_fault_D24_nothing_is_cut_or_dropped_silently(server: Running, fields: dict[str, Any]) -> None:
    refused = server.post({"prompt": PROMPT, **fields})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] in fields


def test_fault_D37_the_queue_ends_somewhere(server: Running) -> None:
    """Every picture counts in it."""
    with server.busy(), server.stream(n=10), server.stream(n=10):
        until(lambda: server.metrics()["hart_queue_pictures"] == 20)
        refused = [server.post({"prompt": PROMPT, "n": n}) for n in (1, 10)]
        assert [answer.status_code for answer in refused] == [429, 429]
        assert all(1 <= int(answer.headers["retry-after"]) <= 120 for answer in refused)


def test_fault_D38_health_answers_while_large_answers_are_made(server: Running) -> None:
    with server.busy():
        waiting = [later(server.drawn, n=10, seed=seed) for seed in (1, 2)]
        until(lambda: server.metrics()["hart_queue_pictures"] == 20)
    checked = 0
    while not all(future.done() for future in waiting):
        assert server.get("/health").status_code == 200
        checked += 1
    assert checked > 1
