"""A result for people: tables on the terminal, and the same tables as ``bench.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hart_runtime.bench.result import Result, StageResult
from hart_runtime.bench.samples import Samples
from hart_runtime.bench.sustained import Minute, Sustained
from hart_runtime.bench.timing import HOST

Row = tuple[str, ...]

FIRST_PICTURE = {
    "imports": "imports",
    "verify": "verify hashes",
    "open": "sessions or engines",
    "run": "first picture",
    "save": "PNG",
    "total": "process start to PNG",
    "imports_bytes": "resident after imports",
    "open_bytes": "resident when loaded",
    "peak_bytes": "peak resident",
    "gpu_bytes": "GPU memory",
}


STAGE_COLUMNS = ("stage", "ms", "of wall", "host ms", "GFLOP", "MB", "of FLOP/s", "of GB/s", "x floor")


@dataclass(frozen=True)
class Section:
    """One table with what has to be said about it."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    note: str = ""


def sections(result: Result) -> list[Section]:
    """All tables of a report, in order."""
    return [
        section
        for section in (
            _latency(result),
            _first(result),
            _against(result),
            _stages(result),
            _encoder(result),
        )
        if section.rows
    ]


def headline(result: Result) -> str:
    """What was measured on what, in one paragraph."""
    bundle, machine = result.bundle, result.machine
    gpu = machine.get("gpu") or {}
    device = gpu.get("name") or result.device if result.device != "cpu" else machine["cpu"]
    threads = f"{result.threads} threads" if result.threads else f"{machine['cores']} cores, all used"
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    sentences = [
        f"{bundle['name']} ({bundle['precision']}, {bundle['image_size']} px, bundle "
        f"{bundle['identity'][:12]}) with {result.backend} on {device}, {threads}; {result.date}.",
        f"A picture starts at {bundle['starts_at']}.",
        f"Peak measured in this run: {result.peak.operations / 1e9:.0f} GFLOP/s, "
        f"{result.peak.bytes / 1e9:.1f} GB/s.",
        f"{libraries}, Python {machine['python']}.",
    ]
    if board := machine.get("jetson"):
        clock = f", GPU at up to {board['gpu_max_mhz']} MHz" if board.get("gpu_max_mhz") else ""
        sentences.append(f"{board['model']}, power mode {board['power_mode']}{clock}.")
    return " ".join(sentences + [f"Note: {warning}." for warning in warnings(result)])


def warnings(result: Result) -> list[str]:
    """What makes the numbers less than they could be."""
    found = [result.company.warning()]
    slowed = (result.after.get("gpu") or {}).get("slowed_by")
    found.append(f"the GPU held its clocks down ({', '.join(slowed)})" if slowed else None)
    return [warning for warning in found if warning]


def print_report(result: Result, console: Console) -> None:
    """Print every table."""
    console.print(Text(headline(result)))
    print_sections(sections(result), console)


