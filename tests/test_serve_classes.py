"""A server of texts and classes: each model draws what it was trained for, and says so."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hart_runtime.runtime.cli import main as run
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.fields import checked
from hart_runtime.serve.models import Model, find_models
from hart_runtime.serve.requests import Asked, asked_for
from tests.serving import PROMPT, Running, serving


@pytest.fixture(scope="module")
def models(demo_bundle: Path, var_bundle: Path) -> dict[str, Model]:
    return find_models([demo_bundle, var_bundle])


@pytest.fixture(scope="module")
def server(demo_bundle: Path, var_bundle: Path) -> Iterator[Running]:
    """With room for one of them: they take turns."""
    with serving("--engine", demo_bundle, "--engine", var_bundle, "--threads", 1) as running:
        yield running


def test_both_are_drawn(
    server: Running, models: dict[str, Model], var_bundle: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    text, classes = models
    words = ["2", "--engine", str(var_bundle), "--device", "cpu", "--threads", "1", "--seed", "5"]
    done = CliRunner().invoke(run, [*words, "--output", str(tmp_path / "x.png")])
    assert done.exit_code == 0, done.output
    for asked in ({"label": 2}, {"label": "2"}, {"prompt": "2"}):
        answer = server.post({"prompt": "", "model": classes, "seed": 5, **asked})
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == (tmp_path / "x.png").read_bytes()
        assert answer.json()["usage"]["input_tokens"] == 0
        assert len(server.drawn(model=text)) == 1
    assert server.get(f"/v1/models/{text}").json()["class_names"] is None
    told = server.get(f"/v1/models/{classes}").json()
    assert len(told["class_names"]) == told["classes"] > 2
    assert "residual" not in told["settings"]


def test_quality_is_a_preset_of_the_model(models: dict[str, Model], server: Running) -> None:
    """Where it has some; its own settings are what both of the contract's neutral words stand for."""
    name = [*models][1]
    asked = {"model": name, "label": 1, "seed": 2}

    def of(**more: Any) -> Asked:
        return asked_for(checked({**asked, **more}), models)

    own, *others = (of(quality=word) for word in ("auto", "standard", None))
    assert others == [own, own]
    assert of(quality="fid").settings.guidance == 1.5
    assert of(quality="fid", guidance=3).settings.guidance == 3
    fid = server.post({**asked, "quality": "fid"}).json()
    assert fid["quality"] == "fid"
    assert fid["data"] != server.post(asked).json()["data"]


@pytest.mark.parametrize(
    ("which", "fields", "param", "said"),
    [
        (0, {"prompt": PROMPT, "label": 2}, "label", "draws from a prompt, and has no classes"),
        (1, {}, "label", "is required"),
        (1, {"prompt": ""}, "label", "is required"),
        (1, {"label": 10**6}, "label", "class 1000000: expected 0 to"),
        (1, {"label": "no such thing"}, "label", "class 'no such thing'"),
        (1, {"prompt": PROMPT}, "prompt", "class 'a red circle"),
        (1, {"prompt": "1", "label": 2}, "prompt", "give one of them"),
        (1, {"label": 2, "steps": 3}, "steps", "no residual"),
        (1, {"label": 2, "quality": "high"}, "quality", "auto or standard or demo or fid, found 'high'"),
        (1, {"label": True}, "label", "expected text or a whole number, found True"),
    ],
)
def test_what_is_refused(
    models: dict[str, Model], which: int, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(Refusal) as caught:
        asked_for(checked({"model": [*models][which], **fields}), models)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert said in caught.value.message
