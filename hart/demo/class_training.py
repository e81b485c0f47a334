"""The training of the demo of classes: HART of a class, and a VAR of equal width beside it.

Both learn the same pictures in the same order, encoded once by the image tokenizer of the text demo,
which stays as it is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hart_runtime.common.checkpoint import CLASS_NAMES, LLM, SAMPLING_FILE, TOKENIZER, find_checkpoint
from hart_runtime.common.config import DISCRETE, ClassHartConfig, ClassTransformerConfig
from hart_runtime.common.settings import VAR_DEMO, SamplingSettings
from hart_runtime.hart.checkpoint import load_hart, save_half, save_model
from hart_runtime.hart.class_transformer import ClassHartTransformer, ClassTransformer
from hart_runtime.hart.demo import CLASS_VAR, DEMO_CHECKPOINT
from hart_runtime.hart.demo.encoding import Encoded, encoded
from hart_runtime.hart.demo.optimise import TransformerStage, initialise, optimise
from hart_runtime.hart.demo.scenes import CLASSES, Scene, all_scenes
from hart_runtime.hart.demo.training import PATCH_NUMS
from hart_runtime.hart.losses import class_transformer_loss
from hart_runtime.hart.published import llm_buffers, var_names
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.var_checkpoint import stored_name

HART = ClassHartConfig(
    depth=4,
    embed_dim=128,
    num_heads=4,
    num_classes=len(CLASSES),
    patch_nums=PATCH_NUMS,
    mlp_hidden=512,
    attn_l2_norm=True,
    shared_aln=True,
    diff_width=256,
    diff_depth=3,
)
VAR = ClassTransformerConfig(**{f.name: getattr(HART, f.name) for f in fields(ClassTransformerConfig)})
STAGE = TransformerStage("", steps=2400, batch=32, learning_rate=1.5e-3, balance=0.5, residual_share=0.25)
DATASET = 16384
SAMPLING = SamplingSettings(guidance=2.0, top_k=5, top_p=0.6, smooth=False)
VAR_SAMPLING = replace(SAMPLING, residual=False, steps=VAR_DEMO.steps)


def shapes_tokenizer() -> ImageTokenizer:
    """The text demo's."""
    return load_hart(find_checkpoint(DEMO_CHECKPOINT)).tokenizer


def class_scenes(seed: int) -> tuple[list[Scene], np.random.Generator]:
    """Scenes of all classes that the models learn, and what their pictures are drawn with."""
    rng = np.random.default_rng([seed, 50])
    scenes = all_scenes()
    return [scenes[i] for i in rng.integers(len(scenes), size=DATASET)], rng


def encoded_classes(
    tokenizer: ImageTokenizer, work: Path, seed: int, device: torch.device
) -> tuple[list[Scene], Encoded]:
    """Scenes of all classes, and their pictures."""
    chosen, rng = class_scenes(seed)
    return chosen, encoded(tokenizer.to(device), chosen, rng, work / "encoded-classes.pt", device)


def train_classes(
    config: ClassTransformerConfig,
    work: Path,
    seed: int,
    device: torch.device,
    stage: TransformerStage = STAGE,
) -> ClassTransformer:
    """Learn to draw classes, with a residual if the configuration has one."""
    torch.manual_seed(seed)
    tokenizer = shapes_tokenizer()
    scenes, data = encoded_classes(tokenizer, work, seed, device)
    labels = torch.tensor([scene.label for scene in scenes], device=device)
    image = tokenizer.config
    sizes = image.vocab_size, image.z_channels
    model, name = ClassTransformer(config, *sizes), "classes-var"
    if isinstance(config, ClassHartConfig):
        model, name = ClassHartTransformer(config, *sizes), "classes-hart"
    initialise(model.to(device), config.depth)
    for places in (model.pos_start, model.pos_1LC):
        nn.init.normal_(places, std=0.3)

    def batch_loss(step: int) -> dict[str, Tensor]:
        chosen = np.random.default_rng([seed, 51, step]).choice(DATASET, size=stage.batch)
        return class_transformer_loss(
            model,
            tokenizer.quantize,
            labels[chosen],
            *data.batch(chosen),
            torch.Generator().manual_seed(step),
            stage.balance,
            stage.residual_share,
        )

    averaged = optimise(model, replace(stage, name=name), batch_loss, work)
    model.load_state_dict(averaged.state_dict())
    return model.eval().requires_grad_(False)


@torch.no_grad()
def var_tokenizer(hybrid: ImageTokenizer) -> ImageTokenizer:
    """The same codes and the same decoder as VAR has them: with a convolution behind the last scale, too.

    No other scale of the demo's pyramid uses it, so it may be one that changes nothing.
    """
    made = ImageTokenizer(replace(hybrid.config, quantizer_type=DISCRETE))
    made.load_state_dict(hybrid.state_dict())
    last = made.quantize.quant_resi.phis()[-1]
    assert last.bias is not None
    nn.init.dirac_(last.weight)
    nn.init.zeros_(last.bias)
    return made.eval().requires_grad_(False)


def save_classes(hart: ClassTransformer, var: ClassTransformer, output: Path) -> None:
    """Write HART in its published layout, and below it VAR in its own, in float16."""
    tokenizer = shapes_tokenizer()
    save_model(hart, output / LLM)
    if not (output / TOKENIZER).exists():
        shutil.copytree(DEMO_CHECKPOINT / TOKENIZER, output / TOKENIZER)
    beside = output / CLASS_VAR.name
    beside.mkdir(exist_ok=True)
    first, second = var_names(var.config, tokenizer.config)
    state = {stored_name(name): value for name, value in var.state_dict().items()}
    levels = {"lvl_1L": llm_buffers(var.config)["lvl_1L"]()}  # its file tells the scales by them
    save_half(state | levels, beside / f"{first}.safetensors")
    save_half(var_tokenizer(tokenizer).state_dict(), beside / f"{second}.safetensors")
    for folder, sampling in ((output, SAMPLING), (beside, VAR_SAMPLING)):
        own = json.dumps(asdict(sampling), indent=2)
        (folder / SAMPLING_FILE).write_text(f"{own}\n", encoding="utf-8")
        (folder / CLASS_NAMES).write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
