"""What can be known of a checkpoint before gigabytes are read."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hart_runtime.common.checkpoint import LLM, TEXT_ENCODER, Checkpoint, Network
from hart_runtime.common.config import TransformerConfig
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import whole_file
from hart_runtime.common.version import __version__
from hart_runtime.export.dry_run import Forecast, forecast, what_does_not_fit
from hart_runtime.export.request import Request
from hart_runtime.export.system_prompt import NONE, SHA256, sha256_of_system_prompt
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import MisfitError, check_text_encoder
from hart_runtime.hart.weights import Stored, opened

LEVELS = "lvl_1L"
"""The stored table of a transformer that tells of which scale each of its tokens is."""
PUBLISHED = "published"
Noting = Callable[[str | None], AbstractContextManager[None]]


@dataclass
class Found:
    """What a check finds, without a word of whose machine it is: files are named within the checkpoint."""

    version: str = __version__
    family: str | None = None
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    pyramid: list[int] | None = None
    """Sides of the scales, by the configuration."""
    stored_pyramid: list[int] | None = None
    """The same by the table that lies with the weights, where there is one."""
    context: int | None = None
    """Tokens of text in front of the scales, by the configuration; None of classes."""
    stored_context: int | None = None
    sampling: dict[str, Any] | None = None
    system_prompt: str | None = None
    """"published", "none", or another's sha256; None where there is no text."""
    vocabulary: int | None = None
    """Words of the text tokenizer."""
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By precision: bytes of weights, and what does not fit this machine."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(request: Request, pickled: Mapping[str, int]) -> Found:
    """Look at configurations, headers and small tables; what is wrong is noted, and the rest looked at.

    Args:
        pickled: weight files that were not looked into, as
            :class:`hart_runtime.export.headers.Headers` has them.
    """
    found, checkpoint = Found(), request.checkpoint
    noting = _noting(found, checkpoint)
    for name, size in pickled.items():
        found.notes.append(f"{name}: {size / 1e6:,.1f} MB, pickled: not looked into before a download")
    for name, network in checkpoint.networks.items():
        with noting(name):
            found.networks[name] = _described(network)
    with noting(None):
        _tell_configurations(found, request)
    with noting(None):
        for name, compare in checkpoints.checks(checkpoint).items():
            with noting(name):
                compare()
    if (text := checkpoint.text_encoder) is not None and text.has_weights:
        with noting(TEXT_ENCODER):
            check_text_encoder(text)
    with noting(LLM):
        if checkpoint.llm.has_weights:
            found.stored_context, found.stored_pyramid = _stored_levels(checkpoint.llm)
    if not found.problems:
        with noting(None):
            _tell_sizes(found, forecast(request))
    return found


def _noting(found: Found, checkpoint: Checkpoint) -> Noting:
    """Errors become problems, with places within the checkpoint."""
    folders = {str(network.folder): name for name, network in checkpoint.networks.items()}
    folders = {**folders, str(checkpoint.root): "checkpoint"}

    @contextlib.contextmanager
    def noting(network: str | None) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            said = str(error)
            for folder in sorted(folders, key=len, reverse=True):
                said = said.replace(folder, folders[folder])
            said = re.sub(r"(?<![\w.])/(?:[^\s:;,'\"/]+/)+", "", said).removeprefix("checkpoint/")
            if said not in found.problems:
                found.problems.append(said)
            if network is not None and isinstance(error, MisfitError):
                found.networks[network] |= {kind: [*names] for kind, names in error.names.items()}

    return noting


def _described(network: Network) -> dict[str, Any]:
    """Files, tensors and types of one network; of one without weight files, that there are none."""
    if not network.has_weights:
        return {"files": {}}
    with opened(network.weights) as entries:
        kinds = Counter(entry.kind for entry in entries)
        numbers = sum(math.prod(entry.shape) for entry in entries)
    return {
        "files": {name: file.stat().st_size for name, file in zip(network.names, network.files, strict=True)},
        "passed_over": [*network.weights.passed_over],
        "averaged": network.weights.averaged,
        "tensors": kinds.total(),
        "numbers": numbers,
        "kinds": dict(kinds),
    }


