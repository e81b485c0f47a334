"""The pages made from the code are complete, and say what commands and the API really have."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hart_runtime import InputError, Pipeline
from hart_runtime.common.other_names import OTHER_NAMES, OtherName
from hart_runtime.common.settings import LIMITS
from hart_runtime.runtime.call import Options
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.fields import FIELDS, checked
from tests.handbook.causes import CAUSES, Cause
from tests.handbook.pages import PAGES, by_cause
from tests.handbook.sentences import COMMANDS, HOLE, sentences

HOW = "write it so that it falls under a cause of tests/handbook/causes.py, or add a pattern or a cause there"


def test_every_sentence_has_a_cause() -> None:
    found, without = by_cause()
    assert without == [], HOW
    assert sum(map(len, found.values())) > 400


def test_every_pattern_finds_a_sentence() -> None:
    found, _ = by_cause()
    idle = {
        pattern
        for cause, said in found.items()
        for pattern in cause.patterns
        if not any(re.search(pattern, text) for text in said)
    }
    assert idle == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_those_of_the_code(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], "run: python -m tests.handbook"


def on_the_page(said: str) -> list[str]:
    """Sentences that are this one, holes filled in."""
    texts = (sentence.text for sentence in sentences())
    return [
        text for text in texts if re.fullmatch(".*".join(map(re.escape, text.split(HOLE))), said, re.DOTALL)
    ]


@pytest.mark.parametrize(
    "line",
    [
        'hart-run --engine nowhere "a red circle"',
        "hart-run --engine EMPTY",
        "hart-export nowhere",
        "hart-export . --tokenizer nowhere",
        "hart-export --demo classes EMPTY",
        "hart-build --engine EMPTY",
        "hart-serve --engine EMPTY --host 0.0.0.0",
        "hart-batch nowhere --engine EMPTY --output out",
        "hart-bench --against torch-eager --checkpoint EMPTY",
        "hart-bench compare nowhere nowhere",
        "hart-compare --engine EMPTY",
    ],
)
def test_what_commands_say_is_on_the_page(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "EMPTY").mkdir()
    command, *words = shlex.split(line)
    done = CliRunner().invoke(COMMANDS[command], words)
    assert done.exit_code == 2, done.output
    said = done.output.splitlines()[-1]
    assert said.startswith("error: ")
    told = [text for text in on_the_page(said.removeprefix("error: ")) if len(re.findall(r"\w\w+", text)) > 2]
    assert told, said


def test_a_sentence_that_nobody_says_is_not_on_the_page() -> None:
    assert on_the_page("the moon is made of cheese; export it with a crust") == []


def commands(cause: Cause) -> list[list[str]]:
    return [shlex.split(line) for line in cause.commands if line.startswith("hart-")]


def test_commands_that_mend_exist() -> None:
    """Every command and every option of theirs."""
    found = [words for cause in CAUSES for words in commands(cause)]
    assert len(found) > 30
    for name, *words in found:
        unknown = [word for word in words if word.startswith("--") and word not in known_options(name)]
        assert unknown == [], (name, words)


def known_options(command: str) -> set[str]:
    found = {"--help"}
    for parameter in COMMANDS[command].params:
        found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def test_names_of_other_tools_stand_for_names_of_ours() -> None:
    calls = {
        name for call in (Pipeline.batches, Pipeline.load) for name in inspect.signature(call).parameters
    }
    parameters = {*calls, *LIMITS, *Options.__annotations__}
    for other in OTHER_NAMES:
        for ours, known in zip(other.ours, (parameters, FIELDS), strict=False):
            command, _, parameter = ours.rpartition(" ")
            if command:
                assert parameter in {p.name for p in COMMANDS[command].params}, other
            elif parameter.startswith("Pipeline."):
                assert callable(getattr(Pipeline, parameter.partition(".")[2])), other
            else:
                assert parameter in known, other


def test_each_tool_has_a_name_once() -> None:
    found = [(tool, other.name) for other in OTHER_NAMES for tool in other.tools]
    assert len(found) == len(set(found))


HERE = [other for other in OTHER_NAMES if other.ours and other.ours[0] in LIMITS and other.name not in LIMITS]
NOTHING = [other for other in OTHER_NAMES if not other.ours]


@pytest.mark.parametrize("other", [*HERE, *NOTHING], ids=lambda other: other.name)
def test_other_names_are_told_of(other: OtherName, demo: Pipeline) -> None:
    """In Python and in requests, in the same words."""
    named: dict[str, Any] = {other.name: 1}
    with pytest.raises(InputError) as in_python:
        demo("a red circle", **named)
    with pytest.raises(Refusal) as in_requests:
        checked({"prompt": "a red circle", **named})
    told = (
        f"{other.name}, of {' and '.join(other.tools)}, is {other.ours[0] if other.ours else 'nothing'} here"
    )
    for error in (in_python, in_requests):
        assert str(error.value).endswith(f"; {told}" + (f": {other.note}" if other.note else "")), error.value


def test_requests_have_their_own_name_of_it() -> None:
    with pytest.raises(Refusal, match="num_images_per_prompt, of diffusers, is n here: "):
        checked({"num_images_per_prompt": 2})
