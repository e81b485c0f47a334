"""Recordings in the layout of the published code's, of random checkpoints of any form, by our own reference.

They say nothing of exactness, but that whatever recordings may be of is found, read and replayed: by
``HART_GOLDEN_DIR`` people give the tests recordings that we do not have.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from hart_runtime.common.noise import RecordedNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart.generate import generate_classes
from hart_runtime.hart.model import Var
from hart_runtime.hart.random_var import VarShape, write_random_var
from hart_runtime.hart.var_checkpoint import load_var
from tests.golden_hooks import recording_all

LIGHT = frozenset(["x_in", "logits_cfg"])
"""Tensors of a scale that are left out where a recording is not of the standard level."""
FULL = ("block", "head_in", "logits_raw", "kv.")
"""Parts of names that the fullest level has beside."""
SETTINGS = SamplingSettings(guidance=2.0, top_k=None, top_p=0.9, smooth=False, residual=False)


def write_recordings(shape: VarShape, folder: Path, batch: int = 2, seed: int = 0) -> Path:
    """A variant with a run of each level, the last one smooth, and its tokenizer's recording."""
    write_random_var(shape, folder, seed=seed)
    for name, file in zip(("var", "vae"), shape.files, strict=True):
        (folder / file).rename(folder / f"{name}.pth")
    sizes = asdict(shape.transformer)
    own = {key: sizes[key] for key in ("num_classes", "depth", "embed_dim", "num_heads", "shared_aln")}
    described = {"patch_nums": sizes["patch_nums"], "var": own}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "golden").mkdir()
    model = load_var(folder / "var.pth", folder / "vae.pth", num_heads=shape.transformer.num_heads)
    for level, settings in (
        ("full", SETTINGS),
        ("std", replace(SETTINGS, top_k=30, top_p=0.0, guidance=1.5)),
        ("light", replace(SETTINGS, smooth=True)),
    ):
        _write_run(model, folder / "golden" / f"run_{level}.safetensors", level, settings, batch, seed)
    _write_tokenizer(model, folder / "golden" / "tokenizer.safetensors", seed)
    return folder


def _write_run(model: Var, file: Path, level: str, settings: SamplingSettings, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config, vocabulary = model.transformer.config, model.tokenizer.config.vocab_size
    labels = rng.integers(config.num_classes + 1, size=batch)  # the last stands for none
    noise = {}
    for k, side in enumerate(config.patch_nums):
        noise[f"scale{k}.u"] = rng.random((batch, side * side), np.float32)
        if settings.smooth:
            drawn = rng.exponential(size=(batch, side * side, vocabulary)).clip(1e-4)
            noise[f"scale{k}.gumbel_exp"] = drawn.astype(np.float16)
    found: dict[str, np.ndarray] = {}
    with recording_all(model, found) as record:
        generate_classes(model, torch.from_numpy(labels), RecordedNoise(noise), settings, record)
    last = len(config.patch_nums) - 1
    ours = ("codes", "logits_kept", "modulations", "final.")
    kept = {
        name: value
        for name, value in found.items()
        if not any(part in name for part in (*ours, *(() if level == "full" else FULL)))
        and (level != "light" or name.rpartition(".")[2] not in LIGHT)
        and (not name.startswith("kv.") or name.startswith("kv.block0"))
        and name not in (f"scale{last}.logits_raw", f"scale{last}.head_in")
        and f"block{config.depth - 1}.out" not in name
    }
    told = {
        "cfg": settings.guidance,
        "top_k": settings.top_k or 0,
        "top_p": settings.top_p,
        "more_smooth": settings.smooth,
        "patch_nums": config.patch_nums,
        "B": batch,
        "level": level,
    }
    arrays = {name: np.ascontiguousarray(value) for name, value in (kept | noise).items()}
    save_file({**arrays, "label": labels}, file, {"run": json.dumps(told)})


@torch.inference_mode()
def _write_tokenizer(model: Var, file: Path, seed: int) -> None:
    transformer, tokenizer = model
    sides = transformer.config.patch_nums
    side = sides[-1] * tokenizer.config.downsample
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tokens = tokenizer.encode(images)
    f_hats = tokenizer.quantize.accumulate(tokens.indices, sides, phi_on_last=True)
    found = {
        "image_in": images,
        "f": tokenizer.latent(images),
        "var_input": tokenizer.quantize.transformer_inputs(f_hats, sides),
        "image_rec": tokenizer.decode(f_hats[-1]),
        "label": torch.tensor([0, transformer.config.num_classes]),
    }
    for k, (index, f_hat) in enumerate(zip(tokens.indices, f_hats, strict=True)):
        found |= {f"scale{k}.idx": index, f"scale{k}.f_hat": f_hat}
    save_file({name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}, file)