def _tell_configurations(found: Found, request: Request) -> None:
    request.check(weights=False)
    checkpoint, config = request.checkpoint, request.checkpoint.llm_config
    found.family, found.pyramid = request.family, [*request.pyramid]
    found.context = config.context_token if isinstance(config, TransformerConfig) else None
    found.sampling = asdict(checkpoint.sampling)
    if checkpoint.text_encoder is not None:
        prompt = sha256_of_system_prompt(request.system_prompt, request.trained_with_system_prompt)
        found.system_prompt = PUBLISHED if prompt == SHA256 else prompt or NONE
        found.vocabulary = request.vocabulary.get_vocab_size() if request.vocabulary else None
    elif not request.model.num_classes:
        found.notes.append("there is no text encoder: give one, or draw from text features only")


def _stored_levels(llm: Network) -> tuple[int | None, list[int] | None]:
    """Tokens in front of the scales and the sides of these, by the table in the weights."""
    with opened(llm.weights) as entries:
        tables = [e for e in entries if e.name.rpartition(".")[2] == LEVELS and e.readable]
        return _sides(tables[0]) if tables else (None, None)


def _sides(table: Stored) -> tuple[int, list[int]]:
    counts = Counter(table.read().flatten().tolist())
    first, *tokens = (counts[level] for level in sorted(counts))
    return first, [1, *(math.isqrt(count) for count in tokens)]


def _tell_sizes(found: Found, forecasted: Forecast) -> None:
    for precision, weights in forecasted.weights.items():
        own = {key: memory for key, memory in forecasted.memory.items() if key[0] == precision}
        small = what_does_not_fit(replace(forecasted, memory=own), precision, Path("bundle"))
        found.exports[precision] = {"bytes": weights.nbytes, "does_not_fit": small}


def write(found: Found, file: Path) -> None:
    """The report as JSON."""
    with whole_file(file) as opened_file:
        opened_file.write(f"{json.dumps(asdict(found), indent=2, ensure_ascii=False)}\n".encode())


def show(found: Found) -> None:
    """Print it: a table on a terminal, plain text in a pipe."""
    console = Console()
    style = box.SIMPLE if console.is_terminal else None
    if not console.is_terminal:
        console = Console(width=110)
    console.print(_network_table(found, style))
    for line in [*_lines(found), *(f"note: {note}" for note in found.notes)]:
        console.print(Text(line), soft_wrap=True)
    for problem in found.problems:
        console.print(Text(f"problem: {problem}"), soft_wrap=True)


def _network_table(found: Found, style: box.Box | None) -> Table:
    table = Table("network", "weight files", box=style)
    for name in ("MB", "tensors", "types", "do not fit"):
        table.add_column(name, justify="right")
    for name, network in found.networks.items():
        files = network["files"]
        first = next(iter(files), "none that can be looked into")
        wrong = sum(len(network.get(kind, ())) for kind in ("missing", "unexpected", "shape"))
        table.add_row(
            name,
            first + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
            f"{sum(files.values()) / 1e6:,.1f}",
            str(network.get("tensors", "-")),
            ", ".join(network.get("kinds", ())) or "-",
            str(wrong) if files else "-",
        )
    return table


def _lines(found: Found) -> Iterator[str]:
    if found.family is not None:
        yield f"family: {found.family}, scales {found.pyramid}" + (
            f", {found.context} tokens of text" if found.context else ""
        )
    if found.stored_pyramid is not None:
        same = found.stored_pyramid == found.pyramid and found.stored_context in (found.context, 1)
        said = "the same" if same else f"{found.stored_pyramid} behind {found.stored_context} tokens"
        yield f"scales by the table in the weights: {said}"
    for name, network in found.networks.items():
        if others := network.get("passed_over"):
            which = "averaged" if network["averaged"] else "these"
            yield f"{name}: {which} weights are read, not {', '.join(others)}"
    if found.system_prompt is not None:
        yield f"system prompt: {found.system_prompt}; text tokenizer: {found.vocabulary} words"
    for precision, export in found.exports.items():
        small = export["does_not_fit"]
        yield f"{precision}: {export['bytes'] / 1e9:.2f} GB, " + ("; ".join(small) or "fits this machine")
