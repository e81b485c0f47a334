"""Trains a demo checkpoint: ``python -m hart_runtime.hart.demo.train``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.checkpoint import LLM, SAMPLING_FILE, TEXT_ENCODER, TOKENIZER
from hart_runtime.common.console import PATH, command
from hart_runtime.common.install import require
from hart_runtime.hart.demo import CLASS_DEMO, CLASS_MAR, DEMO_CHECKPOINT

if TYPE_CHECKING:
    import torch


@command()
@click.option("--classes", is_flag=True, help="Train the demo of classes, and a VAR and a MAR beside it.")
@click.option("--output", type=PATH, help="Checkpoint folder. [default: the installed package's]")
@click.option(
    "--work",
    type=PATH,
    default=Path("demo-training"),
    show_default=True,
    help="Folder for resumable state.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), show_default="cuda, where there is one")
def main(classes: bool, output: Path | None, work: Path, seed: int, device: str | None) -> None:
    """Train a demo checkpoint and write it to OUTPUT.

    On 2 CPU cores the text demo takes two and a half hours, that of classes less than one.
    """
    require("hart_runtime.hart.demo.train", "export", "torch", "safetensors")
    import torch

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    made = output or (CLASS_DEMO if classes else DEMO_CHECKPOINT)
    (_train_classes if classes else _train_texts)(made, work, seed, chosen)
    click.echo(f"wrote {made} after {(time.monotonic() - start) / 60:.0f} minutes")


def _train_texts(output: Path, work: Path, seed: int, device: torch.device) -> None:
    from hart_runtime.hart.checkpoint import save_model
    from hart_runtime.hart.demo.training import SAMPLING, train_tokenizer, train_transformer

    tokenizer = train_tokenizer(work, seed, device)
    text, transformer, prompts = train_transformer(tokenizer, work, seed, device)
    save_model(tokenizer, output / TOKENIZER, prefix="vae.")
    save_model(transformer, output / LLM)
    save_model(text, output / TEXT_ENCODER)
    prompts.save(str(output / TEXT_ENCODER / "tokenizer.json"))
    (output / SAMPLING_FILE).write_text(json.dumps(SAMPLING, indent=2) + "\n", encoding="utf-8")


def _train_classes(output: Path, work: Path, seed: int, device: torch.device) -> None:
    from hart_runtime.hart.demo.class_training import HART, VAR, save_classes, train_classes
    from hart_runtime.hart.demo.mar_training import save_mar, train_kl_tokenizer, train_mar

    hart, var = (train_classes(config, work, seed, device) for config in (HART, VAR))
    save_classes(hart.cpu(), var.cpu(), output)
    tokenizer = train_kl_tokenizer(work, seed, device)
    save_mar(train_mar(tokenizer, work, seed, device), tokenizer, output / CLASS_MAR.name)


if __name__ == "__main__":
    main()