def print_sections(found: Iterable[Section], console: Console) -> None:
    """Print tables with what is to be said about them."""
    for section in found:
        console.print(f"\n[bold]{section.title}[/bold]")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(section.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        if section.note:
            console.print(Text(section.note))


def write_markdown(result: Result, file: Path, plots: tuple[str, ...]) -> None:
    """Write the tables and links to plots beside the file."""
    lines = [headline(result), ""]
    for section in sections(result):
        lines += markdown(section)
    lines += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    file.write_text("\n".join(lines).strip() + "\n", encoding="utf-8")


def markdown(section: Section) -> list[str]:
    """A table with its title and what is to be said about it, line by line."""
    return [
        *(f"**{section.title}**", "", _line(section.columns)),
        _line(("---", *("---:" for _ in section.columns[1:]))),
        *(_line(row) for row in section.rows),
        *(["", section.note, ""] if section.note else [""]),
    ]


def _latency(result: Result) -> Section:
    rows = tuple(
        (
            str(row.batch),
            *(_ms(p) for p in (row.seconds.p50, row.seconds.p90, row.seconds.p99)),
            f"{row.pictures_per_second:.2f}",
            str(len(row.seconds.values)),
        )
        for row in result.latency
    )
    columns = ("batch", "p50 ms", "p90 ms", "p99 ms", "pictures/s", "runs")
    return Section("Prompt in, pixels out", columns, rows)


def _first(result: Result) -> Section:
    rows = []
    for name, what in FIRST_PICTURE.items():
        values = [getattr(picture, name) for picture in result.first_pictures]
        if None not in values:
            middle = Samples.of(values).p50
            rows.append((what, f"{middle / 1e6:.0f} MB" if "bytes" in name else f"{_ms(middle)} ms"))
    note = f"Median of {len(result.first_pictures)} processes; files were in the page cache."
    return Section("First picture of a fresh process", ("what", "how much"), tuple(rows), note)


def _against(result: Result) -> Section:
    rows = tuple(
        (
            row.name,
            _ms(row.seconds.p50),
            _ms(row.ours.p50),
            f"{row.ratio.p50:.2f}",
            f"{min(row.ratio.values):.2f} to {max(row.ratio.values):.2f}",
            _ms(row.first),
            "equal" if row.psnr is None else f"{row.psnr:.1f} dB",
        )
        for row in result.against
    )
    columns = ("reference", "p50 ms", "bundle p50 ms", "ratio", "from - to", "first ms", "pictures")
    note = "In turns, from text features; ratio = reference / bundle, above 1 the bundle is faster."
    return Section("Against PyTorch", columns, rows, note)


def _stages(result: Result) -> Section:
    breakdown = result.breakdown
    wall = breakdown.wall.p50
    rows = [_stage(stage, wall) for stage in breakdown.stages]
    outside = breakdown.graphs[HOST].p50  # medians of stages would not add up to that of the whole
    inside = wall - outside
    floors = sum(stage.floor or 0.0 for stage in breakdown.stages)
    total = ("total", _ms(inside), _percent(inside / wall), _ms(outside))
    rows.append((*total, "", "", "", "", f"{inside / floors:.1f}" if floors else ""))
    note = (
        f"Medians of {len(breakdown.wall.values)} pictures of batch {breakdown.batch}, "
        f"wall {_ms(wall)} ms, {_percent(outside / wall)} of it outside the graphs."
    )
    return Section("Stages", STAGE_COLUMNS, tuple(rows), note)


def _encoder(result: Result) -> Section:
    wall = result.breakdown.wall.p50
    rows = (_stage(result.encoder, wall),) if result.encoder else ()
    note = "Once for every picture that is given, before what is drawn with it; beside the wall time above."
    return Section("A given picture", STAGE_COLUMNS, rows, note)


def _stage(stage: StageResult, wall: float) -> Row:
    times = (_ms(stage.seconds.p50), _percent(stage.seconds.p50 / wall), _ms(stage.host.p50))
    if stage.floor is None or stage.operations is None or stage.bytes is None:
        return (stage.name, *times, "", "", "", "", "")
    return (
        stage.name,
        *times,
        f"{stage.operations / 1e9:.2f}",
        f"{stage.bytes / 1e6:.1f}",
        _percent(stage.operations_share or 0.0),
        _percent(stage.bytes_share or 0.0),
        f"{stage.seconds.p50 / stage.floor:.1f}",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


def sustained_table(found: Sustained) -> Table:
    """A row for each minute; what could not be read has no column."""
    energy = f"J a picture ({found.energy_of})"
    columns: dict[str, Callable[[Minute], str]] = {
        "from": lambda m: f"{m.begins / 60:g} min",
        "pictures": lambda m: str(m.pictures),
        "p50": lambda m: f"{m.p50:.3f} s",
        "p99": lambda m: f"{m.p99:.3f} s",
        "lowest MHz": lambda m: "" if m.mhz is None else f"{m.mhz:.0f}",
        "highest °C": lambda m: "" if m.celsius is None else f"{m.celsius:.0f}",
        "slowed by": lambda m: ", ".join(m.slowed_by),
        "W": lambda m: "" if m.watts is None else f"{m.watts:.1f}",
        energy: lambda m: "" if m.joules_per_picture is None else f"{m.joules_per_picture:.2f}",
    }
    told = {name: [cell(minute) for minute in found.minutes] for name, cell in columns.items()}
    told = {name: cells for name, cells in told.items() if any(cells)}
    title = f"{found.bundle['name']}, {found.bundle['precision']}, {found.backend} on {found.device}"
    table = Table(*told, title=f"{title}, batch {found.batch}")
    for row in zip(*told.values(), strict=True):
        table.add_row(*row)
    return table
