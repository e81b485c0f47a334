"""``hart-bench serve``: how a server fares under load."""

from __future__ import annotations

import json
import os

import click

from hart_runtime.common.console import WORD, FiniteRange, command

KEY_VARIABLE = "HART_API_KEY"


@command(name="serve")
@click.option("--url", required=True, type=WORD, help="Address of a hart-serve.")
@click.option("--clients", default=4, show_default=True, type=click.IntRange(1, 1024))
@click.option(
    "--rate", type=FiniteRange(0.01), help="Requests a second, answered or not. [default: each client waits]"
)
@click.option("--seconds", default=30.0, show_default=True, type=FiniteRange(1))
@click.option("--prompt", "prompts", multiple=True, type=WORD, help="In turns. [default: one of the demo's]")
@click.option("--num-images", "pictures", default=1, show_default=True, type=click.IntRange(1, 10))
@click.option("--partial-images", "partials", default=1, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def serve_load(
    url: str,
    clients: int,
    rate: float | None,
    seconds: float,
    prompts: tuple[str, ...],
    pictures: int,
    partials: int,
    as_json: bool,
) -> None:
    """Ask a server for pictures, and print throughput, waiting times and refusals.

    Its key is read from $HART_API_KEY.
    """
    from rich.console import Console
    from rich.table import Table

    from hart_runtime.bench.load import SHARES, Load, measure_load

    key = os.environ.get(KEY_VARIABLE)
    load = Load(url, clients, rate, seconds, prompts or Load.prompts, pictures, partials, key)
    measured = measure_load(load)
    if as_json:
        click.echo(json.dumps(measured.summary(), indent=1))
        return
    table = Table("seconds until", *(f"p{share}" for share in SHARES))
    for name, words in (("first", "something is shown"), ("whole", "the picture is whole")):
        found = measured.quantiles(name)
        table.add_row(words, *(f"{found[share]:.2f}" if found else "-" for share in SHARES))
    Console().print(table)
    told = ", ".join(f"{name}: {count}" for name, count in sorted(measured.outcomes.items()))
    click.echo(f"{measured.throughput:.2f} pictures a second for {measured.seconds:.0f} s; {told}")
