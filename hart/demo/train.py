"""Trains the demo checkpoint: ``python -m hart_runtime.hart.demo.train``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from hart_runtime.common.checkpoint import LLM, SAMPLING_FILE, TEXT_ENCODER, TOKENIZER
from hart_runtime.common.console import PATH, command
from hart_runtime.common.install import require
from hart_runtime.hart.demo import DEMO_CHECKPOINT


@command()
@click.option("--output", type=PATH, default=DEMO_CHECKPOINT, show_default="the installed package")
@click.option(
    "--work",
    type=PATH,
    default=Path("demo-training"),
    show_default=True,
    help="Folder for resumable state.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), show_default="cuda, where there is one")
def main(output: Path, work: Path, seed: int, device: str | None) -> None:
    """Train the demo checkpoint (two and a half hours on 2 CPU cores) and write it to OUTPUT."""
    require("hart_runtime.hart.demo.train", "export", "torch", "safetensors")
    import torch

    from hart_runtime.hart.checkpoint import save_model
    from hart_runtime.hart.demo.training import SAMPLING, train_tokenizer, train_transformer

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tokenizer = train_tokenizer(work, seed, chosen)
    text, transformer, prompts = train_transformer(tokenizer, work, seed, chosen)
    save_model(tokenizer, output / TOKENIZER, prefix="vae.")
    save_model(transformer, output / LLM)
    save_model(text, output / TEXT_ENCODER)
    prompts.save(str(output / TEXT_ENCODER / "tokenizer.json"))
    (output / SAMPLING_FILE).write_text(json.dumps(SAMPLING, indent=2) + "\n", encoding="utf-8")
    click.echo(f"wrote {output} after {(time.monotonic() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
