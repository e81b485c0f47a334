"""A server that shows prompts to a safety model before it draws them."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving import Running, events_of, hart_run, later, serving, until

pytestmark = pytest.mark.serve
SECONDS = 'hart_stage_seconds_total{stage="safety model"}'


@pytest.fixture(scope="module")
def server(demo_bundle: Path, var_bundle: Path, shield: Path) -> Iterator[Running]:
    """Of texts, which are screened, and of classes, which are not."""
    engines = ("--engine", demo_bundle, "--engine", var_bundle, "--max-loaded", 2)
    with serving(*engines, "--threads", 1, "--safety-model", shield) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_prompt(client: openai.OpenAI, server: Running, stream: bool) -> None:
    """Is refused before the first byte of a stream, and nothing is drawn."""
    drawn = server.metrics()["hart_batch_pictures_count"]
    with pytest.raises(openai.BadRequestError, match="safety model") as caught:
        client.images.generate(prompt="a red weapon", stream=stream)
    assert (caught.value.code, caught.value.param) == ("moderation_blocked", "prompt")
    assert server.metrics()["hart_batch_pictures_count"] == drawn
    until(server.idle)
    assert "weapon" not in server.log.read_text()
    assert '"code": "moderation_blocked"' in server.log.read_text()


def test_what_is_not_refused_is_drawn_as_ever(server: Running, demo_bundle: Path, tmp_path: Path) -> None:
    expected = hart_run(demo_bundle, tmp_path, "--seed", 3, "--threads", 1, prompt="a blue flower")
    assert server.drawn(prompt="a blue flower", seed=3) == expected
    with server.stream(prompt="a blue flower", seed=3) as response:
        (event,) = events_of(response)
    assert base64.b64decode(event["b64_json"]) == expected[0]


def test_a_prompt_that_repeats_is_not_read_again(server: Running) -> None:
    server.drawn(prompt="a red red flower")
    before = server.metrics()[SECONDS]
    for seed in range(20):
        server.drawn(prompt="a red red flower", seed=seed)
    again = server.metrics()[SECONDS] - before
    server.drawn(prompt="a blue blue flower")
    assert again < server.metrics()[SECONDS] - before - again


def test_a_class_is_no_text(server: Running) -> None:
    name = server.get("/v1/models").json()["data"][1]["id"]
    assert len(server.drawn(prompt="", model=name, label=1)) == 1


def test_no_answer_is_no_permission(server: Running) -> None:
    assert server.post({"prompt": "a broken"}).status_code == 500
    assert len(server.drawn(prompt="a flower")) == 1
    *_, screener = server.workers()
    os.kill(screener, signal.SIGSTOP)
    waiting = later(server.post, {"prompt": "a blue red flower"})
    os.kill(screener, signal.SIGKILL)
    until(lambda: server.get("/ready").status_code == 503 or screener not in server.workers())
    assert waiting.result().status_code in (200, 500)  # it may have waited for the next process
    until(lambda: server.get("/ready").status_code == 200)
    assert screener not in server.workers()
    assert len(server.drawn(prompt="a flower")) == 1
    assert server.post({"prompt": "a weapon"}).status_code == 400


def test_what_cannot_screen_fails_the_start(demo_bundle: Path, var_bundle: Path, tmp_path: Path) -> None:
    for bundle, model, said in (
        (demo_bundle, tmp_path, "--safety-model"),
        (var_bundle, tmp_path, "--safety-model: reads texts"),
    ):
        with serving("--engine", bundle, "--safety-model", model, ready=False) as server:
            assert server.ended() == 2
            log = server.log.read_text()
        assert f"error: {said}" in log
        assert "Traceback" not in log
