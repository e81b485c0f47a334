"""The pages that are made from the code: sentences by their causes, and names of other tools."""

from __future__ import annotations

import re
from pathlib import Path

import click

from hart_runtime.common.other_names import DIFFUSERS, OTHER_NAMES, SAMPLE, SD_CPP, OtherName
from tests.handbook.causes import CAUSES, Cause
from tests.handbook.sentences import COMMANDS, HOLE, sentences
from tests.imports import ROOT

TROUBLESHOOTING = f"""# Troubleshooting

Every sentence that this project ends with, why it is said, and the command that mends it: search this
page for words of yours. `{HOLE}` stands for what is filled in: your file, your value, what a library
said. Options are written as commands print them; in Python the same parameter stands between backticks
(`--top-k` is `top_k`). Exit code 2 is bad input, before anything was drawn, 1 is a run that failed.

*Made from the code by `python -m tests.handbook`; tests/test_handbook.py holds it complete.*
"""
COMING_FROM = """# Coming from other tools

What {diffusers}, {sd_cpp} and the published {sample} call what is here. In Python and in requests a name
of theirs is refused with ours: `unknown guidance_scale; ...; guidance_scale, of diffusers, is guidance
here`.

Three things are different whatever one comes from. A checkpoint is exported once, into a bundle, and only
bundles are drawn with. A seed belongs to one picture and stands for the same bytes in any batch. And
there is no loop over the whole picture whose length is chosen: scales are drawn one after the other, as
many as the model has.

*Made from the code by `python -m tests.handbook`; tests/test_handbook.py checks it against our options.*
"""
EXAMPLES = {
    DIFFUSERS: """```python
from hart_runtime import Pipeline

pipeline = Pipeline.load("engines/demo")  # and not from_pretrained: hart-export has made a bundle of it
images = pipeline("a green ring", num_images=2, guidance=4.5, seed=7)  # a list of PIL images
images[0].save("ring.png")
```
""",
    SD_CPP: """```sh
hart-run --engine engines/demo "a green ring" --guidance 4.5 --seed 7 --num-images 2 --output ring.png
```
""",
    SAMPLE: """```sh
hart-export --precision fp16
hart-run --engine engines/demo "a green ring" --guidance 4.5 --seed 1 --output ring.png
```
""",
}
"""Blocks that tests/test_readme.py runs."""


def by_cause() -> tuple[dict[Cause, list[str]], list[str]]:
    """Sentences of each cause, and those of none with the place that says them."""
    found: dict[Cause, list[str]] = {cause: [] for cause in CAUSES}
    without = []
    for sentence in sentences():
        causes = (c for c in CAUSES if any(re.search(pattern, sentence.text) for pattern in c.patterns))
        if cause := next(causes, None):
            found[cause].append(sentence.text)
        else:
            without.append(f"{sentence.place}: {sentence.text}")
    return found, without


def troubleshooting() -> str:
    parts = [TROUBLESHOOTING]
    for cause, said in by_cause()[0].items():
        block = f"```text\n{chr(10).join(cause.commands)}\n```\n\n" if cause.commands else ""
        listed = "\n".join(f"- `` {text} ``" if "`" in text else f"- `{text}`" for text in sorted(said))
        parts.append(f"## {cause.title}\n\n{cause.why}\n\n{block}{listed}\n")
    return "\n".join(parts)


def coming_from() -> str:
    parts = [COMING_FROM.format(diffusers=DIFFUSERS, sd_cpp=SD_CPP, sample=f"`{SAMPLE}`")]
    for tool, example in EXAMPLES.items():
        rows = [f"| {_there(o, tool)} | {_here(o)} | {o.note} |" for o in OTHER_NAMES if tool in o.tools]
        table = "\n".join(["| there | here | what differs |", "|---|---|---|", *rows])
        parts.append(f"## {tool}\n\n{example}\n{table}\n")
    return "\n".join(parts)


def _there(other: OtherName, tool: str) -> str:
    spelled = {SD_CPP: f"--{other.name.replace('_', '-')}", SAMPLE: f"--{other.name}"}
    return f"`{spelled.get(tool, other.name)}`"


def _here(other: OtherName) -> str:
    """A parameter with the option that hart-run has for it, or a command with its option."""
    if not other.ours:
        return "nothing"
    command, _, parameter = other.ours[0].rpartition(" ")
    found = {p.name: p for p in COMMANDS[command or "hart-run"].params}.get(parameter)
    if found is None or (isinstance(found, click.Argument) and not command):
        return f"`{parameter}`"
    option = (
        found.human_readable_name.strip("[]")
        if isinstance(found, click.Argument)
        else max(found.opts, key=len)
    )
    return f"`{command} {option}`" if command else f"`{parameter}`, `{option}`"


PAGES: dict[Path, str] = {
    ROOT / "docs" / "troubleshooting.md": troubleshooting(),
    ROOT / "docs" / "coming-from.md": coming_from(),
}
