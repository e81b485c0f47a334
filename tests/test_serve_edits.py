"""Pictures that clients send: OpenAI's edits, which draw what hart-run draws of the same files."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.requests import Request

from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.png import read_origin
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.fields import EDIT_FIELDS, FIELDS
from hart_runtime.serve.models import Model, find_models
from hart_runtime.serve.requests import Asked
from hart_runtime.serve.scheduler import Scheduler
from hart_runtime.serve.security import MOST_UPLOAD
from hart_runtime.serve.uploads import MOST_PIXELS, MOST_UPLOADS, Uploads
from tests.serving import PROMPT, Running, hart_run, later, until

PIXELS = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
DRAWN = np.zeros((64, 64), np.bool_)
DRAWN[16:48, 8:40] = True


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


PICTURE = png(PIXELS)
MASK = png(np.where(DRAWN[..., None], 0, 255).astype(np.uint8).repeat(4, 2))
"""As OpenAI has it: what is transparent is drawn."""
BOTH = {"image": PICTURE, "mask": MASK}


@pytest.fixture(scope="module")
def models(demo_bundle: Path) -> dict[str, Model]:
    return find_models([demo_bundle])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, data in BOTH.items():
        (folder / f"{name}.png").write_bytes(data)
    return folder


def of(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]


def test_the_pictures_are_those_of_hart_run(
    client: openai.OpenAI, demo_bundle: Path, files: Path, tmp_path: Path
) -> None:
    """Whatever is said of the picture, by the names of hart-run."""
    image, masked = ("--image", files / "image.png"), ("--mask", files / "mask.png")
    cases: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        ({"mask": MASK, "n": 2}, (*masked, "--num-images", 2)),
        (
            {"mask": MASK, "extra_body": {"anew": 2, "paste": False, "guidance": 2.5, "steps": 4}},
            (*masked, "--anew", 2, "--no-paste", "--guidance", 2.5, "--steps", 4),
        ),
        ({"extra_body": {"vary": 2}}, ("--vary", 2)),
        ({"extra_body": {"outpaint": "16,0,8,0"}}, ("--outpaint", "16,0,8,0")),
        (
            {"extra_body": {"outpaint": [0, 9, 0, 0], "fit": "stretch"}},
            ("--outpaint", "0,9,0,0", "--fit", "stretch"),
        ),
    ]
    for number, (fields, options) in enumerate(cases):
        fields["extra_body"] = {"seed": 7, **fields.get("extra_body", {})}
        answer = client.images.edit(image=PICTURE, prompt=PROMPT, **fields)
        drawn = [base64.b64decode(one.b64_json or "") for one in answer.data or []]
        (folder := tmp_path / str(number)).mkdir()
        assert drawn == hart_run(demo_bundle, folder, "--seed", 7, "--threads", 1, *image, *options), options
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.image_tokens == 103
        assert answer.usage.total_tokens == answer.usage.input_tokens + 103 * len(drawn)
    (tmp_path / "x.png").write_bytes(drawn[0])
    record = read_origin(tmp_path / "x.png").picture
    assert record is not None
    assert (record.fit, record.outpaint) == ("stretch", (0, 9, 0, 0))


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream(client: openai.OpenAI, server: Running, n: int) -> None:
    """What is kept stands in every view of it."""
    stream = client.images.edit(
        image=("of any.name", PICTURE),
        mask=MASK,
        prompt=PROMPT,
        n=n,
        stream=True,
        partial_images=3,
        output_format="png",
        extra_body={"seed": 3},
    )
    seen: dict[int, list[str]] = {}
    complete: dict[int, bytes] = {}
    for event in stream:
        index = cast("int", event.to_dict()["image_index"])
        seen.setdefault(index, []).append(event.type)
        complete[index] = base64.b64decode(event.b64_json)
        assert np.array_equal(opened(complete[index])[~DRAWN], PIXELS[~DRAWN])
        if event.type == "image_edit.completed":
            assert event.usage.input_tokens_details.image_tokens == 103
    whole = [*["image_edit.partial_image"] * 3, "image_edit.completed"]
    assert [seen[index] for index in range(n)] == [whole] * n
    assert [complete[index] for index in range(n)] == of(server.edit(BOTH, n=n, seed=3))


def test_edits_share_batches_with_edits(server: Running) -> None:
    """Each with a picture of its own, and drawn as alone; what has no picture is drawn without them."""
    other = {"image": png(PIXELS[::-1].copy()), "mask": MASK}
    asked = ((BOTH, 1), (other, 1), (BOTH, 5))
    before = server.metrics()
    with server.busy():
        waiting = [later(server.edit, given, seed=seed) for given, seed in asked]
        plain = later(server.drawn, seed=1)
        until(lambda: server.metrics()["hart_queue_pictures"] == 4)
    answers = [of(future.result()) for future in waiting]
    without = plain.result()
    until(lambda: server.metrics()["hart_batch_pictures_sum"] == before["hart_batch_pictures_sum"] + 4)
    assert server.metrics()["hart_batch_pictures_count"] == before["hart_batch_pictures_count"] + 2
    assert answers == [of(server.edit(given, seed=seed)) for given, seed in asked]
    assert without == server.drawn(seed=1)
    assert len({data for (data,) in answers}) == 3


def read(models: Mapping[str, Model], files: Any = BOTH, reading: int = 0, **fields: Any) -> Asked:
    """What the server reads in a form, without a server."""
    sent = httpx.Request("POST", "http://x/v1/images/edits", files=files, data={"prompt": PROMPT, **fields})
    body = sent.read()

    headers = [(name.lower(), value) for name, value in sent.headers.raw]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def asked() -> Asked:
        uploads = Uploads(cast("Scheduler", _Idle()), models)
        uploads._reading = reading
        return await uploads(Request({"type": "http", "headers": headers}, receive))

    return asyncio.run(asked())


class _Idle:
    def wait(self) -> float:
        return 0.0


LARGE = png(np.zeros((4097, 4096), np.uint8))
WHITE = png(np.full((64, 64), 255, np.uint8))
CLEAR = png(np.dstack([PIXELS, np.where(DRAWN, 0, 255).astype(np.uint8)]))
REFUSED: list[tuple[Any, dict[str, Any], str, str]] = [
    ({"mask": MASK}, {}, "image", "is required"),
    ({"image": b""}, {}, "image", "is no picture in one of the formats PNG, JPEG"),
    ({"image": b"http://169.254.169.254/x.png"}, {}, "image", "is no picture"),
    ({"image": PICTURE[:900]}, {"vary": "1"}, "image", "not a readable picture"),
    ({"image": PICTURE}, {}, "image", "nothing is said of what to draw: give mask, outpaint or vary"),
    ({"image": LARGE}, {"vary": "1"}, "image", f"1 to {MOST_PIXELS} pixels, found 4096 x 4097"),
    (
        [("image[]", PICTURE), ("image[]", PICTURE)],
        {"vary": "1"},
        "image",
        "goes on from one picture, found 2",
    ),
    ({"image": PICTURE, "mask": LARGE}, {}, "mask", "pixels, found 4096 x 4097"),
    ({"image": PICTURE, "mask": WHITE}, {}, "mask", "expected a PNG with transparency"),
    ({"image": PICTURE, "mask": CLEAR[:900]}, {}, "mask", "not a readable picture"),
    ({"image": PICTURE, "mask": png(np.zeros((32, 64, 4), np.uint8))}, {}, "mask", "64 x 64, found 64 x 32"),
    ({"image": PICTURE, "mask": png(np.full((64, 64, 4), 255, np.uint8))}, {}, "mask", "is black, or opaque"),
    ({"mask": MASK}, {"image": "https://example.com/a.png"}, "image", "expected a file, found text ('https"),
    ({"mask": MASK, "prompt": b"x"}, {}, "prompt", "stands in the form twice"),
    (BOTH, {"n": ["1", "2"]}, "n", "stands in the form twice"),
    ({"mask": MASK, "n": b"1"}, {}, "n", "expected a whole number, found a file"),
    (BOTH, {"n": "two"}, "n", "expected a whole number, found text ('two')"),
    (BOTH, {"n": "2.0"}, "n", "expected a whole number, found text ('2.0')"),
    (BOTH, {"n": "9" * 5000}, "n", "expected a whole number, found text"),
    (BOTH, {"n": "11"}, "n", "expected 1 to 10, found 11"),
    (BOTH, {"stream": "yes"}, "stream", "expected true or false, found text ('yes')"),
    (BOTH, {"guidance": "much"}, "guidance", "expected a number, found text ('much')"),
    (BOTH, {"guidance": "nan"}, "guidance", "expected 0 to 1000"),
    (BOTH, {"partial_images": "2"}, "partial_images", "needs stream: true"),
    (BOTH, {"seed": ""}, "seed", "expected a whole number"),
    (BOTH, {"size": "1024x1024"}, "size", "draws 64x64"),
    (BOTH, {"background": "transparent"}, "background", "every pixel"),
    (BOTH, {"svg[model]": "x"}, "svg", "still pictures"),
    (BOTH, {"input_fidelity": "high"}, "input_fidelity", "expected low, found 'high': what is kept is kept"),
    (BOTH, {"markup": "x"}, "markup", "give a mask"),
    (BOTH, {"outpaint": "1,2"}, "outpaint", "expected pixels to the left"),
    (BOTH, {"outpaint": "1,2,3,-4"}, "outpaint", "found -4"),
    (BOTH, {"outpaint": "9999,9999,9999,9999"}, "outpaint", "pixels, found"),
    (BOTH, {"vary": "1"}, "vary", "draws everywhere, found mask, outpaint or anew beside it"),
    ({"image": PICTURE}, {"vary": "5"}, "vary", "expected 1 to 4"),
    (BOTH, {"anew": "6"}, "anew", "expected 0 to 5"),
    (BOTH, {"fit": "bent"}, "fit", "expected cover or contain or stretch"),
    (BOTH, {"paste": "no"}, "paste", "expected true or false"),
    (BOTH, {"strength": "0.5"}, "strength", "unknown 'strength'; there are image, mask, prompt,"),
    (BOTH, {"model[x]": "y"}, "model", "there is no 'y'"),
]


@pytest.mark.parametrize(("files", "fields", "param", "said"), REFUSED)
def test_what_is_refused(
    models: dict[str, Model], files: Any, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(Refusal) as caught:
        read(models, files, **fields)
    assert caught.value.status == (404 if "there is no" in said else 400)
    assert caught.value.param == param
    assert said in caught.value.message
    assert "`" not in caught.value.message
    assert caught.value.code


def test_every_field_of_edits_is_refused_somewhere() -> None:
    assert {param for _, _, param, _ in REFUSED} >= EDIT_FIELDS.keys() - FIELDS.keys()
    assert FIELDS.items() <= EDIT_FIELDS.items()


def test_what_a_form_stands_for(models: dict[str, Model]) -> None:
    for files in (BOTH, [("image[]", PICTURE), ("mask", MASK)], {"image": CLEAR}):
        source = read(models, files).source
        assert source is not None
        assert np.array_equal(source.drawn, DRAWN)
    jpeg = io.BytesIO()
    Image.fromarray(PIXELS).resize((90, 70)).save(jpeg, "JPEG")
    asked = read(
        models,
        {"image": ("x.bin", jpeg.getvalue(), "text/html")},
        outpaint="1,2,3,4",
        paste="false",
        anew="2",
        stream="true",
        partial_images="2",
        guidance="3",
        smooth="false",
        seed="9",
        input_fidelity="low",
    )
    assert asked.source is not None
    assert (asked.source.fit, asked.source.outpaint) == ("contain", (1, 2, 3, 4))
    assert (asked.source.paste, asked.source.anew, asked.source.vary) == (False, 2, None)
    assert (asked.stream, asked.seed, asked.settings.guidance, asked.settings.smooth) == (True, 9, 3.0, False)
    assert len(asked.scales) == 2


def test_classes_are_none_unless_they_are_named(var_bundle: Path) -> None:
    models = find_models([var_bundle])
    assert read(models, prompt="").prompt == "none"
    assert read(models, prompt="", label="2").prompt == read(models, prompt="2").prompt != "none"


def test_a_bundle_without_an_encoder(models: dict[str, Model]) -> None:
    (name, model), *_ = models.items()
    graphs = {graph: spec for graph, spec in model.manifest.graphs.items() if graph != ENCODER}
    old = {name: replace(model, manifest=replace(model.manifest, graphs=graphs))}
    with pytest.raises(Refusal, match="takes no pictures, it has no encoder; who") as no:
        read(old)
    assert (no.value.status, no.value.param) == (400, "model")


def test_uploads_are_bounded(models: dict[str, Model], server: Running) -> None:
    with pytest.raises(Refusal, match=f"{MOST_UPLOADS} uploads are waiting") as full:
        read(models, reading=MOST_UPLOADS)
    assert (full.value.status, full.value.headers["Retry-After"]) == (429, "1")
    assert read(models, reading=MOST_UPLOADS - 1).n == 1
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    pieces = itertools.chain([head], itertools.repeat(bytes(1 << 20), MOST_UPLOAD >> 20))
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{server.url}/v1/images/edits", content=pieces, headers=kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    noisy = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    assert len(given := png(noisy)) > 3 << 20, "more than a request in JSON may have"
    assert len(of(server.edit({"image": given}, vary=1))) == 1


@pytest.mark.parametrize(
    ("kind", "body", "status", "said"),
    [
        ("application/json", b"{}", 415, "expected multipart/form-data, found 'application/json'"),
        ("application/x-www-form-urlencoded", b"prompt=x", 415, "expected multipart/form-data"),
        ("multipart/form-data", b"", 400, "Missing boundary"),
        ("multipart/form-data; boundary=x", b"nothing", 400, "expected a form in parts"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nz\r\n--x--", 400, '"name" must be provided'),
        ("multipart/form-data; boundary=x", b"", 400, "prompt: is required"),
        (
            "multipart/form-data; boundary=x; charset=idna",
            b'--x\r\nContent-Disposition: form-data; name="a..b"\r\n\r\nz..z\r\n--x--\r\n',
            400,
            "",
        ),
    ],
)
def test_bodies_that_are_no_forms(server: Running, kind: str, body: bytes, status: int, said: str) -> None:
    answer = httpx.post(f"{server.url}/v1/images/edits", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_words_of_an_answer(server: Running, models: dict[str, Model]) -> None:
    """Nothing of a client is kept: not its words, not its files."""
    answer = server.edit(BOTH, prompt="nobody reads this", seed=0, quality="standard", user="somebody").json()
    assert (answer["size"], answer["quality"], answer["safety_identifier"]) == ("64x64", "auto", "somebody")
    assert answer["data"][0]["seed"] == 0
    assert "nobody reads this" not in server.log.read_text()
    assert server.get("/v1/models").json()["data"][0]["edits"] is True
