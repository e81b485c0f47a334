"""The server through OpenAI's own client: every field, every event, every error."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from hart_runtime.runtime.png import read_origin
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.fields import EDIT_FIELDS, FIELDS, checked
from hart_runtime.serve.models import Model, find_models, spread
from hart_runtime.serve.requests import asked_for, parsed, schema
from hart_runtime.serve.server import spread_over_gpus
from tests.serving import PROMPT, Running, events_of, hart_run, later, until
from tests.strict import install_cuda
from tests.strict.device import Card


@pytest.fixture(scope="module")
def models(demo_bundle: Path) -> dict[str, Model]:
    return find_models([demo_bundle])


def test_the_pictures_are_those_of_hart_run(client: openai.OpenAI, demo_bundle: Path, tmp_path: Path) -> None:
    settings = {"guidance": 2, "top_k": 7, "top_p": 0.0, "smooth": True, "residual": True, "steps": 4}
    answer = client.images.generate(prompt=PROMPT, n=3, size="auto", extra_body={"seed": 7, **settings})
    drawn = [base64.b64decode(image.b64_json or "") for image in answer.data or []]
    options = ["--guidance", 2, "--top-k", 7, "--top-p", 0, "--smooth", "--residual", "--steps", 4]
    assert drawn == hart_run(demo_bundle, tmp_path, "--num-images", 3, "--seed", 7, "--threads", 1, *options)
    assert [image.to_dict()["seed"] for image in answer.data or []] == [7, 8, 9]
    assert answer.usage is not None
    tokens = answer.usage.input_tokens
    assert 0 < tokens <= 16
    assert answer.usage.output_tokens == 3 * (1 + 4 + 9 + 25 + 64)
    assert answer.usage.total_tokens == tokens + answer.usage.output_tokens
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")


def test_a_seed_is_chosen_and_told(client: openai.OpenAI, server: Running, tmp_path: Path) -> None:
    first, second = (client.images.generate(prompt=PROMPT).data or [] for _ in range(2))
    seeds = [image.to_dict()["seed"] for image in (*first, *second)]
    assert seeds[0] != seeds[1]
    data = base64.b64decode(first[0].b64_json or "")
    (tmp_path / "x.png").write_bytes(data)
    assert read_origin(tmp_path / "x.png").seed == seeds[0]
    assert server.drawn(seed=seeds[0]) == [data]


@pytest.mark.parametrize(("n", "partials"), [(1, 0), (1, 1), (1, 3), (3, 3), (10, 1), (1, 5)])
def test_a_stream(client: openai.OpenAI, server: Running, n: int, partials: int) -> None:
    stream = client.images.generate(
        prompt=PROMPT, n=n, stream=True, partial_images=partials, extra_body={"seed": 3}
    )
    partial: dict[int, list[int]] = {index: [] for index in range(n)}
    complete: dict[int, bytes] = {}
    for event in stream:
        told = event.to_dict()
        index = told["image_index"]
        assert isinstance(index, int)
        assert index not in complete, "the picture is the last that is told of itself"
        assert told["seed"] == 3 + index
        data = base64.b64decode(event.b64_json)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (event.output_format.upper(), (64, 64))
        if event.type == "image_generation.partial_image":
            partial[index].append(event.partial_image_index)
        else:
            complete[index] = data
            assert event.usage.output_tokens == 103
    assert list(partial.values()) == [[*range(partials)]] * n
    assert [complete[index] for index in range(n)] == server.drawn(n=n, seed=3)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats(server: Running, form: str) -> None:
    with server.stream(output_format=form, seed=1, partial_images=1) as response:
        found = list(events_of(response))
    assert [event["output_format"] for event in found] == [form, form]
    for event in found:
        with Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))) as image:
            assert image.format == form.upper()
    (best,), (small,) = (server.drawn(output_format="jpeg", output_compression=c) for c in (100, 5))
    assert len(small) < len(best)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 11}, "n", "expected 1 to 10, found 11"),
    ({"n": 0}, "n", "expected 1 to 10, found 0"),
    ({"n": "2"}, "n", "expected a whole number, found text ('2')"),
    ({"n": True}, "n", "expected a whole number, found True"),
    ({"n": 2.0}, "n", "expected a whole number, found 2.0"),
    ({"prompt": 7}, "prompt", "expected text, found 7"),
    ({"prompt": " "}, "prompt", "empty"),
    ({"prompt": "a" * 32_001}, "prompt", "at most 32000 characters, found 32001"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": ["a"]}, "prompt", "found a list"),
    ({"size": "1024x1024"}, "size", "draws 64x64 (or auto), found '1024x1024'"),
    ({"quality": "hd"}, "quality", "draws auto or standard, found 'hd'"),
    ({"quality": 3}, "quality", "expected text, found 3"),
    ({"background": "transparent"}, "background", "every pixel"),
    ({"output_format": "gif"}, "output_format", "still pictures"),
    ({"output_format": "svg"}, "output_format", "expected png or jpeg or webp"),
    ({"output_compression": 50}, "output_compression", "for jpeg and webp, found 50"),
    ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "0 to 100, found 101"),
    ({"response_format": "url"}, "response_format", "keeps no pictures"),
    ({"stream": "yes"}, "stream", "expected true or false"),
    ({"stream": True, "partial_images": 6}, "partial_images", "expected 0 to 5"),
    ({"stream": True, "partial_images": -1}, "partial_images", "found -1"),
    ({"partial_images": 2}, "partial_images", "needs stream: true"),
    ({"moderation": "low"}, "moderation", "who runs this server"),
    ({"style": "vivid"}, "style", "one style"),
    ({"complexity": "low"}, "complexity", "one way to draw"),
    ({"frame_count": 3}, "frame_count", "still pictures"),
    ({"frame_duration_ms": 3}, "frame_duration_ms", "still pictures"),
    ({"svg": {"model": "x"}}, "svg", "still pictures"),
    ({"user": 3}, "user", "expected text"),
    ({"safety_identifier": "x" * 513}, "safety_identifier", "at most 512 characters"),
    ({"seed": -1}, "seed", "found -1"),
    ({"seed": ""}, "seed", "expected a whole number"),
    ({"seed": 2**63}, "seed", "found 9223372036854775808"),
    ({"guidance": -1}, "guidance", "expected 0 to 1000"),
    ({"guidance": 1e999}, "guidance", "found inf"),
    ({"guidance": "7"}, "guidance", "expected a number"),
    ({"top_k": 513}, "top_k", "expected 1 to 512, found 513"),
    ({"top_p": 1.5}, "top_p", "expected 0 to 1"),
    ({"smooth": 1}, "smooth", "expected true or false"),
    ({"prune": 1}, "prune", "expected true or false"),
    ({"keep": "0.5"}, "keep", "expected the shares of tokens kept"),
    ({"unguided_scales": 6}, "unguided_scales", "expected 0 to 5, found 6"),
    ({"iterations": 3}, "iterations", "this model draws whole scales"),
    ({"guidance_schedule": "constant"}, "guidance_schedule", "this model draws whole scales"),
    ({"temperature": 0.5}, "temperature", "this model draws whole scales"),
    ({"speed": "faster"}, "speed", "expected exact or balanced or fast, found 'faster'"),
    ({"residual": "no"}, "residual", "expected true or false"),
    ({"steps": "many"}, "steps", "many"),
    ({"steps": 0}, "steps", "0"),
    ({"label": 3}, "label", "no classes"),
    ({"negative": "blurry"}, "negative", "empty prompt"),
    ({"negative_prompt": "blurry"}, "negative_prompt", "unknown 'negative_prompt'; there are prompt,"),
    ({"model": 3}, "model", "expected text"),
]


@pytest.mark.parametrize(("fields", "param", "said"), REFUSED)
def test_what_is_refused(models: dict[str, Model], fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        asked_for(checked({"prompt": PROMPT, **fields}), models)
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")
    assert caught.value.param == param
    assert said in caught.value.message
    assert "`" not in caught.value.message
    assert caught.value.code


def test_every_field_is_refused_somewhere_and_may_be_null(models: dict[str, Model]) -> None:
    assert {param for _, param, _ in REFUSED} >= FIELDS.keys()
    nothing = dict.fromkeys(FIELDS.keys() - {"prompt"})
    asked = asked_for(checked({"prompt": PROMPT, **nothing, "seed": 0}), models)
    assert asked == asked_for(checked({"prompt": PROMPT, "seed": 0}), models)
    assert (asked.n, asked.seed, asked.stream, asked.scales) == (1, 0, False, ())


def test_words_without_a_meaning_here_are_accepted(server: Running, models: dict[str, Model]) -> None:
    neutral = {
        "model": next(iter(models)),
        "quality": "standard",
        "background": "opaque",
        "moderation": "auto",
        "response_format": "b64_json",
        "size": "64x64",
        "user": "somebody",
    }
    answer = server.post({"prompt": PROMPT, "seed": 0, **neutral}).json()
    assert base64.b64decode(answer["data"][0]["b64_json"]) == server.drawn(seed=0)[0]
    assert answer["safety_identifier"] == "somebody"
    assert "somebody" not in server.log.read_text()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "expected JSON"),
        (b"[]", "expected a JSON object, found a list"),
        (b"null", "found null"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a", "guidance": NaN}', "NaN is no number"),
        (b'{"prompt": "a", "guidance": -Infinity}', "-Infinity is no number"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b"{}", "is required"),
        (b'{"prompt": null}', "is required"),
    ],
)
def test_bodies_that_are_none(models: dict[str, Model], raw: bytes, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        asked_for(checked(parsed(raw)), models)
    assert caught.value.status == 400
    assert said in caught.value.message


def test_errors_as_the_client_raises_them(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt=PROMPT, n=11, stream=True)
    assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
    assert bad.value.type == "invalid_request_error"
    assert str(bad.value) == "Error code: 400 - n: expected 1 to 10, found 11"
    assert bad.value.request_id is not None
    assert f'"request_id": "{bad.value.request_id}"' in server.log.read_text()
    with pytest.raises(openai.NotFoundError, match="there is no 'dall-e-3'"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.NotFoundError, match="not asked for here, but at /v1/images/edits, with vary"),
    ):
        client.images.create_variation(image=b"")
    with pytest.raises(openai.NotFoundError, match="no such address"):
        client.chat.completions.create(model="x", messages=[])
    for status, kind, said in (
        (405, {"method": "GET"}, "GET is not answered here"),
        (415, {"method": "POST", "content": "{}"}, "expected application/json"),
        (413, {"method": "POST", "json": {"prompt": "a" * (1 << 20)}}, "at most 1048576 bytes"),
    ):
        response = _asked(server, **kind)
        assert response["status"] == status
        assert said in response["error"]["message"]
        assert response["error"]["type"] == "invalid_request_error"


def _asked(server: Running, method: str, **options: Any) -> dict[str, Any]:
    import httpx

    response = httpx.request(method, f"{server.url}/v1/images/generations", **options)
    assert response.headers["x-request-id"]
    return {"status": response.status_code, **response.json()}


def test_models(client: openai.OpenAI, models: dict[str, Model]) -> None:
    (listed,) = client.models.list().data
    assert listed.id == next(iter(models))
    assert client.models.retrieve(listed.id).created == listed.created
    with pytest.raises(openai.NotFoundError, match="there is no 'x/y z'"):
        client.models.retrieve("x/y z")


def test_requests_share_batches(server: Running) -> None:
    """While one is drawn others wait, and are drawn together; whose settings differ are not."""
    before = server.metrics()
    with server.busy():
        bodies = [{"prompt": PROMPT, "seed": seed, "n": n} for seed, n in ((1, 2), (5, 3), (9, 1))]
        waiting = [later(server.drawn, **body) for body in (*bodies, {**bodies[0], "top_k": 3})]
        until(lambda: server.metrics()["hart_queue_pictures"] == 8)
    answers = [future.result() for future in waiting]
    after = server.metrics()
    assert after["hart_batches_stopped_total"] == before["hart_batches_stopped_total"] + 1
    assert after["hart_batch_pictures_count"] == before["hart_batch_pictures_count"] + 2
    assert after["hart_batch_pictures_sum"] == before["hart_batch_pictures_sum"] + 8
    assert answers[:3] == [server.drawn(seed=seed, n=n) for seed, n in ((1, 2), (5, 3), (9, 1))]
    assert answers[3] != answers[0]


def test_a_full_queue(server: Running, client: openai.OpenAI) -> None:
    with server.busy():
        with server.stream(n=10), server.stream(n=10):
            with pytest.raises(openai.RateLimitError) as full:
                client.images.generate(prompt=PROMPT)
            assert 1 <= int(full.value.response.headers["retry-after"]) <= 120
            assert (full.value.code, full.value.type) == ("rate_limit_exceeded", "rate_limit_error")
            assert "20 pictures are waiting" in str(full.value)
            assert server.get("/health").json() == {"status": "alive"}
        until(lambda: server.metrics()["hart_queue_pictures"] == 0)
    until(server.idle)
    assert len(server.drawn(n=10)) == 10


def test_a_prompt_that_is_cut_is_told_of(server: Running, tmp_path: Path, demo_bundle: Path) -> None:
    """The demo reads 16 tokens; hart-run draws the same, with a warning."""
    long, seed = f"{PROMPT} {'with a star ' * 9}", 4
    whole = server.post({"prompt": PROMPT, "seed": seed}).json()
    assert "revised_prompt" not in whole["data"][0]
    answer = server.post({"prompt": long, "seed": seed}).json()
    (image,) = answer["data"]
    read = image["revised_prompt"]
    assert long.startswith(read)
    assert len(PROMPT) < len(read) < len(long)
    assert answer["usage"]["input_tokens"] == 16
    data = base64.b64decode(image["b64_json"])
    assert [data] == hart_run(demo_bundle, tmp_path, "--seed", seed, "--threads", 1, prompt=long)
    with server.stream(prompt=long, seed=seed) as response:
        (event,) = events_of(response)
    assert event["revised_prompt"] == read
    with (
        Image.open(io.BytesIO(data)) as drawn,
        Image.open(io.BytesIO(server.drawn(prompt=read, seed=4)[0])) as same,
    ):
        assert drawn.tobytes() == same.tobytes()


def test_a_prompt_that_repeats_is_encoded_once(server: Running) -> None:
    server.drawn(prompt="a blue star")
    before = server.metrics()["hart_prompts_encoded_total"]
    for seed in range(3):
        server.drawn(prompt="a blue star", seed=seed)
    server.drawn(prompt="a blue star on a green background")
    assert server.metrics()["hart_prompts_encoded_total"] == before + 1


def test_a_worker_for_every_gpu(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    found = models.values()
    assert spread_over_gpus(["auto"], found) == ["auto"]
    card = Card()
    for cards, expected in (((card,), ["auto"]), ((card, card), ["cuda:0", "cuda:1"])):
        install_cuda(monkeypatch, cards)
        assert spread_over_gpus(["auto"], found) == expected
        assert spread_over_gpus(["cpu", "cuda:1"], found) == ["cpu", "cuda:1"]
    int8 = [replace(model, manifest=replace(model.manifest, precision="int8")) for model in found]
    assert spread_over_gpus(["auto"], int8) == ["auto"]


@pytest.mark.parametrize(
    ("patch_nums", "count", "expected"),
    [
        ((1, 2, 3, 5, 8), 0, ()),
        ((1, 2, 3, 5, 8), 1, (3,)),
        ((1, 2, 3, 5, 8), 3, (2, 3, 4)),
        ((1, 2, 3, 5, 8), 5, (0, 1, 2, 3, 4)),
        ((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), 3, (10, 12, 13)),
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2, (7, 8)),
    ],
)
def test_previews_are_spread_over_the_time(
    patch_nums: tuple[int, ...], count: int, expected: tuple[int, ...]
) -> None:
    assert spread([side**2 for side in patch_nums], count) == expected


def test_the_document_names_every_field(server: Running) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    for path, kind, fields, required in (
        ("generations", "application/json", FIELDS, ["prompt"]),
        ("edits", "multipart/form-data", EDIT_FIELDS, ["image", "prompt"]),
    ):
        told = paths[f"/v1/images/{path}"]["post"]["requestBody"]["content"][kind]["schema"]
        assert told == schema(fields, required)
        assert told["properties"].keys() == fields.keys()
        assert told["required"] == required


def test_the_log_holds_no_words_of_a_client(server: Running) -> None:
    server.drawn(prompt="nobody reads this")
    server.post({"prompt": "nobody reads this", "n": 11})
    until(server.idle)
    log = server.log.read_text()
    assert "nobody reads this" not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "message", "request_id", "status", "seconds"} <= lines[-1].keys()
